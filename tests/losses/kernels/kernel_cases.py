"""What the tests of kernels share; they run in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from xtoken.losses.kernels import choice, launch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@contextmanager
def kernels(*names: str) -> Iterator[None]:
    """Kernels inside; the test fails where others are taken than those of these names."""
    taken, before = [], choice.takes

    def takes(*arguments: object) -> bool:
        answer = before(*arguments)  # type: ignore[arg-type]
        if answer:
            taken.append(arguments[0])
        return answer

    modules = [m for n, m in list(sys.modules.items()) if "losses.kernels" in n]
    with pytest.MonkeyPatch.context() as patch, choice.forced("triton"):
        for module in modules:
            if hasattr(module, "takes"):
                patch.setattr(module, "takes", takes)
        yield
    assert set(taken) == set(names)


def gradient_of(loss: Tensor, logits: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, logits)
    return grad


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, writes: int = 1) -> None:
    """Within the rounding of `dtype`, and of float32 sums; a sum of several writes is rounded by
    its largest part."""
    eps = torch.finfo(dtype).eps
    scale = float(expected.detach().abs().max().clamp(min=1e-6))
    torch.testing.assert_close(
        found.detach().double(),
        expected.detach().double(),
        rtol=max(eps, 2e-5),
        atol=max(2e-5, (writes - 1) * eps / 2) * scale,
    )


def strided(logits: Tensor) -> Tensor:
    """The same values in a tensor whose columns and rows lie apart."""
    batch, length, size = logits.shape
    wide = torch.full((length, 2 * size, batch + 1), torch.nan, dtype=logits.dtype)
    view = wide.permute(2, 0, 1)[1:, :, ::2]
    view.copy_(logits.detach())
    return view


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small rows in many blocks and parts."""
    monkeypatch.setattr(launch, "BLOCK", 16)
    monkeypatch.setattr(launch, "SPAN", 32)
