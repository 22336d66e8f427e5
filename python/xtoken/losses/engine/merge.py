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

import torch
from torch import Tensor

from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.segments import offsets_of, ragged_arange

Merge = Literal["chain", "last", "mean"]


@dataclass(frozen=True, eq=False)
class ChunkRows:
    """Rows of the flattened [B * T] positions that make each chunk.

    Attributes:
        index: [N] int64, grouped by chunk.
        ptr: [C + 1] int64, each chunk's range in `index`; None where every chunk has one row.
        count: C.
    """

    index: Tensor
    ptr: Tensor | None
    count: int

    def block(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """The rows of chunks [start, stop), and for each its chunk, counted from `start`."""
        if self.ptr is None:
            return self.index[start:stop], None
        ptr = self.ptr[start : stop + 1]
        local = torch.arange(stop - start, device=ptr.device)
        return self.index[ptr[0] : ptr[-1]], torch.repeat_interleave(local, ptr.diff())

    def blocks(self, rows: int, start: int = 0, stop: int | None = None) -> list[tuple[int, int]]:
        """Cut chunks [start, stop) into ranges of at most `rows` rows, at least one chunk each."""
        stop = self.count if stop is None else stop
        if self.ptr is None:
            return [(a, min(a + rows, stop)) for a in range(start, stop, rows)]
        if start == stop:
            return []
        ends, cuts = self.ptr[start : stop + 1].tolist(), [start]
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
    start, end = getattr(chunks, f"{side}_start"), getattr(chunks, f"{side}_end")
    base = chunks.sample * length
    if merge == "chain":
        return ChunkRows(base + start - 1, None, len(chunks))
    if merge == "last":
        return ChunkRows(base + end - 2, None, len(chunks))
    sizes = end - start
    return ChunkRows(ragged_arange(base + start - 1, sizes), offsets_of(sizes), len(chunks))


def merge_rows(rows: Tensor, segments: Tensor | None, count: int) -> Tensor:
    """[n, V] predictor rows to [count, V] chunk logits: the mean of each chunk's rows."""
    if segments is None:
        return rows
    sizes = torch.bincount(segments, minlength=count).to(rows.dtype)
    sums = rows.new_zeros(count, rows.shape[1]).index_add(0, segments, rows)
    return sums / sizes[:, None]


def unmerge_rows(grad: Tensor, segments: Tensor | None) -> Tensor:
    """The gradient of `merge_rows`: [count, V] of the chunks to [n, V] of their rows."""
    if segments is None:
        return grad
    sizes = torch.bincount(segments, minlength=len(grad)).to(grad.dtype)
    return (grad / sizes[:, None]).index_select(0, segments)
