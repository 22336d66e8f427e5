"""Gradients by finite differences."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

STEP = 1e-6


def gradcheck(
    function: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    *,
    constant: bool = False,
    **options: float,
) -> bool:
    """torch's, with differences of values that no gradient is asked of: a loss computes that with
    its value. Both values are compared at the inputs.

    Numbers whose gradient is 0, as padding's, take their steps at once, each in a direction of its
    own: the value may differ in its last bits. Torch asks for two values for each.

    Args:
        constant: whether no number has a gradient.
    """
    value = function(*inputs)
    gradients = torch.autograd.grad(value, inputs)
    moving = [gradient != 0 for gradient in gradients]
    with torch.no_grad():
        torch.testing.assert_close(function(*inputs), value.detach(), rtol=1e-12, atol=1e-14)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            signs = (2 * torch.randint(0, 2, x.shape, generator=generator) - 1 for x in inputs)
            steps = (STEP * sign.masked_fill(at, 0) for sign, at in zip(signs, moving, strict=True))
            there = function(*(x + step for x, step in zip(inputs, steps, strict=True)))
            torch.testing.assert_close(there, value.detach(), rtol=1e-14, atol=1e-14)
    assert all(at.any() != constant for at in moving), "no number has a gradient"
    if constant:
        return True

    def of_moving(*numbers: Tensor) -> Tensor:
        given = zip(inputs, moving, numbers, strict=True)
        return function(*(x.detach().masked_scatter(at, some) for x, at, some in given))

    numbers = (x.detach()[at].requires_grad_() for x, at in zip(inputs, moving, strict=True))
    module = sys.modules["torch.autograd.gradcheck"]
    differences = module.get_numerical_jacobian_wrt_specific_input
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, differences.__name__, torch.no_grad()(differences))
        return torch.autograd.gradcheck(of_moving, tuple(numbers), **options)
