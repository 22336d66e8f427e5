"""Rows of student logits: what a source of them is, and the plainest one.

A source hands out rows of logits for a block of predictor positions and takes back their gradient.
The losses see only rows, so each of them works from each source.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from xtoken.losses.engine.shared_gradient import SharedGradient
from xtoken.tensors.host import readable
from xtoken.tensors.rows import upcast

# From this width on index_add_ is slower on the CPU than a row at a time, in the end ten times.
_WIDE = 2048


class StudentRows(Protocol):
    """A source of student logits, by row of the flattened [B * T_s] positions."""

    @property
    def positions(self) -> tuple[int, int]:
        """(B, T_s)."""

    @property
    def vocab_size(self) -> int:
        """Columns that `rows` returns."""

    @property
    def shared(self) -> SharedGradient | None:
        """Where several losses write one gradient; None where each has its own."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The differentiable tensors behind the rows, in a fixed order."""

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> StudentRows:
        """The same source on other tensors."""

    def rows_at_once(self, width: int) -> int:
        """How many rows of `width` columns it pays to make together; 1 where it does not."""

    def rows(self, index: Tensor, columns: Tensor | None = None) -> Tensor:
        """[n, V_s], or [n, K] at `columns` [K], ascending; float32 or float64, differentiable."""

    def new_grads(self, needed: tuple[bool, ...]) -> list[Tensor | None]:
        """Zeros for the gradient of each tensor, None where none is needed."""

    def add_grads(
        self, grads: list[Tensor | None], index: Tensor, columns: Tensor | None, grad: Tensor
    ) -> None:
        """Add to `grads` what `grad`, the gradient of `rows(index, columns)`, means for them."""


def zero_grads(tensors: tuple[Tensor, ...], needed: tuple[bool, ...]) -> list[Tensor | None]:
    """Contiguous zeros like each tensor whose gradient is needed, None for the others."""
    return [
        torch.zeros_like(tensor, memory_format=torch.contiguous_format) if need else None
        for tensor, need in zip(tensors, needed, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class LogitRows:
    """Rows of logits [B, T_s, V_s'], of which the first `vocab_size` columns count; `shared` is the
    buffer of their gradient where several losses write it."""

    logits: Tensor
    vocab_size: int
    shared: SharedGradient | None = None

    @property
    def positions(self) -> tuple[int, int]:
        return self.logits.shape[0], self.logits.shape[1]

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.logits,)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> LogitRows:
        return replace(self, logits=tensors[0])

    def rows_at_once(self, width: int) -> int:
        return 1

    def rows(self, index: Tensor, columns: Tensor | None = None) -> Tensor:
        flat = self.logits.flatten(0, 1)[:, : self.vocab_size].index_select(0, index)
        return upcast(flat if columns is None else flat.index_select(1, columns))

    def new_grads(self, needed: tuple[bool, ...]) -> list[Tensor | None]:
        return zero_grads(self.tensors(), needed)

    def add_grads(
        self, grads: list[Tensor | None], index: Tensor, columns: Tensor | None, grad: Tensor
    ) -> None:
        assert grads[0] is not None
        flat = grads[0].view(-1, grads[0].shape[-1])
        if columns is None:
            whole = flat[:, : self.vocab_size]
            if self.vocab_size >= _WIDE and readable(whole) and readable(index):
                for row, found in zip(index.tolist(), grad.unbind(), strict=True):
                    whole[row].add_(found.to(flat.dtype))
            else:
                whole.index_add_(0, index, grad.to(flat.dtype))
        elif self.shared is None:
            # A loss may read a row in one block only, so a plain write is enough.
            flat[index[:, None], columns] = grad.to(flat.dtype)
        else:
            flat[index[:, None], columns] += grad.to(flat.dtype)
