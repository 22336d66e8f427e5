"""The token ids that a model's configurations hold, set to those of another tokenizer."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from xtoken._core import Vocab
from xtoken.errors import ModelSourceError

# Set from the vocabulary; whatever else names a token is of the old tokenizer.
_ROLES = ("bos", "eos", "pad")
_OTHER_IDS = (
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "sequence_bias",
    "forced_decoder_ids",
)

Ids = dict[str, int | list[int] | None]


@dataclass(frozen=True)
class NewIds:
    """The ids of a model under another tokenizer, not set yet; each configuration takes them.

    Attributes:
        values: name of a configuration, the configuration, its new ids by key.
        kept: ids that stay though the new tokenizer has no such token, such as
            `config.image_token_id: 151655`: their configuration wants a number.
    """

    values: tuple[tuple[str, Any, Ids], ...]
    kept: tuple[str, ...]

    def set(self) -> tuple[str, ...]:
        """Set them; returns what changed, in words."""
        changed: list[str] = []
        for name, config, values in self.values:
            for key, value in values.items():
                before = getattr(config, key, None)
                setattr(config, key, value)
                if before != value:
                    changed.append(f"{name}.{key}: {before} -> {value}")
        return tuple(changed)


def new_token_ids(model: Any, vocab: Vocab) -> NewIds:
    """The ids of special tokens in `config` and `generation_config`, and no other ids.

    The generation config stops at all that stops the new side. An id of a token that has no place
    in the new tokenizer becomes None, where its configuration takes that.

    Raises:
        ModelSourceError: a configuration does not take one; nothing has changed then.
    """
    ids: Ids = {f"{role}_token_id": vocab.roles.get(role) for role in _ROLES}
    stops = list(vocab.stops)
    configs = [("config", model.config, ids)]
    text_config = model.config.get_text_config()
    if text_config is not model.config:
        configs.append(("text_config", text_config, ids))
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        eos = ids["eos_token_id"]
        if len(stops) > 1:
            eos = [*([eos] if isinstance(eos, int) else []), *(s for s in stops if s != eos)]
        configs.append(("generation_config", generation, {**ids, "eos_token_id": eos}))
    values: list[tuple[str, Any, Ids]] = []
    kept: list[str] = []
    for name, config, wanted in configs:
        wanted = wanted | _others(config, vocab.roles)
        refused = _refused(config, wanted)
        values.append((name, config, {key: wanted[key] for key in wanted if key not in refused}))
        kept += [f"{name}.{key}: {old}" for key, old in refused.items() if old is not None]
    return NewIds(tuple(values), tuple(kept))


def _others(config: Any, roles: dict[str, int]) -> Ids:
    """The further ids that a configuration holds."""
    known = [f"{role}_token_id" for role in _ROLES]
    return {
        key: roles.get(key.removesuffix("_token_id"))
        for key, value in config.to_dict().items()
        if key.endswith(("_token_id", "_token_index")) or key in _OTHER_IDS
        if key not in known and value is not None
    }


def _refused(config: Any, ids: Ids) -> Ids:
    """The old values of the keys that a configuration wants a number for, tried on a copy."""
    trial = copy.deepcopy(config)
    found: Ids = {}
    for key, value in ids.items():
        try:
            setattr(trial, key, value)
        # Strict classes of huggingface_hub raise their own; code from the hub what it likes.
        except Exception as error:
            old = getattr(config, key, None)
            reason = " ".join(str(error).split())
            if value is not None:
                raise ModelSourceError(
                    f"{type(config).__name__} does not take {key} = {value} ({reason}); set that "
                    "special token of the new tokenizer to one that it takes"
                ) from error
            if key == "pad_token_id" and old is not None:
                # The old row would be some token's, and learn nothing, or not be there.
                raise ModelSourceError(
                    f"{type(config).__name__} needs a pad_token_id, which the new tokenizer has "
                    "not; give it one: tokenizer.add_special_tokens({'pad_token': '<pad>'})"
                ) from error
            found[key] = old
    return found
