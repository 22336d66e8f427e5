"""Chunks of a batch as flat index tensors, and the rule that says which of them a loss counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

# The integers of `xtoken.align.alignment.ChunkKind`: this file knows torch and no alignment.
EXACT, MISMATCH, STUDENT_ONLY, TEACHER_ONLY, SPECIAL = range(5)

_INDEX_FIELDS = ("sample", "student_start", "student_end", "teacher_start", "teacher_end", "kind")


@dataclass(frozen=True, eq=False)
class ChunkBatch:
    """The chunks of a padded batch, one row a chunk: half-open token ranges in both sequences.

    Attributes:
        sample: [C] int64, row of the batch the chunk belongs to.
        student_start, student_end: [C] int64, token range in the padded [B, T_s] ids.
        teacher_start, teacher_end: [C] int64, token range in the padded [B, T_t] ids.
        kind: [C] int64, a value of `ChunkKind`.
        has_predictor: [C] bool, a position before the chunk predicts its first token on both
            sides. Left out, it is `start >= 1`, which is right where padding stands on the right;
            with left padding a sample's first token follows a pad, which predicts nothing.
    """

    sample: Tensor
    student_start: Tensor
    student_end: Tensor
    teacher_start: Tensor
    teacher_end: Tensor
    kind: Tensor
    has_predictor: Tensor | None = None

    def __post_init__(self) -> None:
        count = self.sample.shape
        for name in _INDEX_FIELDS:
            value = getattr(self, name)
            if value.dtype != torch.int64 or value.dim() != 1 or value.shape != count:
                raise ValueError(
                    f"{name} is {value.dtype} {tuple(value.shape)}, expected int64 "
                    f"{tuple(count)} like sample; build the batch with ChunkBatch.from_alignments"
                )
        if self.has_predictor is None:
            first = (self.student_start >= 1) & (self.teacher_start >= 1)
            object.__setattr__(self, "has_predictor", first)

    def __len__(self) -> int:
        return self.sample.shape[0]

    @property
    def device(self) -> torch.device:
        return self.sample.device

    @classmethod
    def from_alignments(
        cls,
        alignments: Sequence[Any],
        student_offsets: Sequence[int] | None = None,
        teacher_offsets: Sequence[int] | None = None,
    ) -> ChunkBatch:
        """Flatten one alignment a sample into one batch, on the CPU.

        Args:
            alignments: B objects with numpy arrays `student_bounds` [C+1], `teacher_bounds` [C+1]
                and `kind` [C]; C may differ from sample to sample.
            student_offsets, teacher_offsets: B ints, the column at which each sample's first token
                stands in the padded ids (left padding); None means 0.

        Raises:
            ValueError: the number of offsets is not B, or the bounds of a sample do not fit `kind`.
        """
        parts: list[list[Tensor]] = []
        shifts = [
            _offsets(student_offsets, len(alignments), "student_offsets"),
            _offsets(teacher_offsets, len(alignments), "teacher_offsets"),
        ]
        for index, alignment in enumerate(alignments):
            kind = torch.as_tensor(alignment.kind).to(torch.int64)
            row = [torch.full_like(kind, index)]
            predicted = torch.ones_like(kind, dtype=torch.bool)
            for side, offsets in zip(("student", "teacher"), shifts, strict=True):
                bounds = torch.as_tensor(getattr(alignment, f"{side}_bounds")).to(torch.int64)
                if bounds.shape[0] != kind.shape[0] + 1:
                    raise ValueError(
                        f"alignments[{index}].{side}_bounds has {bounds.shape[0]} entries, "
                        f"expected {kind.shape[0] + 1}: one more than kind"
                    )
                predicted &= bounds[:-1] >= 1
                row += [bounds[:-1] + offsets[index], bounds[1:] + offsets[index]]
            parts.append([*row, kind, predicted])
        if not parts:
            return cls.empty()
        return cls(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    @classmethod
    def from_mask(cls, mask: Tensor) -> ChunkBatch:
        """One 1:1 EXACT chunk for every token of `mask` [B, T] bool: both sides share a tokenizer.

        A token whose predecessor is outside the sample has no predictor; with left padding keep
        the first real token out of `mask`.
        """
        if mask.dim() != 2:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, expected [B, T]")
        sample, start = mask.nonzero(as_tuple=True)
        return cls(sample, start, start + 1, start, start + 1, torch.full_like(start, EXACT))

    @classmethod
    def empty(cls, device: torch.device | str | None = None) -> ChunkBatch:
        """A batch without chunks."""
        return cls(*(torch.zeros(0, dtype=torch.int64, device=device) for _ in _INDEX_FIELDS))

    def to(self, device: torch.device | str) -> ChunkBatch:
        """The same chunks on another device."""
        return ChunkBatch(*(getattr(self, f.name).to(device) for f in fields(self)))

    def select(self, index: Tensor) -> ChunkBatch:
        """The chunks at `index`: int64 positions or a [C] bool mask."""
        return ChunkBatch(*(getattr(self, f.name)[index] for f in fields(self)))

    def usable(
        self, student_mask: Tensor, teacher_mask: Tensor, *, admit: Sequence[int] = (EXACT,)
    ) -> ChunkBatch:
        """The chunks that a loss counts, in order.

        A chunk counts when its kind is in `admit`, neither side is empty, a position predicts its
        first token on both sides, and all its tokens are inside both masks.

        Args:
            student_mask: [B, T_s] bool, the token counts in the loss (prompt and padding do not).
            teacher_mask: [B, T_t] bool.
            admit: kinds to count; EXACT alone by default.

        Raises:
            ValueError: a mask is not [B, T] bool, or a chunk lies outside of it.
        """
        assert self.has_predictor is not None
        self.check_within(student_mask.shape, teacher_mask.shape)
        keep = torch.zeros_like(self.has_predictor)
        for kind in admit:
            keep |= self.kind == int(kind)
        keep &= self.has_predictor
        for side, mask in (("student", student_mask), ("teacher", teacher_mask)):
            if mask.dtype != torch.bool:
                raise ValueError(f"{side}_mask is {mask.dtype}, expected torch.bool")
            start, end = getattr(self, f"{side}_start"), getattr(self, f"{side}_end")
            keep &= (end > start) & (start >= 1)
            counted = torch.nn.functional.pad(mask.cumsum(1), (1, 0))  # [B, T + 1]
            inside = counted[self.sample, end] - counted[self.sample, start]
            keep &= inside == end - start
        return self.select(keep)

    def check_within(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
        """Raise where a chunk lies outside [B, T_s] or [B, T_t]: the alignment of another batch."""
        if len(self) == 0:
            return
        for side, shape in (("student", student_shape), ("teacher", teacher_shape)):
            if len(shape) != 2:
                raise ValueError(f"{side} ids or mask have shape {tuple(shape)}, expected [B, T]")
            samples, length = int(self.sample.max()) + 1, int(getattr(self, f"{side}_end").max())
            if samples > shape[0] or length > shape[1]:
                raise ValueError(
                    f"chunks reach sample {samples - 1} and {side} token {length - 1}, but the "
                    f"batch is {tuple(shape)}; pass the alignments of this batch"
                )

    def chunk_ids(self, side: str, shape: Sequence[int]) -> Tensor:
        """[B, T] int64: the chunk each token of `side` ("student" or "teacher") is in, -1 for none.

        Made for inspection; the losses work on the ranges.
        """
        start, end = getattr(self, f"{side}_start"), getattr(self, f"{side}_end")
        sizes = end - start
        chunk = torch.repeat_interleave(torch.arange(len(self), device=self.device), sizes)
        inner = torch.arange(chunk.shape[0], device=self.device) - (sizes.cumsum(0) - sizes)[chunk]
        ids = torch.full(tuple(shape), -1, dtype=torch.int64, device=self.device)
        ids[self.sample[chunk], start[chunk] + inner] = chunk
        return ids


def _offsets(offsets: Sequence[int] | None, count: int, name: str) -> list[int]:
    if offsets is None:
        return [0] * count
    if len(offsets) != count:
        raise ValueError(f"{name} has {len(offsets)} entries, expected {count}: one a sample")
    return [int(offset) for offset in offsets]
