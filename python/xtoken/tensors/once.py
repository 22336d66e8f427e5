"""Backward passes that are written by hand, and have no derivative of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from xtoken.errors import BackwardError

_Backward = Callable[..., tuple[Any, ...]]


def once_differentiable(backward: _Backward) -> _Backward:
    """The `backward` of an autograd function, whose gradients cannot be differentiated again.

    torch's own asks only whether what comes in has a graph, and so lets the gradient of a loss pass
    for a constant.
    """

    @wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        again = torch.is_grad_enabled()
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not again:
            return found
        graph = [
            each
            for each in (*grads, *ctx.saved_tensors)
            if isinstance(each, Tensor) and each.requires_grad
        ]
        # `backward` reaches it through a leaf of its own too.
        graph = graph or [torch.zeros((), requires_grad=True)]
        return tuple(
            _Refusing.apply(each, *graph) if isinstance(each, Tensor) else each for each in found
        )

    return once


class _Refusing(torch.autograd.Function):
    """What it is given, in a graph that refuses to be followed."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *graph: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise BackwardError(
            "the gradient of a loss of xtoken is to be differentiated (create_graph=True), and has "
            "no derivative; leave such a penalty out, or take it of a loss that torch computes"
        )
