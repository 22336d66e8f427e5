"""From a chunk's predictor rows to one row: the only home of merging.

Logits at position p predict token p + 1, so the predictors of tokens [s0, s1) are the positions
s0 - 1 .. s1 - 2. A merge makes one distribution of their rows, up to a factor that a loss over
distributions normalizes away:

* `chain`: the first predictor's distribution times the probabilities of the tokens that follow in
  the chunk; normalized, the first predictor's distribution (X-Token, arXiv 2605.21699);
* `last`: the last predictor's distribution times the probabilities of the tokens before;
* `mean`: the mean of the predictors' log-probabilities; normalized, the softmax of the mean logits.

ALM, the loss that uses the factors, reads all rows of a chunk itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.host import on_device

Merge = Literal["chain", "last", "mean"]


@dataclass(frozen=True, eq=False)
class ChunkRows:
    """Rows of the flattened [B * T] positions that make each chunk.

    Attributes:
        index: [N] int64, grouped by chunk.
        owner: [N] int64, rising, the chunk of each row; None where every chunk has one row.
        count: C.
        ends: C + 1 numbers on the host, each chunk's range in `index`; None as `owner`.
    """

    index: Tensor
    owner: Tensor | None
    count: int
    ends: NDArray[np.int64] | None = None

    @classmethod
    def ragged(
        cls, first: NDArray[np.int64], sizes: NDArray[np.int64], device: torch.device
    ) -> ChunkRows:
        """The `sizes` [C] rows from `first` [C] on of each chunk; made on the host."""
        ends = np.zeros(len(sizes) + 1, np.int64)
        np.cumsum(sizes, out=ends[1:])
        owner = np.repeat(np.arange(len(sizes)), sizes)
        index = np.arange(len(owner)) + np.repeat(first - ends[:-1], sizes)
        return cls(on_device(index, device), on_device(owner, device), len(sizes), ends)

    @classmethod
    def of_ptr(cls, index: Tensor, ends: NDArray[np.int64]) -> ChunkRows:
        """Rows with each chunk's range `ends` [C + 1] in them."""
        owner = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
        return cls(index, on_device(owner, index.device), len(ends) - 1, ends)

    def range_of(self, start: int, stop: int) -> slice:
        """Where the rows of chunks [start, stop) are among all."""
        if self.ends is None:
            return slice(start, stop)
        return slice(int(self.ends[start]), int(self.ends[stop]))

    def block(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """The rows of chunks [start, stop), and for each its chunk, counted from `start`."""
        rows = self.range_of(start, stop)
        return self.index[rows], None if self.owner is None else self.owner[rows] - start

    def blocks(self, rows: int, start: int = 0, stop: int | None = None) -> list[tuple[int, int]]:
        """Cut chunks [start, stop) into ranges of at most `rows` rows, at least one chunk each."""
        stop = self.count if stop is None else stop
        if self.ends is None:
            return [(a, min(a + rows, stop)) for a in range(start, stop, rows)]
        if start == stop:
            return []
        ends, cuts = self.ends[start : stop + 1].tolist(), [start]
        for chunk in range(start + 1, stop):
            if ends[chunk + 1 - start] - ends[cuts[-1] - start] > rows:
                cuts.append(chunk)
        return list(zip(cuts, [*cuts[1:], stop], strict=True))


def chunk_rows(chunks: ChunkBatch, side: str, length: int, merge: Merge | None) -> ChunkRows:
    """The predictor rows of each chunk on one side.

    Args:
        side: "student" or "teacher".
        length: T of that side, the stride of the flattened positions.
        merge: which rows to take; None takes all of them, as `mean` does.
    """
    start, end = chunks.range_of(side)
    base = chunks.sample * length
    if merge == "chain":
        return ChunkRows(base + start - 1, None, len(chunks))
    if merge == "last":
        return ChunkRows(base + end - 2, None, len(chunks))
    host = chunks.host
    first, last = host.range_of(side)
    return ChunkRows.ragged(host.sample * length + first - 1, last - first, chunks.device)


def _sizes(segments: Tensor, count: int, like: Tensor) -> Tensor:
    """[count, 1] the rows of each segment; 1 for none."""
    ones = torch.ones_like(segments, dtype=like.dtype)
    return like.new_zeros(count).index_add(0, segments, ones).clamp(min=1)[:, None]


def merge_rows(rows: Tensor, segments: Tensor | None, count: int) -> Tensor:
    """[n, V] predictor rows to [count, V] chunk logits: the mean of each chunk's rows."""
    if segments is None:
        return rows
    sums = rows.new_zeros(count, rows.shape[1]).index_add(0, segments, rows)
    return sums / _sizes(segments, count, rows)


def unmerge_rows(grad: Tensor, segments: Tensor | None) -> Tensor:
    """The gradient of `merge_rows`: [count, V] of the chunks to [n, V] of their rows."""
    if segments is None:
        return grad
    return (grad / _sizes(segments, len(grad), grad)).index_select(0, segments)
