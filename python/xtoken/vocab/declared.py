"""What the configuration beside a tokenizer's file declares of its special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from xtoken._checks import half_character
from xtoken._files import JsonValue, read_json
from xtoken.errors import FormatError

# In the order in which transformers adds those that a file lacks.
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Tokens that transformers declares by the class alone (5.24), and that files of that class hold.
_CLASS_DEFAULTS: Mapping[str, Mapping[str, JsonValue]] = {
    "GemmaTokenizer": {
        "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}  # fmt: skip


def read_config(directory: Path) -> Mapping[str, JsonValue]:
    """What `AutoTokenizer` would know of the special tokens beside the tokenizer's file.

    Raises:
        FormatError: a file is not JSON.
    """
    config = _read_object(directory / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # as older releases of transformers saved it
        config = {**_read_object(directory / "special_tokens_map.json"), **config}
    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    return {**_CLASS_DEFAULTS.get(name, {}), **config}


def declared_tokens(config: Mapping[str, JsonValue]) -> list[tuple[str, bool | None]]:
    """The tokens that a configuration declares, and whether each is a control token.

    None stands for one, unless the tokenizer's file adds it as text: so transformers takes its list
    of more special tokens, but those that have names of their own it makes special in any case.
    """
    declared: dict[str, bool | None] = {}
    listed = config.get("added_tokens_decoder")
    if isinstance(listed, dict):
        for _, entry in sorted(listed.items(), key=lambda item: _as_number(item[0])):
            if isinstance(entry, dict) and (text := token_text(entry)):
                declared[text] = entry.get("special") is True
    named = [config.get(f"{name}_token") for name in _NAMED]
    others: list[JsonValue] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = config.get(key)
        if isinstance(tokens, dict):
            named += tokens.values()
        elif isinstance(tokens, list):
            others += tokens
    declared |= {text: True for token in named if (text := token_text(token))}
    for token in others:
        if text := token_text(token):
            declared.setdefault(text, None)
    return list(declared.items())


def token_text(token: JsonValue) -> str | None:
    """The text of a token as configurations write it: alone, or with how it is matched.

    Raises:
        FormatError: it is no Unicode text.
    """
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        return None
    fault = half_character(text)
    if fault is not None:
        raise FormatError(f"a token {text[:40]!r} of the tokenizer configuration {fault}")
    return text


def _read_object(file: Path) -> dict[str, JsonValue]:
    if not file.is_file():
        return {}
    config = read_json(file, "tokenizer configuration")
    return config if isinstance(config, dict) else {}


def _as_number(key: str) -> int:
    return int(key) if key.isdecimal() and len(key) < 12 else 1 << 40
