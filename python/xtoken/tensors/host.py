"""Which tensors can be looked at without waiting, and index arrays made on the host for a device.

A GPU works behind the host: asking it for one number stops the host until all is done. So losses
look at values on the CPU alone, and what they have to know beforehand (ragged lengths, cuts into
blocks) they read from the batch's host copy.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

_blind = False


@contextmanager
def blind() -> Iterator[None]:
    """Treat tensors of the CPU as those of a device, at whose values nobody looks."""
    global _blind
    before, _blind = _blind, True
    try:
        yield
    finally:
        _blind = before


@contextmanager
def ordinary() -> Iterator[None]:
    """What is made here is on the CPU, and of use in training, whatever `torch.set_default_device`
    and `torch.inference_mode` the caller is under. Gradients are made as before.
    """
    grads = torch.is_grad_enabled()
    # Leaving the inference mode would turn gradients on, in the caller's `no_grad` too.
    with torch.inference_mode(False), torch.set_grad_enabled(grads), torch.device("cpu"):
        yield


def readable(tensor: Tensor) -> bool:
    """Whether looking at its values waits for nothing: a real tensor on the CPU, not traced."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or _blind:
        return False
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return fake is None or not isinstance(tensor, fake.FakeTensor)


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A host array on a device, copied without waiting for the device."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda" and torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return (
        tensor
        if device.type == "cpu" and readable(tensor)
        else tensor.to(device, non_blocking=True)
    )
