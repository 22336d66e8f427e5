"""Examples to one padded batch: both sides' ids, attention and loss masks, and the chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken._checks import check_choice, check_number
from xtoken.align import AlignmentBatch, Coverage
from xtoken.data.columns import example_from_columns
from xtoken.data.examples import Example
from xtoken.distillation.batch import Batch
from xtoken.errors import DataError, OptionError
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.host import ordinary
from xtoken.vocab.fingerprints import PairFingerprint

PaddingSide = Literal["right", "left"]
# No hardware asks for more, and a batch of one token would fill the memory.
_MOST_PADDING = 2**16


class DistillCollator:
    """Pads examples to the longest of the batch, each side on its own.

    Args:
        student_pad_id, teacher_pad_id: written into padding, where no mask is set.
        padding_side: `right` or `left`, for both sides.
        pad_to_multiple_of: lengths are rounded up to it.
        pair: the pair whose examples these are; batches carry it.

    Raises:
        OptionError: an unknown side, or a multiple below 1.
    """

    def __init__(
        self,
        student_pad_id: int = 0,
        teacher_pad_id: int = 0,
        *,
        padding_side: PaddingSide = "right",
        pad_to_multiple_of: int = 1,
        pair: PairFingerprint | None = None,
    ) -> None:
        check_choice("padding_side", padding_side, ("right", "left"))
        rule = f"is out of range; expected a whole number of at least 1, at most {_MOST_PADDING}"
        check_number("pad_to_multiple_of", pad_to_multiple_of, 1, rule=rule, whole=True)
        if pad_to_multiple_of > _MOST_PADDING:
            raise OptionError(f"pad_to_multiple_of = {pad_to_multiple_of} {rule}")
        for name, pad in (("student_pad_id", student_pad_id), ("teacher_pad_id", teacher_pad_id)):
            check_number(name, pad, 0, rule="is no token id; expected at least 0", whole=True)
        self.student_pad_id = student_pad_id
        self.teacher_pad_id = teacher_pad_id
        self.padding_side = padding_side
        self.pad_to_multiple_of = pad_to_multiple_of
        self.pair = pair

    @ordinary()
    def __call__(self, rows: Sequence[Example | Mapping[str, Any]]) -> Batch:
        """The padded batch.

        Args:
            rows: examples, or rows of `Pair.tokenize`.

        Raises:
            DataError: there is no example, or one of the rows was left out.
            PairError: a row is of another pair.
        """
        if not rows:
            raise DataError("a batch of 0 examples cannot be padded; give at least one")
        examples = [
            row if isinstance(row, Example) else example_from_columns(row, self.pair)
            for row in rows
        ]
        student = self._pad(
            [example.student_ids for example in examples],
            [example.student_loss_mask for example in examples],
            self.student_pad_id,
        )
        teacher = self._pad(
            [example.teacher_ids for example in examples],
            [example.teacher_loss_mask for example in examples],
            self.teacher_pad_id,
        )
        alignments = AlignmentBatch.stack([example.alignment for example in examples])
        alignments = replace(alignments, student_columns=student[2], teacher_columns=teacher[2])
        asked = teacher[1].any(1)
        # Of a text that is for another teacher nothing is to be covered.
        own = [each.alignment for each, one in zip(examples, asked.tolist(), strict=True) if one]
        whole = len(own) == len(examples)
        if whole:
            coverage = alignments.coverage
        elif own:
            coverage = AlignmentBatch.stack(own).coverage
        else:
            coverage = Coverage(*[0] * len(fields(Coverage)))
        return Batch(
            student=student[0],
            teacher=teacher[0],
            student_loss_mask=student[1],
            teacher_loss_mask=teacher[1],
            chunks=ChunkBatch.usable_from_alignments(alignments, student[1], teacher[1]),
            tokens=int(student[1][:, 1:].sum()),
            coverage=coverage,
            pair=self.pair,
            counted=predictors(student[1]),
            asked_tokens=None if whole else int(student[1][asked, 1:].sum()),
        )

    def _pad(
        self,
        ids: list[NDArray[np.int64]],
        loss_masks: list[NDArray[np.bool_]],
        pad_id: int,
    ) -> tuple[dict[str, Tensor], Tensor, NDArray[np.int64]]:
        longest = max(map(len, ids))
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        padded = np.full((len(ids), width), pad_id, dtype=np.int64)
        attention = np.zeros((len(ids), width), dtype=np.int64)
        loss = np.zeros((len(ids), width), dtype=np.bool_)
        offsets = [width - len(row) if self.padding_side == "left" else 0 for row in ids]
        for row, offset in enumerate(offsets):
            columns = slice(offset, offset + len(ids[row]))
            padded[row, columns] = ids[row]
            attention[row, columns] = 1
            loss[row, columns] = loss_masks[row]
            # Nothing predicts a first token; after left padding a pad would seem to.
            loss[row, offset : offset + 1] = False
        inputs = {
            "input_ids": torch.from_numpy(padded),
            "attention_mask": torch.from_numpy(attention),
        }
        if any(offsets):
            # Positions count tokens. Only with padding on the left: not every model takes them.
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return inputs, torch.from_numpy(loss), np.asarray(offsets, dtype=np.int64)


def predictors(loss_mask: Tensor) -> Tensor:
    """[N] int64, the flat positions that predict the tokens of a loss mask [B, T]."""
    row, place = loss_mask[:, 1:].nonzero(as_tuple=True)
    return row * loss_mask.shape[1] + place


def pad_id(tokenizer: Any) -> int:
    """The tokenizer's own padding token; 0 where it has none, or one that was added to it, of which
    the model may have no row. Padding is masked everywhere.
    """
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    size = getattr(tokenizer, "vocab_size", None)  # without what was added
    return 0 if isinstance(size, int) and pad >= size else pad
