"""A gradient times a factor that only the device knows: read and written only where it is not 1.

The engine imports this, so it imports nothing of the engine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xtoken.losses.kernels.choice import on_device_of, takes

_BLOCK = 4096
_SPAN = 8 * _BLOCK


def scale_in_place(grad: Tensor, factor: Tensor) -> None:
    """`grad *= factor`, a scalar tensor at whose value nobody looks."""
    if grad.is_contiguous() and takes("the gradient's factor", check, grad):
        with on_device_of(grad):
            _launch(grad, factor)
    else:
        grad.mul_(factor.to(grad.dtype))


def _launch(grad: Tensor, factor: Tensor) -> None:
    from xtoken.losses.kernels.device.common import scale_unless_one

    count = grad.numel()
    if count:
        scale_unless_one[(-(-count // _SPAN),)](grad, factor, count, SPAN=_SPAN, BLOCK=_BLOCK)


def check(device: torch.device, student: torch.dtype, teacher: torch.dtype) -> str | None:
    """See `choice.Check`."""
    values = torch.linspace(-2.0, 2.0, 2 * _BLOCK + 7, device=device).to(student)
    for number in (1.0, 0.25):  # exact in every dtype
        found = values.clone()
        _launch(found, torch.full((), number, device=device))
        if not torch.equal(found, values * number):
            return f"values are not {number} times what they were"
    return None
