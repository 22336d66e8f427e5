"""What the losses by the core have in common: tensors as arrays, and a gradient's rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.tensors.host import readable

DTYPES = (torch.float32, torch.float64)


def flat(tensor: Tensor) -> NDArray[Any]:
    """[B, T, V] in one piece as rows; shares memory."""
    return tensor.view(-1, tensor.shape[-1]).numpy()


def suits(logits: Tensor) -> bool:
    """Whether the core reads these logits where they lie."""
    return readable(logits) and logits.dtype in DTYPES and logits.is_contiguous()


def gradient_of(
    logits: Tensor, needed: tuple[bool, ...], grads: list[Tensor | None] | None
) -> Tensor | None:
    """The gradient that a pass adds to, or room for one that it writes; None where none is
    needed."""
    if grads is not None:
        return grads[0]
    if not needed[0]:
        return None
    # numpy asks for large pages, whose first touch costs a fifth of the whole loss less.
    return torch.from_numpy(
        np.empty(logits.shape, "float32" if logits.dtype == torch.float32 else "float64")
    )


def zero_others(gradient: Tensor, written: NDArray[np.int64]) -> None:
    """Zero the rows that nobody wrote, and no row twice."""
    rest = np.ones(gradient.shape[0] * gradient.shape[1], np.bool_)
    rest[written] = False
    flat(gradient)[rest] = 0.0
