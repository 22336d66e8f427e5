"""Span alignment: which tokens of two tokenizations of one text correspond.

A *chunk* is a run of student tokens and a run of teacher tokens that belong together. The chunks of
an alignment tile both sequences in order, so three arrays say everything: two rising arrays of
bounds and a kind for each chunk between them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from xtoken.errors import ShapeError
from xtoken.vocab.fingerprints import PairFingerprint, common_pair

if TYPE_CHECKING:
    import torch

Int64: TypeAlias = npt.NDArray[np.int64]
Kinds: TypeAlias = npt.NDArray[np.uint8]


class ChunkKind(IntEnum):
    """How the two sides of a chunk relate."""

    EXACT = 0
    """Tokens on both sides that spell the same bytes."""
    MISMATCH = 1
    """Tokens on both sides whose bytes differ."""
    STUDENT_ONLY = 2
    """One student token that the teacher has nothing for."""
    TEACHER_ONLY = 3
    """One teacher token that the student has nothing for."""
    SPECIAL = 4
    """Two special tokens that correspond by role."""


@dataclass(frozen=True)
class Coverage:
    """How much of both sides lies in EXACT chunks.

    A dummy prefix that one side alone has is not text and counts as no byte, unless it lies in a
    chunk that is not EXACT.
    """

    student_bytes: int
    teacher_bytes: int
    exact_bytes: int
    """The same on both sides."""
    student_tokens: int
    teacher_tokens: int
    exact_student_tokens: int
    exact_teacher_tokens: int
    chunks: int
    exact_chunks: int
    coarse_chunks: int
    """MISMATCH chunks that stand where the search for a finer answer met its limit."""

    @property
    def student_byte_share(self) -> float:
        """Share of the student's bytes in EXACT chunks; 1 where there is no text."""
        return _share(self.exact_bytes, self.student_bytes)

    @property
    def teacher_byte_share(self) -> float:
        """Share of the teacher's bytes in EXACT chunks; 1 where there is no text."""
        return _share(self.exact_bytes, self.teacher_bytes)

    @property
    def student_token_share(self) -> float:
        """Share of the student's tokens in EXACT chunks; 1 where there is none."""
        return _share(self.exact_student_tokens, self.student_tokens)

    @property
    def teacher_token_share(self) -> float:
        """Share of the teacher's tokens in EXACT chunks; 1 where there is none."""
        return _share(self.exact_teacher_tokens, self.teacher_tokens)

    def __add__(self, other: Coverage) -> Coverage:
        return Coverage(
            *(getattr(self, field.name) + getattr(other, field.name) for field in fields(self))
        )


