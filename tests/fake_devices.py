"""The devices of fake tensors, on which a look at a value fails."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def _makes_fake_cuda() -> bool:
    try:
        with FakeTensorMode() as mode:
            mode.from_tensor(torch.zeros(1)).to("cuda")
    except RuntimeError:
        return False
    return True


# Torch 2.6 asks the driver for it, also where the tensor is a fake.
_without_driver = pytest.mark.skipif(
    not _makes_fake_cuda(), reason="this torch makes no fake CUDA tensor without a driver"
)
FAKE_DEVICES = ["cpu", pytest.param("cuda", marks=_without_driver)]
