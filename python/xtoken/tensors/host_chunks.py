"""The chunks of a batch in numpy on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from xtoken.tensors.chunks import ChunkBatch

_SIDES = ("student", "teacher")


@dataclass(frozen=True, eq=False)
class HostChunks:
    """The same chunks in numpy on the host, where a loss may look at them without waiting.

    Attributes:
        sample, student_start, student_end, teacher_start, teacher_end: [C] int64.
        predicted: whether each chunk has a token on both sides and a predictor of each of them.
        reach: the largest sample, student end and teacher end; 0 without a chunk.
    """

    sample: NDArray[np.int64]
    student_start: NDArray[np.int64]
    student_end: NDArray[np.int64]
    teacher_start: NDArray[np.int64]
    teacher_end: NDArray[np.int64]
    predicted: bool
    reach: tuple[int, int, int]

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
