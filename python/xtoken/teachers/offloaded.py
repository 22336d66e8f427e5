"""Models of which accelerate keeps weights elsewhere, and tensors without numbers here."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xtoken.errors import ModelSourceError


def working_device(model: nn.Module) -> torch.device:
    """Where a model takes its tokens: that of its weights or, where all are elsewhere, the one that
    accelerate brings them to. The meta device where nothing brings them, the CPU without any."""
    any_there = False
    for parameter in model.parameters():
        if not parameter.is_meta:
            return parameter.device
        any_there = True
    for module in model.modules():
        place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if place is not None:
            return torch.device(place)
    return torch.device("meta" if any_there else "cpu")


def tensor_of(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """A parameter or buffer with its numbers, on the CPU, wherever accelerate keeps it.

    Args:
        name: as in the state dict.
        value: what the model has there.

    Raises:
        ModelSourceError: it was never loaded.
    """
    if not value.is_meta:
        return value.detach().cpu()
    from accelerate.utils import (  # type: ignore[import-untyped]
        align_module_device,
        has_offloaded_params,
    )

    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if not has_offloaded_params(module):
        raise not_loaded(model, name)
    with align_module_device(module, "cpu"):
        found: Tensor = getattr(module, leaf).detach().clone()
    return found


def not_loaded(model: nn.Module, name: str) -> ModelSourceError:
    """The error of a model whose tensors have no numbers."""
    return ModelSourceError(
        f"{name} of the model {type(model).__name__} is on the meta device, without numbers; load "
        "the weights, with from_pretrained"
    )
