"""A loss's block function under torch.compile, in constant shapes: compiled once for all batches.

The loop over blocks stays eager, and each block is filled up to one number of rows and of chunks;
what fills up does not count. What has another length in every batch beside them (items of a trie,
chosen columns) is one symbol to the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from xtoken.losses.engine.places import Places, of_any_length
from xtoken.losses.engine.row_blocks import Block, BlockLoss, Later, seed_like
from xtoken.losses.engine.shared_gradient import CrossEntropyRows
from xtoken.losses.engine.student_rows import StudentRows


def with_compiled(loss: BlockLoss, backend: str | None, rows_per_block: int) -> BlockLoss:
    """The loss, its block function compiled by a backend of `torch.compile`; None leaves it."""
    return loss if backend is None else CompiledBlocks(loss, backend, rows_per_block)


@dataclass(eq=False)
class CompiledBlocks(BlockLoss):
    """A loss whose block function is compiled.

    Attributes:
        inner: the loss.
        backend: of `torch.compile`.
        rows_per_block: rows of a block.
    """

    inner: BlockLoss
    backend: str
    rows_per_block: int

    def __post_init__(self) -> None:
        inner = self.inner
        self.student, self.columns, self.params = inner.student, inner.columns, inner.params
        self.weights, self.metric_names, self.late = inner.weights, inner.metric_names, inner.late

    def by_kernel(
        self,
        source: StudentRows,
        scale: float | Tensor,
        needed: tuple[bool, ...],
        grads: list[Tensor | None] | None,
    ) -> tuple[Tensor, Tensor, list[Tensor | None]] | None:
        """As `BlockLoss`: a kernel needs no compiler."""
        self.inner.weights = self.weights
        return self.inner.by_kernel(source, scale, needed, grads)

    def in_two(
        self, source: StudentRows, scale: float | Tensor
    ) -> tuple[Tensor, Tensor, Later] | None:
        """As `BlockLoss`."""
        self.inner.weights = self.weights
        return self.inner.in_two(source, scale)

    def cross_entropy_rows(self, factor: Tensor) -> CrossEntropyRows | None:
        """As `BlockLoss`."""
        return self.inner.cross_entropy_rows(factor)

    def value(self, rows: Tensor, block: Block, params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As `BlockLoss`."""
        loss, filled, inner = self._narrowed(rows, block)
        params = [self._marked(at, param.detach()) for at, param in enumerate(params)]
        total: tuple[Tensor, Tensor] = self._function(_total, filled)(loss, filled, inner, params)
        return total

    def value_and_grad(
        self,
        rows: Tensor,
        block: Block,
        params: Sequence[Tensor],
        needed: Sequence[bool],
        scale: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
        """As `BlockLoss`."""
        loss, filled, inner = self._narrowed(rows, block)
        count = len(rows)
        factor = seed_like(rows.new_empty(()), scale)
        if loss.has_closed_form:
            function = self._function(_value_and_grad, filled)
            params = [self._marked(at, param.detach()) for at, param in enumerate(params)]
            # Of a float64 scalar the compiler reads the value, and traces twice.
            vector = factor[None]
            value, metrics, grad, more = function(loss, filled, inner, params, needed, vector)
            return value, metrics, grad[:count], more
        with torch.enable_grad():
            filled = filled.detach().requires_grad_()
            if self.columns is not None:
                of_any_length(filled, 1)
            leaves = [
                self._marked(at, params[at].detach().requires_grad_(need))
                for at, need in enumerate(needed)
            ]
            total, metrics = self._function(_total, filled)(loss, filled, inner, leaves)
            wanted = [filled, *(leaf for leaf in leaves if leaf.requires_grad)]
            seed = seed_like(total, factor)
            found = iter(torch.autograd.grad(total, wanted, seed, materialize_grads=True))
        grad = next(found)[:count]
        more = [next(found) if leaf.requires_grad else None for leaf in leaves]
        return total.detach(), metrics, grad, more

    def _narrowed(self, rows: Tensor, block: Block) -> tuple[BlockLoss, Tensor, Block]:
        """The loss of a block alone, its rows and the block, in constant shapes."""
        count, size = len(rows), self.rows_per_block
        if self.student.owner is not None or self.inner.has_items:
            while size < count:  # a chunk of more rows than a block
                size *= 2
            size += 1  # one place at least is no chunk's: what fills up items belongs there
        places = Places.of(
            block.start, block.stop, block.segments, count, size, rows.dtype, rows.device
        )
        loss = self.inner.narrowed(places)
        weights = torch.ones_like(places.chunk, dtype=rows.dtype)
        if self.weights is not None:
            weights = places.of_chunks(self.weights).to(rows.dtype)
        # What fills up has no part in the gradient of the params either.
        loss.weights = torch.where(places.real, weights, 0.0)
        filled = torch.nn.functional.pad(rows, (0, 0, 0, size - count)) if count < size else rows
        if self.columns is not None:
            of_any_length(filled, 1)
        return loss, filled, Block(0, size, places.segments, places.real)

    def _marked(self, at: int, param: Tensor) -> Tensor:
        return of_any_length(param) if at in self.inner.params_of_any_length else param

    def _function(self, body: Callable[..., Any], rows: Tensor) -> Callable[..., Any]:
        shape = (len(rows), None if self.columns is not None else rows.shape[1], rows.dtype)
        return _compiled(body, type(self.inner), self.backend, shape)


def _total(
    loss: BlockLoss, rows: Tensor, block: Block, params: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    return loss.total(rows, block, params)


def _value_and_grad(
    loss: BlockLoss,
    rows: Tensor,
    block: Block,
    params: Sequence[Tensor],
    needed: Sequence[bool],
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    return loss.value_and_grad(rows, block, params, needed, scale[0])


_Shape = tuple[int, int | None, torch.dtype]
_made: dict[tuple[str, type, str, _Shape], Callable[..., Any]] = {}


def _compiled(
    body: Callable[..., Any], kind: type, backend: str, shape: _Shape
) -> Callable[..., Any]:
    """The body for one class of losses and one shape of rows. Each has code of its own, as the
    compiler counts by code how many variants it has made, and refuses more than a few."""
    assert isinstance(body, FunctionType)
    key = (body.__name__, kind, backend, shape)
    if key not in _made:
        code = body.__code__.replace(co_name=f"{kind.__name__}{body.__name__}")
        own = FunctionType(code, body.__globals__)
        _made[key] = torch.compile(own, backend=backend, dynamic=False, fullgraph=True)
    return _made[key]
