"""The token ids that a model's configurations hold, set to those of another tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from xtoken._core import Vocab

# Set from the vocabulary; whatever else names a token is of the old tokenizer.
_ROLES = ("bos", "eos", "pad")
_OTHER_IDS = (
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "sequence_bias",
    "forced_decoder_ids",
)


def set_token_ids(model: Any, vocab: Vocab) -> tuple[str, ...]:
    """Set the ids of special tokens in `config` and `generation_config`, and take out other ids.

    The generation config stops at all that stops the new side. An id of a token that has no place
    in the new tokenizer becomes None.

    Returns: what changed, in words.
    """
    ids: dict[str, int | list[int] | None] = {
        f"{role}_token_id": vocab.roles.get(role) for role in _ROLES
    }
    stops = list(vocab.stops)
    changed: list[str] = []
    configs = {"config": model.config, "text_config": model.config.get_text_config()}
    if configs["text_config"] is configs["config"]:
        del configs["text_config"]
    for name, config in configs.items():
        changed += _set(name, config, ids, vocab.roles)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        eos = ids["eos_token_id"]
        if len(stops) > 1:
            eos = [*([eos] if isinstance(eos, int) else []), *(s for s in stops if s != eos)]
        changed += _set("generation_config", generation, {**ids, "eos_token_id": eos}, vocab.roles)
    return tuple(changed)


def _set(
    name: str, config: Any, ids: dict[str, int | list[int] | None], roles: dict[str, int]
) -> Iterator[str]:
    values = dict(ids)
    for key, value in config.to_dict().items():
        named = key.endswith(("_token_id", "_token_index")) or key in _OTHER_IDS
        if named and key not in values and value is not None:
            values[key] = roles.get(key.removesuffix("_token_id"))
    for key, value in values.items():
        before = getattr(config, key, None)
        setattr(config, key, value)
        if before != value:
            yield f"{name}.{key}: {before} -> {value}"
