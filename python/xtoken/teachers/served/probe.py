"""What tells one served model from another: its name, and its answer to one fixed prompt."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtoken._core import Vocab
from xtoken._files import JsonValue, read_json, sealed, unsealed, write_text
from xtoken.errors import FormatError, StoreError
from xtoken.teachers.shard import Predictions

Ids = NDArray[np.int64]

_LENGTH = 24
ENTRIES = 8
# Of a position's probabilities. The kernels of one model at other batch sizes differ by less.
_TOTAL_VARIATION = 0.02


def fixed_prompt(vocab: Vocab | int) -> Ids:
    """The same tokens for the same vocabulary: words where they are known, else spread ids.

    Special tokens are left out, since a server may treat them in its own way.
    """
    if isinstance(vocab, int):
        return np.arange(1, _LENGTH + 1, dtype=np.int64) * vocab // (_LENGTH + 2)
    step = max(1, len(vocab) // 997)
    start = len(vocab) // 7
    words: list[int] = []
    for offset in range(len(vocab)):
        token = (start + offset * step) % len(vocab)
        if not vocab.is_special(token) and _is_word(vocab.token_bytes(token)):
            words.append(token)
            if len(words) == _LENGTH:
                break
    return np.array(words, np.int64) if len(words) > 1 else fixed_prompt(len(vocab))


def _is_word(token: bytes) -> bool:
    return token.isascii() and token.removeprefix(b" ").isalpha()


@dataclass(frozen=True)
class Probe:
    """A model's answer to the fixed prompt.

    Attributes:
        model: as the server names it.
        prompt: [T] ids.
        ids, log_probs: [T, k] the likeliest next tokens.
    """

    model: str
    prompt: list[int]
    ids: list[list[int]]
    log_probs: list[list[float]]

    @classmethod
    def of(cls, model: str, prompt: Ids, answer: Predictions) -> Probe:
        """From the predictions of the fixed prompt; a few entries per position."""
        return cls(
            model,
            prompt.tolist(),
            answer.ids[:, :ENTRIES].tolist(),
            # Six digits are all that a float32 has.
            [[float(f"{x:.6g}") for x in row] for row in answer.log_probs[:, :ENTRIES].tolist()],
        )

    @property
    def digest(self) -> str:
        """32 hexadecimal digits of the name and the answer, to the last digit."""
        content = json.dumps([self.model, self.prompt, self.ids, self.log_probs])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def agrees(self, other: Probe) -> bool:
        """Whether both are of one model: the same but for the rounding of a server's kernels."""
        if (self.model, self.prompt) != (other.model, other.prompt):
            return False
        rows = zip(self.ids, self.log_probs, other.ids, other.log_probs, strict=True)
        return all(_distance(*row) <= _TOTAL_VARIATION for row in rows)

    def save(self, path: Path) -> None:
        """Write it as JSON with a checksum."""
        write_text(path, sealed(self.__dict__))

    @classmethod
    def load(cls, path: Path) -> Probe:
        """Read what `save` wrote, or an earlier version without its checksum.

        Raises: StoreError if the file was altered, or is of another form.
        """
        foreign = StoreError(
            f"{path} was altered, or does not describe a served teacher; remove it, or use another "
            "folder"
        )
        try:
            content: JsonValue = read_json(path, "description of a served teacher")
        except FormatError as error:
            raise foreign from error
        if isinstance(content, dict) and set(content) != set(cls.__dataclass_fields__):
            content = unsealed(content)
        if not isinstance(content, dict) or set(content) != set(cls.__dataclass_fields__):
            raise foreign
        found = cls(**content)  # type: ignore[arg-type]
        if not found._is_answer():
            raise foreign
        return found

    def _is_answer(self) -> bool:
        """Whether the values are of the types that they are said to be, and fit one another."""
        tables: list[Any] = [self.ids, self.log_probs]
        if not isinstance(self.model, str) or not _is_row(self.prompt, int):
            return False
        if not all(isinstance(table, list) and len(table) == len(self.prompt) for table in tables):
            return False
        return all(
            _is_row(ids, int) and _is_row(log_probs, float) and len(ids) == len(log_probs)
            for ids, log_probs in zip(*tables, strict=True)
        )


def _is_row(values: object, kind: type[int] | type[float]) -> bool:
    """Whether it is a list of numbers of one type, not empty, none of them NaN."""
    return (
        isinstance(values, list)
        and len(values) > 0
        and all(type(value) is kind and value == value for value in values)
    )


def _distance(
    one_ids: list[int], one_log_probs: list[float], other_ids: list[int], other: list[float]
) -> float:
    """Half the sum of differences of probabilities, over the entries that both rows have."""
    one = dict(zip(one_ids, np.exp(one_log_probs), strict=True))
    two = dict(zip(other_ids, np.exp(other), strict=True))
    common = one.keys() & two.keys()
    # The last entries may change places with what is not there.
    if len(common) < len(one) // 2:
        return 1.0
    return float(sum(abs(one[token] - two[token]) for token in common)) / 2
