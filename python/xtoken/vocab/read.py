"""Which objects and files are tokenizers, and how each becomes a `Vocab`."""

from __future__ import annotations

import lzma
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from xtoken._core import Vocab
from xtoken._files import JsonValue, path_to_read
from xtoken.errors import (
    ArgumentTypeError,
    FormatError,
    MissingFileError,
    UnsupportedTokenizerError,
)
from xtoken.vocab.declared import declared_tokens, read_config, token_text
from xtoken.vocab.display import special_id
from xtoken.vocab.source import FastTokenizer, SerializableTokenizer, TiktokenEncoding

# The largest vocabularies have a million ids.
_MAX_IDS = 1 << 24
# Where a tokenizer is read from, for messages.
PLACES = "pass a directory or file of a tokenizer, or the name of a model on the hub (owner/model)"
_ROLES = ("bos", "eos", "pad", "unk")
DIRECTORY_FILES = ("tokenizer.json", "tokenizer.json.xz", "tekken.json")
# The largest tokenizers have about 40 MB.
MAX_FILE_BYTES = 256 << 20
# The strongest setting of xz unpacks with 65 MB.
_XZ_MEMORY = 256 << 20


def read_object(tokenizer: FastTokenizer | SerializableTokenizer | TiktokenEncoding) -> Vocab:
    """The vocabulary of a tokenizer object; see `Vocab.from_tokenizer`.

    Raises:
        ArgumentTypeError: it is none that can be read.
        UnsupportedTokenizerError: its tokens cannot be read exactly as bytes.
    """
    if isinstance(tokenizer, FastTokenizer):
        content = _printed(tokenizer.backend_tokenizer)
        return Vocab.from_tokenizer_json(
            content, from_memory=True, roles=_declared_roles(tokenizer)
        )
    if isinstance(tokenizer, SerializableTokenizer):
        return Vocab.from_tokenizer_json(_printed(tokenizer), from_memory=True)
    if isinstance(tokenizer, TiktokenEncoding):
        return _read_tiktoken_encoding(tokenizer)
    raise ArgumentTypeError(
        f"{type(tokenizer).__name__} is not a tokenizer that can be read; expected a transformers "
        "fast tokenizer (use_fast=True), a tokenizers.Tokenizer, a tiktoken.Encoding, a path or a "
        "hub name"
    )


def read_path(path: str | PathLike[str]) -> Vocab:
    """The vocabulary in a directory or file; see `Vocab.from_path`."""
    file, content = read_content(path)
    return _read_file(file, content, read_config(file.parent) if Path(path).is_dir() else {})


def read_content(path: str | PathLike[str]) -> tuple[Path, bytes]:
    """A tokenizer's file, that of a directory if it is one, and what it holds, unpacked.

    Raises:
        ArgumentTypeError: it is no path.
        MissingFileError: there is no such file.
        FormatError: a packed file is not whole, or it is too large for a tokenizer.
    """
    path = path_to_read("the tokenizer", path, PLACES)
    if path.is_dir():
        file = next((path / name for name in DIRECTORY_FILES if (path / name).is_file()), None)
        if file is None:
            raise MissingFileError(
                f"{path} holds none of {', '.join(DIRECTORY_FILES)}; save the tokenizer there "
                "with save_pretrained, or pass the file"
            )
        path = file
    if not path.is_file():
        raise MissingFileError(
            f"{path} does not exist; expected a directory or file of a tokenizer, or the name of a "
            "model on the hub (owner/model)"
        )
    if path.stat().st_size > MAX_FILE_BYTES:
        raise _too_large(path, "has")
    content = path.read_bytes()
    return path, _unpacked(content, path) if path.suffix == ".xz" else content


def _unpacked(content: bytes, path: Path) -> bytes:
    parts, size = [], 0
    try:
        while content:
            decoder = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)
            parts.append(decoder.decompress(content, MAX_FILE_BYTES - size + 1))
            size += len(parts[-1])
            if size > MAX_FILE_BYTES:
                raise _too_large(path, "unpacks to")
            if not decoder.eof:
                raise lzma.LZMAError("it ends too early")
            content = decoder.unused_data.lstrip(b"\0")  # streams may follow, with padding between
    except lzma.LZMAError as error:
        raise FormatError(f"{path} is not a whole xz file: {error}; copy it again") from error
    return b"".join(parts)


def _too_large(path: Path, verb: str) -> FormatError:
    return FormatError(
        f"{path} {verb} more than {MAX_FILE_BYTES >> 20} MB, which no tokenizer has; pass a "
        "tokenizer.json or its directory"
    )


def _read_file(path: Path, content: bytes, config: Mapping[str, JsonValue]) -> Vocab:
    if content.lstrip()[:1] == b"{":
        # Only tekken names the size that it is cut to.
        vocab = (
            Vocab.from_tekken(content)
            if b'"default_vocab_size"' in content
            else Vocab.from_tokenizer_json(content, declared=declared_tokens(config))
        )
        declared = {role: _role_id(vocab, config.get(f"{role}_token")) for role in _ROLES}
        return vocab.with_roles({role: i for role, i in declared.items() if i is not None})
    if content[:1] == b"\n" or not content[:16].isascii():
        raise FormatError(
            f"{path} looks like a SentencePiece model, which carries no fast tokenizer; convert it "
            "once with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    return Vocab.from_tiktoken(content, {})


def _role_id(vocab: Vocab, token: JsonValue) -> int | None:
    text = token_text(token)
    return None if text is None else special_id(vocab, text)


def _printed(tokenizer: SerializableTokenizer) -> bytes:
    # tokenizers prints a line for each id up to the largest, holes as well.
    largest = _largest_id(tokenizer)
    if largest >= _MAX_IDS:
        raise UnsupportedTokenizerError(
            f"the tokenizer has the id {largest}, beyond {_MAX_IDS}; renumber its tokens without "
            "holes"
        )
    try:
        return tokenizer.to_str().encode()
    # A part written in Python cannot be printed; tokenizers raises bare Exception.
    except Exception as error:
        raise UnsupportedTokenizerError(
            f"the tokenizer cannot be printed as a tokenizer.json ({error}); a part of it is "
            "Python code, replace it with one of the tokenizers library"
        ) from error


def _largest_id(tokenizer: Any) -> int:
    if not hasattr(tokenizer, "get_vocab"):
        return 0
    size: int = tokenizer.get_vocab_size()
    # As many ids as tokens, from 0 on: none is larger, and no dict of them all has to be made.
    if None not in map(tokenizer.id_to_token, range(size)):
        return size - 1
    return max(tokenizer.get_vocab().values(), default=0)


def _declared_roles(tokenizer: FastTokenizer) -> dict[str, int | None]:
    ids = {role: getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES}
    return {role: token_id for role, token_id in ids.items() if token_id is not None}


def _read_tiktoken_encoding(encoding: TiktokenEncoding) -> Vocab:
    ranks, specials = encoding._mergeable_ranks, encoding._special_tokens
    size = max([*ranks.values(), *specials.values()]) + 1
    # As in files: few ids have no token.
    if size > 2 * len(ranks) + len(specials) + (1 << 17):
        raise FormatError(
            f"{encoding!r} has ids up to {size - 1} for {len(ranks)} tokens; pass an encoding "
            "whose ids are in use"
        )
    tokens = [b""] * size
    for token, rank in ranks.items():
        tokens[rank] = token
    special_tokens = {token_id: text for text, token_id in specials.items()}
    pattern: str | None = getattr(encoding, "_pat_str", None)
    return Vocab.from_tokens(tokens, special_tokens, ranked=True, pattern=pattern)
