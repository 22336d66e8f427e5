"""The chunks of a batch in numpy on the host."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from xtoken.align.alignment import Alignment, AlignmentBatch

if TYPE_CHECKING:
    from xtoken.tensors.chunks import ChunkBatch

_SIDES = ("student", "teacher")


@dataclass(frozen=True, eq=False)
class WholeText:
    """The whole rows that chunks were taken from, those that no loss counts among them.

    Attributes:
        alignments: one a row of the batch, at its column.
        starts: [B, T_s] and [B, T_t] bool, the first token of each document of packed rows.
    """

    alignments: AlignmentBatch
    starts: tuple[NDArray[np.bool_], NDArray[np.bool_]] | None = None

    def documents(self) -> list[tuple[int, tuple[int, int], Alignment]] | None:
        """Row, first columns on both sides and alignment of each document; None where one does not
        begin with a chunk."""
        found = []
        columns = self.alignments.student_columns, self.alignments.teacher_columns
        for row, whole in enumerate(self.alignments):
            first = int(columns[0][row]), int(columns[1][row])
            bounds = whole.student_bounds, whole.teacher_bounds
            cuts = self._cuts(row, first, bounds)
            if cuts is None:
                return None
            for start, end in itertools.pairwise([*cuts, len(whole.kind)]):
                own, other = (side[start : end + 1] for side in bounds)
                part = Alignment(
                    own - own[0], other - other[0], whole.kind[start:end], np.zeros(4, np.int64)
                )
                found.append((row, (first[0] + int(own[0]), first[1] + int(other[0])), part))
        return found

    def _cuts(
        self, row: int, first: tuple[int, int], bounds: tuple[NDArray[np.int64], ...]
    ) -> list[int] | None:
        """The first chunk of each document of a row."""
        if self.starts is None:
            return [0]
        begins = [
            np.flatnonzero(starts[row, column : column + int(side[-1])])
            for starts, column, side in zip(self.starts, first, bounds, strict=True)
        ]
        if len(begins[0]) != len(begins[1]):
            return None
        # One side of a chunk may be empty: a document begins where both do.
        places = np.maximum(*(np.searchsorted(s, b) for s, b in zip(bounds, begins, strict=True)))
        if any(not np.array_equal(s[places], b) for s, b in zip(bounds, begins, strict=True)):
            return None
        return sorted({0, *places.tolist()})


@dataclass(frozen=True, eq=False)
class HostChunks:
    """The same chunks in numpy on the host, where a loss may look at them without waiting.

    Attributes:
        sample, student_start, student_end, teacher_start, teacher_end: [C] int64.
        predicted: whether each chunk has a token on both sides and a predictor of each of them.
        reach: the largest sample, student end and teacher end; 0 without a chunk.
        text: what they were taken from, where that is known.
    """

    sample: NDArray[np.int64]
    student_start: NDArray[np.int64]
    student_end: NDArray[np.int64]
    teacher_start: NDArray[np.int64]
    teacher_end: NDArray[np.int64]
    predicted: bool
    reach: tuple[int, int, int]
    text: WholeText | None = None

    @classmethod
    def of(cls, chunks: ChunkBatch) -> HostChunks:
        """Those of a batch; waits for the device it is on."""
        # Copies: a loader's worker moves the tensors' memory to where its parent reads it, and what
        # only looks at the old memory would read what stands there later.
        sample, predicted = array_of(chunks.sample).copy(), array_of(chunks.has_predictor)
        ranges = [array_of(x).copy() for side in _SIDES for x in chunks.range_of(side)]
        good = bool(predicted.all())
        for start, end in (ranges[:2], ranges[2:]):
            good = good and not bool(((start < 1) | (end <= start)).any())
        reach = tuple(int(x.max(initial=0)) for x in (sample, ranges[1], ranges[3]))
        bounds = (ranges[0], ranges[1], ranges[2], ranges[3])
        return cls(sample, *bounds, good, (reach[0], reach[1], reach[2]))

    def range_of(self, side: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First tokens and ends on "student" or "teacher"."""
        if side == "student":
            return self.student_start, self.student_end
        return self.teacher_start, self.teacher_end


def array_of(tensor: Tensor) -> NDArray[Any]:
    """The values, in the tensor's own memory where that is the host's."""
    array: NDArray[Any] = tensor.cpu().numpy()
    return array
