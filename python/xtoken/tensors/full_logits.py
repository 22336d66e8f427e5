"""Rows and entries of full logits, held whole or made where they are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xtoken.tensors.lm_head import LmHead, product_dtype
from xtoken.tensors.rows import upcast
from xtoken.tensors.teacher_spread import TeacherSpread


@dataclass(frozen=True, eq=False)
class FullLogits:
    """Logits [B, T, V'], of which the first `width` columns count; without a graph.

    Attributes:
        source: logits; or an `LmHead` or a `TeacherSpread`, whose rows are made where they are
            read.
        width: number of columns.
    """

    source: Tensor | LmHead | TeacherSpread
    width: int

    @classmethod
    def of(cls, source: Tensor | LmHead | TeacherSpread, width: int | None) -> FullLogits:
        """All columns, or the first `width`."""
        columns = columns_of(source)
        return cls(source, columns if width is None else min(width, columns))

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return _values(self.source).device

    @property
    def dtype(self) -> torch.dtype:
        """That of what is read."""
        source = self.source
        if isinstance(source, LmHead):
            return product_dtype(source.hidden, source.weight)
        return torch.float64 if _values(source).dtype == torch.float64 else torch.float32

    @property
    def positions(self) -> tuple[int, int]:
        """(B, T)."""
        shape = _values(self.source).shape
        return shape[0], shape[1]

    # Dynamo of torch 2.11 cannot wrap a decorated method of what is made while it traces.
    def rows(self, index: Tensor, columns: Tensor | None = None) -> Tensor:
        """[N, K] at flattened positions `index` [N] int64 and `columns` [K] int64 (None: all)."""
        with torch.no_grad():
            if not isinstance(self.source, Tensor):
                return self.source.rows(index, columns, width=self.width)
            flat = self.source.detach().flatten(0, 1)[:, : self.width].index_select(0, index)
            return upcast(flat if columns is None else flat.index_select(1, columns))

    def entries(self, index: Tensor, columns: Tensor) -> Tensor:
        """[S] at pairs of flattened positions and columns, int64 each."""
        with torch.no_grad():
            if not isinstance(self.source, Tensor):
                return self.source.entries(index, columns)
            return upcast(self.source.detach().flatten(0, 1)[index, columns])


def columns_of(source: Tensor | LmHead | TeacherSpread) -> int:
    """V' of logits, of a head or of a spread."""
    if isinstance(source, TeacherSpread):
        return source.width
    return source.weight.shape[0] if isinstance(source, LmHead) else source.shape[2]


def _values(source: Tensor | LmHead | TeacherSpread) -> Tensor:
    """The tensor [B, T, ...] that tells positions, device and, but for a head, dtype."""
    if isinstance(source, TeacherSpread):
        return source.log_scale
    return source.hidden if isinstance(source, LmHead) else source
