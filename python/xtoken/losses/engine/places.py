"""Places of constant number for a block's chunks and rows, so that they are compiled once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xtoken.losses.engine.merge import ChunkRows


@dataclass(frozen=True, eq=False)
class Places:
    """The chunks [start, stop) of a loss and their rows, filled up to `size` places each.

    Attributes:
        dtype: of the rows.
        chunk: [size] int64, the chunk in each place; the first one again past the last.
        real: [size] bool, the places of chunks.
        real_rows: [size] bool, the places of rows.
        segments: [size] int64, the place of each row's chunk, the last one for rows that fill up;
            None where every chunk has one row.
    """

    start: int
    stop: int
    size: int
    dtype: torch.dtype
    chunk: Tensor
    real: Tensor
    real_rows: Tensor
    segments: Tensor | None

    @classmethod
    def of(
        cls,
        start: int,
        stop: int,
        segments: Tensor | None,
        rows: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Places:
        """From the block's chunks and its number of rows, with each row's chunk."""
        place = torch.arange(size, device=device)
        real, real_rows = place < stop - start, place < rows
        if segments is not None:
            segments = torch.cat([segments, segments.new_full((size - rows,), size - 1)])
        chunk = torch.where(real, place + start, start)
        return cls(start, stop, size, dtype, chunk, real, real_rows, segments)

    @property
    def student(self) -> ChunkRows:
        """The rows of the places, in their order."""
        return ChunkRows(self.chunk, None, self.size)

    def of_chunks(self, values: Tensor) -> Tensor:
        """[C, ...] of all chunks to [size, ...]."""
        return values.index_select(0, self.chunk)

    def fill(self, values: Tensor) -> Tensor:
        """[n, ...] of the block's rows or chunks to [size, ...], the first one again past the
        last; zeros where there is none."""
        more = self.size - len(values)
        if more <= 0:
            return values
        first = values[:1] if len(values) else values.new_zeros(1, *values.shape[1:])
        return torch.cat([values, first.expand(more, *values.shape[1:])])

    def item(self, values: Tensor, filler: int | float | bool, more: int = 2) -> Tensor:
        """[N] of the block's items with `more` of the filler, one symbol to the compiler: it takes
        lengths of 0 and 1 for numbers of their own."""
        return of_any_length(torch.cat([values, values.new_full((more,), filler)]))


def of_any_length(tensor: Tensor, axis: int = 0) -> Tensor:
    """A tensor whose length along an axis is another in every batch."""
    if tensor.shape[axis] > 1:
        torch._dynamo.mark_dynamic(tensor, axis)
    return tensor
