"""Which Python objects and files are tokenizers, and how each becomes a `Vocab`."""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtoken._core import Vocab
from xtoken.errors import FormatError

if TYPE_CHECKING:
    from os import PathLike

_ROLES = ("bos", "eos", "pad", "unk")
_DIRECTORY_FILES = ("tokenizer.json", "tokenizer.json.xz", "tekken.json")


def read_tokenizer(tokenizer: Any) -> Vocab:
    """The vocabulary of a tokenizer object or path; see `Vocab.from_tokenizer`."""
    if isinstance(tokenizer, Vocab):
        return tokenizer
    if isinstance(tokenizer, str | Path):
        return read_path(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # a transformers fast tokenizer
        return Vocab.from_tokenizer_json(
            backend.to_str().encode(), from_memory=True, roles=_declared_roles(tokenizer)
        )
    if hasattr(tokenizer, "to_str"):  # tokenizers.Tokenizer
        return Vocab.from_tokenizer_json(tokenizer.to_str().encode(), from_memory=True)
    if hasattr(tokenizer, "token_byte_values"):  # tiktoken.Encoding
        return _read_tiktoken_encoding(tokenizer)
    raise TypeError(
        f"{type(tokenizer).__name__} is not a tokenizer that can be read; expected a transformers "
        "fast tokenizer (use_fast=True), a tokenizers.Tokenizer, a tiktoken.Encoding or a path"
    )


def read_path(path: str | PathLike[str]) -> Vocab:
    """The vocabulary in a directory or file; see `Vocab.from_path`."""
    file, content = read_content(path)
    return _read_file(file, content, _read_config(file.parent) if Path(path).is_dir() else {})


def read_content(path: str | PathLike[str]) -> tuple[Path, bytes]:
    """A tokenizer's file, that of a directory if it is one, and what it holds, unpacked.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: a packed file is not whole.
    """
    path = Path(path)
    if path.is_dir():
        file = next((path / name for name in _DIRECTORY_FILES if (path / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(
                f"{path} holds none of {', '.join(_DIRECTORY_FILES)}; save the tokenizer there "
                "with save_pretrained, or pass the file"
            )
        path = file
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected a directory or file of a tokenizer"
        )
    content = path.read_bytes()
    if path.suffix == ".xz":
        try:
            content = lzma.decompress(content)
        except lzma.LZMAError as error:
            raise FormatError(f"{path} is not a whole xz file: {error}; copy it again") from error
    return path, content


def _read_file(path: Path, content: bytes, config: Mapping[str, Any]) -> Vocab:
    if content.lstrip()[:1] == b"{":
        # Only tekken names the size that it is cut to.
        read = (
            Vocab.from_tekken if b'"default_vocab_size"' in content else Vocab.from_tokenizer_json
        )
        vocab = read(content)
        declared = {role: _special_id(vocab, config.get(f"{role}_token")) for role in _ROLES}
        return vocab.with_roles({role: i for role, i in declared.items() if i is not None})
    if content[:1] == b"\n" or not content[:16].isascii():
        raise FormatError(
            f"{path} looks like a SentencePiece model, which carries no fast tokenizer; convert it "
            "once with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    return Vocab.from_tiktoken(content, {})


def _read_config(directory: Path) -> Mapping[str, Any]:
    file = directory / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{file} is not JSON: {error}; save the tokenizer again") from error
    return config if isinstance(config, dict) else {}


def _special_id(vocab: Vocab, token: Any) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return next((i for i, special in vocab.special_tokens.items() if special == text), None)


def _declared_roles(tokenizer: Any) -> dict[str, int | None]:
    ids = {role: getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES}
    return {role: token_id for role, token_id in ids.items() if token_id is not None}


def _read_tiktoken_encoding(encoding: Any) -> Vocab:
    ranks: dict[bytes, int] = encoding._mergeable_ranks
    specials: dict[str, int] = encoding._special_tokens
    size = max([*ranks.values(), *specials.values()]) + 1
    tokens = [b""] * size
    for token, rank in ranks.items():
        tokens[rank] = token
    special_tokens = {token_id: text for text, token_id in specials.items()}
    return Vocab.from_tokens(tokens, special_tokens, ranked=True)
