"""Gradients by finite differences."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def gradcheck(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], **options: float
) -> bool:
    """torch's, with differences of values that no gradient is asked of: a loss computes that with
    its value. Both values are compared at the inputs."""
    value = function(*inputs).detach()
    with torch.no_grad():
        torch.testing.assert_close(function(*inputs), value, rtol=1e-12, atol=1e-14)
    module = sys.modules["torch.autograd.gradcheck"]
    differences = module.get_numerical_jacobian_wrt_specific_input
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, differences.__name__, torch.no_grad()(differences))
        return torch.autograd.gradcheck(function, inputs, **options)
