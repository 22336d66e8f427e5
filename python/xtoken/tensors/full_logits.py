"""Rows and entries of full logits, held whole or made of hidden states and an lm_head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xtoken.tensors.lm_head import LmHead, product_dtype
from xtoken.tensors.rows import upcast


@dataclass(frozen=True, eq=False)
class FullLogits:
    """Logits [B, T, V'], of which the first `width` columns count; without a graph.

    Attributes:
        source: logits, or an `LmHead`, whose logits are made where they are read.
        width: number of columns.
    """

    source: Tensor | LmHead
    width: int

    @classmethod
    def of(cls, source: Tensor | LmHead, width: int | None) -> FullLogits:
        """All columns, or the first `width`."""
        columns = columns_of(source)
        return cls(source, columns if width is None else min(width, columns))

    @property
    def device(self) -> torch.device:
        """Where they are."""
        source = self.source
        return source.hidden.device if isinstance(source, LmHead) else source.device

    @property
    def dtype(self) -> torch.dtype:
        """That of what is read."""
        source = self.source
        if isinstance(source, LmHead):
            return product_dtype(source.hidden, source.weight)
        return torch.float64 if source.dtype == torch.float64 else torch.float32

    @property
    def positions(self) -> tuple[int, int]:
        """(B, T)."""
        shape = self.source.hidden.shape if isinstance(self.source, LmHead) else self.source.shape
        return shape[0], shape[1]

    @torch.no_grad()
    def rows(self, index: Tensor, columns: Tensor | None = None) -> Tensor:
        """[N, K] at flattened positions `index` [N] int64 and `columns` [K] int64 (None: all)."""
        if isinstance(self.source, LmHead):
            return self.source.rows(index, columns, width=self.width)
        flat = self.source.detach().flatten(0, 1)[:, : self.width].index_select(0, index)
        return upcast(flat if columns is None else flat.index_select(1, columns))

    @torch.no_grad()
    def entries(self, index: Tensor, columns: Tensor) -> Tensor:
        """[S] at pairs of flattened positions and columns, int64 each."""
        if isinstance(self.source, LmHead):
            return self.source.entries(index, columns)
        return upcast(self.source.detach().flatten(0, 1)[index, columns])


def columns_of(source: Tensor | LmHead) -> int:
    """V' of logits or of a head."""
    return source.weight.shape[0] if isinstance(source, LmHead) else source.shape[2]
