"""One gradient of the logits for several losses of them.

Each loss would make a gradient as large as the logits, and autograd would add them. Losses of a
`SharedLogits` write into one buffer: the first of them with its value, the others, such as the
cross-entropy, when backward says with which factor. So the buffer serves a weight too that is known
only after all values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xtoken.losses.kernels.scaling import scale_in_place
from xtoken.tensors.host import readable


@dataclass(eq=False)
class SharedGradient:
    """The buffer and what is still to be added to it.

    Attributes:
        early: the gradient of the first loss, made with its value; None once it is given away.
        taken: whether some loss is the first.
    """

    early: Tensor | None = None
    taken: bool = False
    _factor: Tensor | None = None
    _late: list[tuple[int, Callable[[Tensor], None]]] = field(default_factory=list)

    def scale_early(self, factor: Tensor) -> None:
        """The first loss's gradient counts, times `factor`."""
        self._factor = factor

    def add_late(self, order: int, write: Callable[[Tensor], None]) -> None:
        """`write` adds to the buffer, after those of a lower order."""
        self._late.append((order, write))

    def collect(self, like: Tensor) -> Tensor:
        """The whole gradient of the losses that backward has reached."""
        buffer, factor, late = self.early, self._factor, self._late
        self.early, self._factor, self._late = None, None, []
        if buffer is None:
            buffer = torch.zeros_like(like, memory_format=torch.contiguous_format)
        elif factor is None:
            buffer.zero_()
        elif not readable(factor) or float(factor) != 1.0:
            scale_in_place(buffer, factor)
        for _, write in sorted(late, key=lambda entry: entry[0]):
            write(buffer)
        return buffer


@dataclass(frozen=True, eq=False)
class SharedLogits:
    """Logits [B, T_s, V_s'] of which several losses make one gradient."""

    logits: Tensor
    gradient: SharedGradient

    @classmethod
    def of(cls, logits: Tensor) -> SharedLogits:
        """For the losses of one step; the tensor has a graph that leads to `logits`."""
        gradient = SharedGradient()
        shared: Tensor = _Collect.apply(logits, gradient)
        return cls(shared, gradient)


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, gradient: SharedGradient) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradient = gradient
        ctx.save_for_backward(logits)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        found = ctx.gradient.collect(logits)
        return found if grad is None else found + grad, None
