"""What a student is worth on held-out text: bits per byte, and where its mass goes at numerals."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from xtoken._core import Vocab
from xtoken.data.examples import Example
from xtoken.errors import DataError, OptionError, TokenIdError
from xtoken.teachers.causal import causal_logits
from xtoken.tensors.host import ordinary
from xtoken.vocab.classes import class_of, order

# An optional space first: some tokenizers glue it to the digits.
NUMERAL = re.compile(rb" ?[0-9]{2,3}")
DIGIT = re.compile(rb" ?[0-9]")


@dataclass(frozen=True)
class HeldOutScore:
    """Scores over the text tokens in the loss masks of held-out examples, first tokens left out.

    Of a conversation that is what the assistant says, without the tokens that end its turns.

    Args:
        bits_per_byte: total negative log-likelihood in bits over the total bytes of scored tokens.
        bytes, tokens: how many were scored.
        numeral_positions: how many scored tokens are two- or three-digit numerals.
        numeral_mass: mean probability on all two- and three-digit numerals at these positions.
        digit_mass: mean probability on all single digits at these positions.
        numeral_nll: mean negative log-likelihood of the right numeral there, in nats.
        class_bits_per_byte: the same as `bits_per_byte` over the tokens of each class of text, by
            its name as in the audit (`Latin letters`, `two-digit numerals`); classes that occur.
    The three at numerals are NaN where there is no such position.
    """

    bits_per_byte: float
    bytes: int
    tokens: int
    numeral_positions: int
    numeral_mass: float
    digit_mass: float
    numeral_nll: float
    class_bits_per_byte: dict[str, float] = field(default_factory=dict)

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Return the scores by name, each with the prefix; of a class as `bits_per_byte/NAME`."""
        values: dict[str, float] = {name: getattr(self, name) for name in _PLAIN}
        values |= {_OF_CLASS + name: bits for name, bits in self.class_bits_per_byte.items()}
        return {prefix + name: value for name, value in values.items()}

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, float], prefix: str = "") -> HeldOutScore:
        """Read what `metrics` returned; other entries are ignored."""
        values: dict[str, Any] = {name: metrics[prefix + name] for name in _PLAIN}
        start = prefix + _OF_CLASS
        by_class = {
            name.removeprefix(start): bits
            for name, bits in metrics.items()
            if name.startswith(start)
        }
        return cls(**values, class_bits_per_byte=by_class)

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> HeldOutScore:
        """Read what `dataclasses.asdict` returned from JSON, in which NaN is null."""
        numbers = {name: _number(values[name]) for name in _PLAIN}
        of_class = cast("Mapping[str, object]", values["class_bits_per_byte"])
        by_class = {name: _number(bits) for name, bits in of_class.items()}
        return cls(**numbers, class_bits_per_byte=by_class)


def _number(value: object) -> Any:
    return math.nan if value is None else value


_OF_CLASS = "bits_per_byte/"
_PLAIN = tuple(each.name for each in fields(HeldOutScore) if each.name != "class_bits_per_byte")