@dataclass(frozen=True, eq=False)
class Alignment:
    """The chunks of one pair of sequences.

    Chunk `c` covers the student tokens `student_bounds[c]:student_bounds[c + 1]` and the teacher
    tokens `teacher_bounds[c]:teacher_bounds[c + 1]`.
    """

    student_bounds: Int64
    """[C + 1], from 0 to T_s."""
    teacher_bounds: Int64
    """[C + 1], from 0 to T_t."""
    kind: Kinds
    """[C], values of `ChunkKind`."""
    byte_counts: Int64
    """[4]: bytes of the student's text, of the teacher's, in EXACT chunks; coarse chunks."""
    pair: PairFingerprint | None = None
    """The vocabularies of the ids, where known; not part of equality."""

    def __len__(self) -> int:
        """The number of chunks."""
        return len(self.kind)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Alignment) and _same_arrays(self, other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def coverage(self) -> Coverage:
        """How much of both sides lies in EXACT chunks."""
        return _coverage(
            np.diff(self.student_bounds), np.diff(self.teacher_bounds), self.kind, self.byte_counts
        )

    def shapes(self, kinds: Collection[ChunkKind] | None = None) -> dict[tuple[int, int], int]:
        """How many chunks have n student and m teacher tokens, as {(n, m): count}, most first.

        Args:
            kinds: count only chunks of these kinds; all if None.
        """
        return _shapes(np.diff(self.student_bounds), np.diff(self.teacher_bounds), self.kind, kinds)

    def student_chunk_ids(self, kinds: Collection[ChunkKind] | None = None) -> Int64:
        """The chunk of each student token, [T_s] int64; -1 where its kind is not in `kinds`."""
        return _chunk_ids(self.student_bounds, self.kind, kinds)

    def teacher_chunk_ids(self, kinds: Collection[ChunkKind] | None = None) -> Int64:
        """The chunk of each teacher token, [T_t] int64; -1 where its kind is not in `kinds`."""
        return _chunk_ids(self.teacher_bounds, self.kind, kinds)

    def to_torch(self, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
        """The arrays as tensors, by field name; they share memory on the CPU."""
        return _to_torch(self, device)


@dataclass(frozen=True, eq=False)
class AlignmentBatch:
    """The alignments of a batch in flat arrays; `batch[b]` is one `Alignment`.

    Sequence `b` has the chunks `chunk_indptr[b]:chunk_indptr[b + 1]` of `kind`. It has one bound
    more than chunks, so its bounds are `chunk_indptr[b] + b : chunk_indptr[b + 1] + b + 1`.
    """

    student_bounds: Int64
    """[C + B], each sequence's from 0 to its T_s."""
    teacher_bounds: Int64
    """[C + B], each sequence's from 0 to its T_t."""
    kind: Kinds
    """[C], values of `ChunkKind`."""
    chunk_indptr: Int64
    """[B + 1], rising from 0 to C."""
    byte_counts: Int64
    """[B, 4], as in `Alignment`."""
    student_columns: Int64
    """[B]: the column of each sequence's first token; 0 but for padding on the left."""
    teacher_columns: Int64
    """[B]: the same for the teacher's."""
    pair: PairFingerprint | None = None
    """The vocabularies of the ids, where known; not part of equality."""

    def __len__(self) -> int:
        """The number of sequences."""
        return len(self.chunk_indptr) - 1

    def __getitem__(self, index: int) -> Alignment:
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"sequence {index} is outside the batch (B = {size})")
        index %= size
        start, end = int(self.chunk_indptr[index]), int(self.chunk_indptr[index + 1])
        bounds = slice(start + index, end + index + 1)
        return Alignment(
            self.student_bounds[bounds],
            self.teacher_bounds[bounds],
            self.kind[start:end],
            self.byte_counts[index],
            self.pair,
        )

    def __iter__(self) -> Iterator[Alignment]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AlignmentBatch) and _same_arrays(self, other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def coverage(self) -> Coverage:
        """How much of both sides of all sequences together lies in EXACT chunks."""
        return _coverage(*self._sizes(), self.kind, self.byte_counts.sum(axis=0))

    def shapes(self, kinds: Collection[ChunkKind] | None = None) -> dict[tuple[int, int], int]:
        """How many chunks have n student and m teacher tokens; see `Alignment.shapes`."""
        return _shapes(*self._sizes(), self.kind, kinds)

    def student_chunk_ids(
        self, width: int | None = None, kinds: Collection[ChunkKind] | None = None
    ) -> Int64:
        """The chunk of each student token within its sequence.

        Args:
            width: columns of the result; as many as the longest sequence needs if None.
            kinds: tokens of chunks of other kinds get -1; all kinds count if None.

        Returns: [B, width] int64; -1 on padding.

        Raises:
            ShapeError: a sequence is longer than `width`.
        """
        return self._padded_chunk_ids(self.student_bounds, self.student_columns, width, kinds)

    def teacher_chunk_ids(
        self, width: int | None = None, kinds: Collection[ChunkKind] | None = None
    ) -> Int64:
        """The chunk of each teacher token within its sequence; see `student_chunk_ids`."""
        return self._padded_chunk_ids(self.teacher_bounds, self.teacher_columns, width, kinds)

    def to_torch(self, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
        """The arrays as tensors, by field name; they share memory on the CPU."""
        return _to_torch(self, device)

    @classmethod
    def stack(cls, alignments: Sequence[Alignment]) -> AlignmentBatch:
        """A batch of alignments that were made one by one, with padding on the right.

        Raises:
            PairError: the alignments are of several pairs.
        """
        counts = [len(alignment) for alignment in alignments]
        return cls(
            _concatenate([alignment.student_bounds for alignment in alignments], np.int64),
            _concatenate([alignment.teacher_bounds for alignment in alignments], np.int64),
            _concatenate([alignment.kind for alignment in alignments], np.uint8),
            np.concatenate(([0], np.cumsum(counts, dtype=np.int64))).astype(np.int64),
            np.array([alignment.byte_counts for alignment in alignments], np.int64).reshape(-1, 4),
            np.zeros(len(alignments), np.int64),
            np.zeros(len(alignments), np.int64),
            common_pair([alignment.pair for alignment in alignments], "alignments"),
        )

    def _sizes(self) -> tuple[Int64, Int64]:
        # Between the last bound of a sequence and the first of the next lies no chunk.
        seams = self.chunk_indptr[1:-1] + np.arange(max(len(self) - 1, 0))
        return (
            np.delete(np.diff(self.student_bounds), seams),
            np.delete(np.diff(self.teacher_bounds), seams),
        )

    def _padded_chunk_ids(
        self,
        bounds: Int64,
        columns: Int64,
        width: int | None,
        kinds: Collection[ChunkKind] | None,
    ) -> Int64:
        ends = columns + bounds[self.chunk_indptr[1:] + np.arange(len(self))]
        needed = int(ends.max(initial=0))
        width = needed if width is None else width
        if needed > width:
            raise ShapeError(f"width = {width} where {needed} is needed; pass the padded width")
        chunk_ids = np.full((len(self), width), -1, np.int64)
        for row in range(len(self)):
            start, end = int(self.chunk_indptr[row]), int(self.chunk_indptr[row + 1])
            own = _chunk_ids(bounds[start + row : end + row + 1], self.kind[start:end], kinds)
            chunk_ids[row, columns[row] : ends[row]] = own
        return chunk_ids


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _array_names(arrays: Alignment | AlignmentBatch) -> list[str]:
    return [field.name for field in fields(arrays) if field.name != "pair"]


def _same_arrays(one: Alignment | AlignmentBatch, other: Alignment | AlignmentBatch) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in _array_names(one)
    )


def _concatenate(arrays: Sequence[npt.NDArray[Any]], dtype: type) -> npt.NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)


