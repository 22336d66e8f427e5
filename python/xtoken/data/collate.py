"""Examples to one padded batch: both sides' ids, attention and loss masks, and the chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.data.examples import Example
from xtoken.errors import DataError
from xtoken.tensors.chunks import ChunkBatch

PaddingSide = Literal["right", "left"]


class DistillBatch(TypedDict):
    """A padded batch; `chunks` counts tokens in padded rows.

    `*_ids` [B, T] int64, `*_attention_mask` [B, T] int64 (1 for a token), `*_loss_mask` [B, T]
    bool (a token that a loss may predict: never padding nor a first token); T_s and T_t differ.
    """

    student_ids: Tensor
    student_attention_mask: Tensor
    student_loss_mask: Tensor
    teacher_ids: Tensor
    teacher_attention_mask: Tensor
    teacher_loss_mask: Tensor
    chunks: ChunkBatch


class DistillCollator:
    """Pads examples to the longest of the batch, each side on its own.

    Args:
        student_pad_id, teacher_pad_id: written into padding, where no mask is set.
        padding_side: `right` or `left`, for both sides.
        pad_to_multiple_of: lengths are rounded up to it.
    """

    def __init__(
        self,
        student_pad_id: int = 0,
        teacher_pad_id: int = 0,
        *,
        padding_side: PaddingSide = "right",
        pad_to_multiple_of: int = 1,
    ) -> None:
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side = {padding_side!r}, expected 'right' or 'left'")
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of = {pad_to_multiple_of}, expected at least 1")
        self.student_pad_id = student_pad_id
        self.teacher_pad_id = teacher_pad_id
        self.padding_side = padding_side
        self.pad_to_multiple_of = pad_to_multiple_of

    @classmethod
    def for_tokenizers(
        cls, student_tokenizer: Any, teacher_tokenizer: Any, **options: Any
    ) -> DistillCollator:
        """Take the pad ids of two `transformers` tokenizers, 0 where a tokenizer has none."""
        return cls(
            student_tokenizer.pad_token_id or 0, teacher_tokenizer.pad_token_id or 0, **options
        )

    def __call__(self, examples: Sequence[Example]) -> DistillBatch:
        """Return the padded batch.

        Raises: DataError if there is no example.
        """
        if not examples:
            raise DataError("a batch of 0 examples cannot be padded; give at least one")
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
        return DistillBatch(
            student_ids=student[0],
            student_attention_mask=student[1],
            student_loss_mask=student[2],
            teacher_ids=teacher[0],
            teacher_attention_mask=teacher[1],
            teacher_loss_mask=teacher[2],
            chunks=ChunkBatch.from_alignments(
                [example.alignment for example in examples], student[3], teacher[3]
            ),
        )

    def _pad(
        self,
        ids: list[NDArray[np.int64]],
        loss_masks: list[NDArray[np.bool_]],
        pad_id: int,
    ) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        longest = max(map(len, ids))
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        padded = np.full((len(ids), width), pad_id, dtype=np.int64)
        attention = np.zeros((len(ids), width), dtype=np.int64)
        loss = np.zeros((len(ids), width), dtype=np.bool_)
        offsets = [width - len(row) if self.padding_side == "left" else 0 for row in ids]
        for row, offset in enumerate(offsets):
            place = slice(offset, offset + len(ids[row]))
            padded[row, place] = ids[row]
            attention[row, place] = 1
            loss[row, place] = loss_masks[row]
            # Nothing predicts a first token; after left padding a pad would seem to.
            loss[row, offset] = False
        return (
            torch.from_numpy(padded),
            torch.from_numpy(attention),
            torch.from_numpy(loss),
            offsets,
        )
