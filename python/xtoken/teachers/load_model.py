"""Causal language models from a directory or the hub, refused where tensors are missing."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xtoken.errors import ModelSourceError


def load_causal_lm(
    source: Path | str,
    *,
    side: str,
    dtype: torch.dtype | str = torch.float32,
    **options: object,
) -> nn.Module:
    """A model with `transformers`, whose every tensor comes from its files.

    Args:
        source: a directory that `save_pretrained` wrote, or the name of a model on the hub.
        side: `student` or `teacher`, for messages.
        dtype: of the weights; `auto` for that of the files.
        options: of `from_pretrained`.

    Raises:
        ModelSourceError: there is none, or tensors are missing or of another shape: transformers
            would fill them with random numbers.
    """
    from transformers import AutoModelForCausalLM

    try:
        # Through Any: transformers declares the model alone.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, **options
        )
    # transformers raises many kinds here, from OSError to safetensors' own class.
    except Exception as error:
        raise ModelSourceError(
            f"{side} {source} has no model that transformers can load "
            f"({' '.join(str(error).split())}); pass a directory with one, saved by "
            "model.save_pretrained, or a hub name"
        ) from error
    model: nn.Module = loaded[0]
    found: dict[str, Any] = loaded[1]
    lacking = [*found.get("missing_keys", ()), *map(_name, found.get("mismatched_keys", ()))]
    if lacking:
        raise ModelSourceError(
            f"{side} {source} lacks {len(lacking)} tensors of its architecture "
            f"({_first(lacking)}), which would be random; copy the checkpoint again, or save it "
            "with model.save_pretrained"
        )
    foreign = list(found.get("unexpected_keys", ()))
    if foreign:
        warnings.warn(
            f"{side} {source} holds {len(foreign)} tensors that its architecture does not use "
            f"({_first(foreign)})",
            stacklevel=2,
        )
    return model


def _name(entry: object) -> str:
    return str(entry[0] if isinstance(entry, tuple) else entry)


def _first(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (", …" if len(ordered) > 3 else "")