def _selected(kind: Kinds, kinds: Collection[ChunkKind] | None) -> npt.NDArray[np.bool_]:
    if kinds is None:
        return np.ones(len(kind), np.bool_)
    return np.isin(kind, [int(wanted) for wanted in kinds])


def _coverage(student: Int64, teacher: Int64, kind: Kinds, byte_counts: Int64) -> Coverage:
    exact = kind == ChunkKind.EXACT
    student_bytes, teacher_bytes, exact_bytes, coarse_chunks = (int(n) for n in byte_counts)
    return Coverage(
        student_bytes=student_bytes,
        teacher_bytes=teacher_bytes,
        exact_bytes=exact_bytes,
        student_tokens=int(student.sum()),
        teacher_tokens=int(teacher.sum()),
        exact_student_tokens=int(student[exact].sum()),
        exact_teacher_tokens=int(teacher[exact].sum()),
        chunks=len(kind),
        exact_chunks=int(exact.sum()),
        coarse_chunks=coarse_chunks,
    )


def _shapes(
    student: Int64, teacher: Int64, kind: Kinds, kinds: Collection[ChunkKind] | None
) -> dict[tuple[int, int], int]:
    selected = _selected(kind, kinds)
    shapes = zip(student[selected].tolist(), teacher[selected].tolist(), strict=True)
    return dict(sorted(Counter(shapes).items(), key=lambda item: (-item[1], item[0])))


def _chunk_ids(bounds: Int64, kind: Kinds, kinds: Collection[ChunkKind] | None) -> Int64:
    chunks = np.arange(len(kind), dtype=np.int64)
    if kinds is not None:
        chunks = np.where(_selected(kind, kinds), chunks, -1)
    return np.repeat(chunks, np.diff(bounds))


def _to_torch(
    arrays: Alignment | AlignmentBatch, device: torch.device | str | None
) -> dict[str, torch.Tensor]:
    import torch

    return {
        name: torch.from_numpy(getattr(arrays, name)).to(device) for name in _array_names(arrays)
    }