class HeldOutEvaluator:
    """Scores a student on fixed examples.

    Args:
        examples: the held-out examples; only their student side is read.
        vocab: of the student's tokenizer.
        batch_size: examples per forward pass; it does not change the scores beyond rounding.

    Attributes:
        class_bytes: bytes of the scored tokens by their class, in the order of reports.
    """

    @ordinary()
    def __init__(self, examples: Sequence[Example], vocab: Vocab, *, batch_size: int = 16) -> None:
        if not examples:
            raise DataError("0 held-out examples, expected at least 1; hold some documents out")
        if batch_size < 1:
            raise OptionError(f"batch_size = {batch_size}, expected at least 1")
        # Neighbours of one length share a forward pass without padding.
        self.examples = sorted(examples, key=lambda example: len(example.student_ids))
        self.batch_size = batch_size
        lengths = [
            0 if vocab.is_special(i) else len(vocab.token_bytes(i)) for i in range(len(vocab))
        ]
        self.byte_lengths = torch.tensor(lengths, dtype=torch.int64)
        self.numerals = _ids_of(vocab, NUMERAL)
        self.digits = _ids_of(vocab, DIGIT)
        self.class_bytes, self._class_of = self._classes(vocab)

    def _classes(self, vocab: Vocab) -> tuple[dict[str, int], Tensor]:
        """Bytes by class, and of each id [V_s] the place of its class among them; -1 if unscored.

        A class is asked for only of the tokens that occur.
        """
        counts: Counter[int] = Counter()
        for example in self.examples:
            ids = example.student_ids[1:][example.student_loss_mask[1:].astype(bool)]
            counts.update(ids.tolist())
        names = {i: class_of(vocab.token_bytes(i)) for i in counts if self.byte_lengths[i]}
        class_bytes = dict.fromkeys(order(set(names.values())), 0)
        places = {name: place for place, name in enumerate(class_bytes)}
        class_of_id = torch.full((len(vocab),), -1, dtype=torch.int64)
        for token_id, name in names.items():
            class_bytes[name] += counts[token_id] * int(self.byte_lengths[token_id])
            class_of_id[token_id] = places[name]
        return class_bytes, class_of_id

    @torch.no_grad()
    def score(
        self, model: nn.Module, *, before_batch: Callable[[], None] | None = None
    ) -> HeldOutScore:
        """Return the scores of a student, in evaluation mode; its mode is restored.

        Args:
            before_batch: called before each forward pass; what it raises ends the evaluation.
        """
        was_training = model.training
        model.eval()
        totals = torch.zeros(7 + len(self.class_bytes), dtype=torch.float64, device="cpu")
        try:
            for start in range(0, len(self.examples), self.batch_size):
                if before_batch is not None:
                    before_batch()
                totals += self._totals(model, self.examples[start : start + self.batch_size])
        finally:
            model.train(was_training)
        nats, byte_count, tokens, positions, numeral, digit, numeral_nats = totals[:7].tolist()
        mass, digit_mass, nll = (
            value / positions if positions else math.nan for value in (numeral, digit, numeral_nats)
        )
        by_class = zip(self.class_bytes.items(), totals[7:].tolist(), strict=True)
        return HeldOutScore(
            nats / math.log(2) / byte_count if byte_count else math.nan,
            int(byte_count),
            int(tokens),
            int(positions),
            mass,
            digit_mass,
            nll,
            {name: value / math.log(2) / size for (name, size), value in by_class},
        )

    def _totals(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        device = next(model.parameters()).device
        width = max(len(example.student_ids) for example in examples)
        ids = torch.zeros(len(examples), width, dtype=torch.int64, device="cpu")
        mask = torch.zeros(len(examples), width, dtype=torch.int64, device="cpu")
        wanted = torch.zeros(len(examples), width, dtype=torch.bool, device="cpu")
        for row, example in enumerate(examples):
            length = len(example.student_ids)
            ids[row, :length] = torch.from_numpy(example.student_ids)
            mask[row, :length] = 1
            wanted[row, :length] = torch.from_numpy(example.student_loss_mask)
        # Special tokens stand for no byte: they are not text, and not scored.
        scored = wanted[:, 1:] & (self.byte_lengths[ids[:, 1:]] > 0)
        targets = ids[:, 1:][scored]
        logits = causal_logits(model, ids.to(device), mask.to(device))
        rows = logits[:, :-1][scored.to(device)].float()[:, : len(self.byte_lengths)]
        columns = rows.shape[1]  # fewer than tokens, where the head is narrower
        if len(targets) and int(targets.max()) >= columns:
            raise TokenIdError(
                f"the held-out texts hold token {int(targets.max())}, but the student's head has "
                f"{columns} columns; call model.resize_token_embeddings({len(self.byte_lengths)}), "
                "or leave out the texts with that token"
            )
        log_probs = rows.log_softmax(-1)  # [N, V_s]
        nats = -log_probs.gather(1, targets.to(device)[:, None])[:, 0].double().cpu()

        at_numeral = torch.isin(targets, self.numerals)
        probs = log_probs[at_numeral.to(device)].exp()
        values: list[Any] = [
            nats.sum(),
            self.byte_lengths[targets].sum(),
            len(targets),
            at_numeral.sum(),
            probs[:, self.numerals[self.numerals < columns].to(device)].double().sum(),
            probs[:, self.digits[self.digits < columns].to(device)].double().sum(),
            nats[at_numeral].sum(),
        ]
        by_class = torch.zeros(len(self.class_bytes), dtype=torch.float64, device="cpu")
        by_class.index_add_(0, self._class_of[targets], nats)
        return torch.cat(
            [
                torch.tensor([float(each) for each in values], dtype=torch.float64, device="cpu"),
                by_class,
            ]
        )


def _ids_of(vocab: Vocab, pattern: re.Pattern[bytes]) -> Tensor:
    found = [
        i
        for i in range(len(vocab))
        if not vocab.is_special(i) and pattern.fullmatch(vocab.token_bytes(i))
    ]
    return torch.from_numpy(np.asarray(found, dtype=np.int64))
