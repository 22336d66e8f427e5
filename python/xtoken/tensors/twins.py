"""Modules that share their tensors until one of them moves."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

Leaf = TypeVar("Leaf", bound=nn.Module)


def twin(module: Leaf) -> Leaf:
    """A module without parameters and submodules once more: the tensors are the same, and `to`
    moves one of the two alone.

    >>> import torch
    >>> fixed = nn.Module()
    >>> fixed.register_buffer("ids", torch.arange(3))
    >>> twin(fixed).to("meta").ids.device, fixed.ids.device
    (device(type='meta'), device(type='cpu'))
    """
    made = copy.copy(module)
    for name, value in vars(nn.Module()).items():
        if isinstance(value, dict):  # buffers, hooks
            vars(made)[name] = vars(module)[name].copy()
    return made
