"""A student given by hidden states and an lm_head: logits by the block, and their gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from xtoken.losses.engine.student_rows import zero_grads
from xtoken.tensors.lm_head import HALVES, LmHead, head_tiles, product


@dataclass(frozen=True, eq=False)
class LmHeadRows:
    """Rows of logits made from an `LmHead` on demand."""

    head: LmHead
    vocab_size: int

    @property
    def shared(self) -> None:
        """Each loss has its own gradient."""
        return None

    @property
    def positions(self) -> tuple[int, int]:
        return self.head.hidden.shape[0], self.head.hidden.shape[1]

    def tensors(self) -> tuple[Tensor, ...]:
        head = self.head
        return (head.hidden, head.weight) + (() if head.bias is None else (head.bias,))

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> LmHeadRows:
        bias = tensors[2] if len(tensors) == 3 else None
        return replace(
            self, head=replace(self.head, hidden=tensors[0], weight=tensors[1], bias=bias)
        )

    def rows_at_once(self, width: int) -> int:
        # The whole weight, and the gradient it gets, are read once for these rows.
        numbers = 3 * 2**22 if self.head.hidden.device.type == "cpu" else 2**26
        return max(1, numbers // max(width, 1))

    def rows(self, index: Tensor, columns: Tensor | None = None) -> Tensor:
        return self.head.rows(index, columns, width=self.vocab_size)

    def new_grads(self, needed: tuple[bool, ...]) -> list[Tensor | None]:
        return zero_grads(self.tensors(), needed)

    def add_grads(
        self, grads: list[Tensor | None], index: Tensor, columns: Tensor | None, grad: Tensor
    ) -> None:
        head = self.head
        if head.softcap is not None:  # d/dx cap * tanh(x / cap) = 1 - (y / cap)^2
            logits = self.rows(index, columns)
            grad = grad * (1.0 - (logits / head.softcap).square())
        if head.scale != 1.0:
            grad = grad * head.scale
        hidden = head.hidden.flatten(0, 1).index_select(0, index)
        grad_hidden, grad_weight = grads[0], grads[1]
        grad_bias = grads[2] if len(grads) == 3 else None
        done = 0
        for tile in head_tiles(columns, self.vocab_size):
            weight = head.weight[tile]
            part = grad[:, done : done + len(weight)]
            done += len(weight)
            if grad_hidden is not None:
                flat = grad_hidden.view(-1, grad_hidden.shape[-1])
                flat.index_add_(0, index, _gradient_product(part, weight).to(flat.dtype))
            if grad_weight is not None:
                _add_product(grad_weight, tile, part.t(), hidden)
            if grad_bias is not None:
                grad_bias[tile] += part.sum(0).to(grad_bias.dtype)


def _gradient_product(grad: Tensor, other: Tensor) -> Tensor:
    """grad @ other; on a GPU in the other's 16 bits, whose rounding stays relative here."""
    if other.dtype in HALVES and grad.device.type == "cuda":
        return grad.to(other.dtype) @ other
    return product(grad, other)


def _add_product(target: Tensor, tile: Tensor | slice, left: Tensor, right: Tensor) -> None:
    """target[tile] += left @ right, in place."""
    if isinstance(tile, Tensor):
        target.index_add_(0, tile, _gradient_product(left, right).to(target.dtype))
    elif left.dtype == target.dtype == right.dtype or target.device.type == "cuda":
        target[tile].addmm_(left.to(target.dtype), right.to(target.dtype))
    else:
        target[tile] += product(left, right).to(target.dtype)
