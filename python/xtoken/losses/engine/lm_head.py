"""The fused losses' input: hidden states and an lm_head, of which logits are made by the block."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xtoken.errors import OptionError, ShapeError
from xtoken.losses.engine.student_rows import zero_grads

# Chosen columns of an lm_head copied at a time: 8 MB of float32 weights at 2,048 features.
_TILE = 1024

_HALVES = (torch.float16, torch.bfloat16)
# A product of 16-bit numbers that is given in float32 as it was summed; on GPUs, from torch 2.8 on.
_HAS_OUT_DTYPE = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 8)


@dataclass(frozen=True, eq=False)
class LmHead:
    """Hidden states and the lm_head that would turn them into logits: the fused losses' input.

    logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap), made a block of rows at a
    time and never kept. Pass it wherever a loss takes `student_logits`.

    Attributes:
        hidden: [B, T_s, H] float, the last hidden states, after the final norm.
        weight: [V_s', H] float.
        bias: [V_s'] float or None.
        scale: factor on the logits (Cohere's logit_scale; 1 / Granite's logits_scaling).
        softcap: Gemma-2's final_logit_softcapping, > 0, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.hidden.dim() != 3 or self.weight.dim() != 2:
            raise ShapeError(
                f"hidden {tuple(self.hidden.shape)} and weight {tuple(self.weight.shape)}: "
                "expected [B, T_s, H] and [V_s, H]"
            )
        if self.hidden.shape[2] != self.weight.shape[1]:
            raise ShapeError(
                f"hidden has {self.hidden.shape[2]} features, weight {self.weight.shape[1]}; "
                "pass the lm_head of the model that made the hidden states"
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ShapeError(
                f"bias has shape {tuple(self.bias.shape)}, expected ({self.weight.shape[0]},)"
            )
        if self.softcap is not None and not self.softcap > 0:
            raise OptionError(f"softcap = {self.softcap} must be above 0, or None for no cap")


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

    def _tiles(self, columns: Tensor | None) -> list[Tensor | slice]:
        """Columns of the lm_head that are worked on together: a chosen column's weights are
        copied, and the copy is kept small; all of them are used in place."""
        if columns is None:
            return [slice(0, self.vocab_size)]
        return list(torch.split(columns, _TILE))

    def rows(self, index: Tensor, columns: Tensor | None = None) -> Tensor:
        head = self.head
        hidden = head.hidden.flatten(0, 1).index_select(0, index)
        parts = []
        for tile in self._tiles(columns):
            part = _product(hidden, head.weight[tile].t())
            parts.append(part if head.bias is None else part + head.bias[tile].to(part.dtype))
        raw = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if head.scale != 1.0:
            raw = raw * head.scale
        return raw if head.softcap is None else head.softcap * torch.tanh(raw / head.softcap)

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
        for tile in self._tiles(columns):
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


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32 or float64: logits rounded to 16 bits would change the gradient of a
    small KL by a fifth."""
    both = left.dtype if left.dtype == right.dtype else None
    if both in _HALVES and left.device.type == "cuda" and _HAS_OUT_DTYPE:
        return torch.mm(left, right, out_dtype=torch.float32)
    wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    return left.to(wide) @ right.to(wide)


def _gradient_product(grad: Tensor, other: Tensor) -> Tensor:
    """grad @ other; on a GPU in the other's 16 bits, whose rounding stays relative here."""
    if other.dtype in _HALVES and grad.device.type == "cuda":
        return grad.to(other.dtype) @ other
    return _product(grad, other)


def _add_product(target: Tensor, tile: Tensor | slice, left: Tensor, right: Tensor) -> None:
    """target[tile] += left @ right, in place."""
    if isinstance(tile, Tensor):
        target.index_add_(0, tile, _gradient_product(left, right).to(target.dtype))
    elif left.dtype == target.dtype == right.dtype or target.device.type == "cuda":
        target[tile].addmm_(left.to(target.dtype), right.to(target.dtype))
    else:
        target[tile] += _product(left, right).to(target.dtype)
