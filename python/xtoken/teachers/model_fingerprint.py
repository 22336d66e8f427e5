"""What a model's predictions depend on, as one digest."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from xtoken.teachers.offloaded import tensor_of

# What a config says of files, of how it was loaded, and of text; no prediction depends on it.
_OF_NO_PREDICTION = frozenset(
    {
        *("architectures", "dtype", "torch_dtype", "transformers_version", "attn_implementation"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "use_cache"),
        *("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"),
    }
)


def model_fingerprint(model: nn.Module) -> str:
    """A hex digest of all parameters and buffers (name, dtype, shape, bytes), and of what the
    config of a transformers model says otherwise than its class: the base of its positions, a
    softcap, a window; of adapters of peft theirs.

    Raises:
        ModelSourceError: it has weights on the meta device that accelerate does not keep elsewhere.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        data = tensor_of(model, name, value).contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().data)
    adapters: dict[str, Any] = getattr(model, "peft_config", {})
    for config in (getattr(model, "config", None), *(adapters[name] for name in sorted(adapters))):
        digest.update(_config_text(config).encode())
    return digest.hexdigest()


def _config_text(config: Any) -> str:
    if not hasattr(config, "to_dict"):
        return ""
    # Without the defaults, as a new version of transformers may know more of them.
    try:
        defaults = type(config)().to_dict()
    except Exception:  # of a class that cannot be made without arguments
        defaults = {}
    return json.dumps(_other(config.to_dict(), defaults), sort_keys=True, default=_plain)


def _other(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The values that are not the defaults."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        default = defaults.get(name)
        if str(name).startswith("_") or name in _OF_NO_PREDICTION or value == default:
            continue
        if isinstance(value, dict):
            value = _other(value, default if isinstance(default, dict) else {})
        found[str(name)] = value
    return found


def _plain(value: object) -> object:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
