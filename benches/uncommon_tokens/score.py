"""What a student knows of held-out text by class, and of the numerals digit by digit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xtoken import Vocab
from xtoken.data import Example
from xtoken.teachers import causal_logits
from xtoken.training.evaluate import DIGIT, NUMERAL

BATCH = 16


@dataclass(frozen=True)
class Classes:
    """Token ids by class; [n] int64 each. `first_digit` [numerals] goes with `numerals`."""

    byte_lengths: Tensor
    numerals: Tensor
    first_digit: Tensor
    digits: Tensor

    @classmethod
    def of(cls, vocab: Vocab) -> Classes:
        tokens = [b"" if vocab.is_special(i) else vocab.token_bytes(i) for i in range(len(vocab))]
        numerals = [i for i, token in enumerate(tokens) if NUMERAL.fullmatch(token)]
        return cls(
            torch.tensor([len(token) for token in tokens]),
            torch.tensor(numerals),
            torch.tensor([int(tokens[i].strip()[:1]) for i in numerals]),
            torch.tensor([i for i, token in enumerate(tokens) if DIGIT.fullmatch(token)]),
        )


@torch.no_grad()
def score(
    model: nn.Module, examples: Sequence[Example], kinds: Sequence[str], vocab: Vocab
) -> dict[str, float]:
    """Scores of a student on held-out examples.

    Returns: bits per byte overall, by kind of document and off numerals; and, where the next token
        is a two- or three-digit numeral: its negative log-likelihood in nats (`nll`), which is the
        sum of that of the class (`nll_class`), of the first digit within the class (`nll_first`)
        and of the numeral given its first digit (`nll_rest`); `top1`, `top10`; the mean mass on all
        numerals and on single digits.
    """
    model.eval()
    classes = Classes.of(vocab)
    sums: dict[str, float] = {}

    def add(name: str, value: Tensor | float) -> None:
        sums[name] = sums.get(name, 0.0) + float(value)

    for kind in sorted(set(kinds)):
        mine = [e for e, of in zip(examples, kinds, strict=True) if of == kind]
        mine.sort(key=lambda example: len(example.student_ids))
        for start in range(0, len(mine), BATCH):
            targets, log_probs = _predictions(model, mine[start : start + BATCH], classes)
            nats = -log_probs.gather(1, targets[:, None])[:, 0].double()
            lengths = classes.byte_lengths[targets]
            at = torch.isin(targets, classes.numerals)
            for name, chosen in ((kind, slice(None)), ("off_numerals", ~at)):
                add(f"nats {name}", nats[chosen].sum())
                add(f"bytes {name}", lengths[chosen].sum())
            _add_numerals(add, targets[at], log_probs[at], classes)
    all_kinds = sorted(set(kinds))
    for part in ("nats", "bytes"):
        sums[f"{part} all"] = sum(sums[f"{part} {kind}"] for kind in all_kinds)
    count = sums.pop("numerals")
    result = {
        f"bits_per_byte_{name}": sums[f"nats {name}"] / math.log(2) / sums[f"bytes {name}"]
        for name in ("all", *all_kinds, "off_numerals")
    }
    result |= {
        f"numeral_{name}": sums[name] / count
        for name in ("nll", "nll_class", "nll_first", "nll_rest", "top1", "top10")
    }
    result["numeral_mass"], result["digit_mass"] = sums["mass"] / count, sums["digits"] / count
    return result | {"numerals": count, "bytes": sums["bytes all"]}


def _predictions(
    model: nn.Module, examples: Sequence[Example], classes: Classes
) -> tuple[Tensor, Tensor]:
    """The text tokens [N] of examples and the log-probabilities [N, V_s] there."""
    width = max(len(example.student_ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        length = len(example.student_ids)
        ids[row, :length] = torch.from_numpy(example.student_ids)
        mask[row, :length] = 1
    scored = (mask[:, 1:] > 0) & (classes.byte_lengths[ids[:, 1:]] > 0)
    logits = causal_logits(model, ids, mask)[:, :-1][scored]
    return ids[:, 1:][scored], logits[:, : len(classes.byte_lengths)].float().log_softmax(-1)


def _add_numerals(add, targets: Tensor, log_probs: Tensor, classes: Classes) -> None:  # type: ignore[no-untyped-def]
    own = log_probs.gather(1, targets[:, None])[:, 0].double()
    within = log_probs[:, classes.numerals].double()  # [n, numerals]
    mass = within.logsumexp(1)
    place = torch.searchsorted(classes.numerals, targets)
    same = classes.first_digit[None, :] == classes.first_digit[place][:, None]
    first = within.masked_fill(~same, -torch.inf).logsumexp(1)
    better = (log_probs > log_probs.gather(1, targets[:, None])).sum(1)
    add("numerals", len(targets))
    add("nll", -own.sum())
    add("nll_class", -mass.sum())
    add("nll_first", (mass - first).sum())
    add("nll_rest", (first - own).sum())
    add("top1", (better == 0).sum())
    add("top10", (better < 10).sum())
    add("mass", mass.exp().sum())
    add("digits", log_probs[:, classes.digits].double().exp().sum())
