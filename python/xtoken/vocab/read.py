"""Read a tokenizer: which objects, files and hub names are one, and how each becomes a `Vocab`."""

from __future__ import annotations

import lzma
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from xtoken._core import Vocab
from xtoken._files import JsonValue, read_json
from xtoken.errors import (
    ArgumentTypeError,
    FormatError,
    MissingFileError,
    ModelSourceError,
    UnsupportedTokenizerError,
)
from xtoken.vocab.display import special_id
from xtoken.vocab.source import (
    FastTokenizer,
    SerializableTokenizer,
    TiktokenEncoding,
    TokenizerSource,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_ROLES = ("bos", "eos", "pad", "unk")
_DIRECTORY_FILES = ("tokenizer.json", "tokenizer.json.xz", "tekken.json")
_HUB_NAME = re.compile(r"(?P<owner>[A-Za-z0-9][\w.-]*)/[A-Za-z0-9][\w.-]*")
# The largest tokenizers have about 40 MB.
MAX_FILE_BYTES = 256 << 20


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer that was read.

    Attributes:
        name: what people call it: the directory, the hub name, or the class.
        vocab: what its tokens are.
        content: its file unpacked, or what it prints as a `tokenizer.json`; empty where there is
            none, as for a `Vocab`.
    """

    name: str
    vocab: Vocab
    content: bytes

    def encoder(self) -> Tokenizer:
        """What makes ids of text, without padding and truncation.

        Raises:
            UnsupportedTokenizerError: only the tokens are known, as from a tiktoken file.
        """
        from tokenizers import Tokenizer

        try:
            # tokenizers raises bare Exception for what it cannot read, a tekken file among it.
            encoder = Tokenizer.from_buffer(self.content)
        except Exception as error:
            raise UnsupportedTokenizerError(
                f"{self.name} lists tokens but holds no encoder for text; pass the tokenizer.json "
                "of a Hugging Face fast tokenizer, or the directory with it"
            ) from error
        encoder.no_padding()
        encoder.no_truncation()
        return encoder


def read_tokenizer(tokenizer: TokenizerSource) -> Vocab:
    """The vocabulary of a tokenizer object, path or hub name; see `Vocab.from_tokenizer`."""
    return tokenizer if isinstance(tokenizer, Vocab) else load_tokenizer(tokenizer).vocab


def load_tokenizer(source: TokenizerSource) -> LoadedTokenizer:
    """Read a tokenizer from whatever holds one.

    Args:
        source: a fast tokenizer of `transformers`, a `tokenizers.Tokenizer`, a tiktoken `Encoding`,
            a `Vocab`, a directory or file (see `Vocab.from_path`), or the name of a model on the
            hub, `owner/model`. A name is fetched only if there is no such path, nor a directory of
            the owner's name, in which a mistyped path would lie.

    Raises:
        ArgumentTypeError: it is none of these.
        MissingFileError: there is no such file, or the directory holds no tokenizer.
        ModelSourceError: the hub does not give it.
        FormatError, UnsupportedTokenizerError: it cannot be read.
    """
    if isinstance(source, Vocab):
        return LoadedTokenizer(f"the vocabulary {source.fingerprint[:12]}", source, b"")
    if isinstance(source, str | PathLike):
        return _load_named(source)
    name = str(getattr(source, "name_or_path", "") or type(source).__name__)
    if isinstance(source, FastTokenizer):
        content = _printed(source.backend_tokenizer, name)
        roles = _declared_roles(source)
        vocab = Vocab.from_tokenizer_json(content, from_memory=True, roles=roles)
        return LoadedTokenizer(name, vocab, content)
    if isinstance(source, SerializableTokenizer):
        content = _printed(source, name)
        return LoadedTokenizer(name, Vocab.from_tokenizer_json(content, from_memory=True), content)
    if isinstance(source, TiktokenEncoding):
        name = str(getattr(source, "name", name))
        return LoadedTokenizer(name, _read_tiktoken_encoding(source), b"")
    raise ArgumentTypeError(
        f"{type(source).__name__} is not a tokenizer that can be read; expected a transformers "
        "fast tokenizer (use_fast=True), a tokenizers.Tokenizer, a tiktoken.Encoding, a path or a "
        "hub name"
    )


def read_path(path: str | PathLike[str]) -> Vocab:
    """The vocabulary in a directory or file; see `Vocab.from_path`."""
    return _load_path(Path(path), source_name(path)).vocab


def read_content(path: str | PathLike[str]) -> tuple[Path, bytes]:
    """A tokenizer's file, that of a directory if it is one, and what it holds, unpacked.

    Raises:
        MissingFileError: there is no such file.
        FormatError: a packed file is not whole, or it is too large for a tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        file = next((path / name for name in _DIRECTORY_FILES if (path / name).is_file()), None)
        if file is None:
            raise MissingFileError(
                f"{path} holds none of {', '.join(_DIRECTORY_FILES)}; save the tokenizer there "
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


def source_name(source: str | PathLike[str]) -> str:
    """What people call the tokenizer in a path: its directory, or the stem of another file."""
    path = Path(source)
    if path.name in _DIRECTORY_FILES:
        return path.resolve().parent.name
    return path.resolve().name if path.is_dir() else path.name.partition(".")[0]


def source_names(student: str | PathLike[str], teacher: str | PathLike[str]) -> tuple[str, str]:
    """What people call two tokenizers; of equal names, as much of the paths as tells them apart."""
    names = source_name(student), source_name(teacher)
    if names[0] != names[1]:
        return names
    parts = [Path(source).resolve().parts for source in (student, teacher)]
    for length in range(1, max(map(len, parts))):
        ends = ["/".join(part[-length:]) for part in parts]
        if ends[0] != ends[1]:
            return ends[0], ends[1]
    return names


def _load_named(source: str | PathLike[str]) -> LoadedTokenizer:
    path = Path(source)
    found = _HUB_NAME.fullmatch(source) if isinstance(source, str) else None
    # With a directory of the owner's name the rest is a path with a slip in it, and stays here.
    if found is None or path.exists() or Path(found["owner"]).is_dir():
        return _load_path(path, source_name(source))
    directory = _fetch(str(source))
    if any((directory / name).is_file() for name in _DIRECTORY_FILES):
        return _load_path(directory, str(source))
    return _convert(str(source), directory)


def _fetch(name: str) -> Path:
    """The tokenizer's files of a model on the hub, from the local cache or from the hub."""
    from huggingface_hub import snapshot_download

    wanted = [
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "tekken.json",
        "*.model",
    ]
    try:
        return Path(snapshot_download(name, allow_patterns=[*wanted, "vocab.*", "merges.txt"]))
    # The client raises its own classes, those of its transport, and OSError.
    except Exception as error:
        raise ModelSourceError(
            f"{name} is no directory here and cannot be fetched from the hub "
            f"({' '.join(str(error).split())[:200]}); check the name, the network and the login, "
            "or pass a directory"
        ) from error


def _convert(name: str, directory: Path) -> LoadedTokenizer:
    """A model without a `tokenizer.json`, which transformers makes of its other files."""
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory)
    # transformers raises many kinds here, down to KeyError and bare Exception.
    except Exception as error:
        raise ModelSourceError(
            f"{name} has none of {', '.join(_DIRECTORY_FILES)}, and transformers cannot convert "
            f"what it has ({' '.join(str(error).split())[:200]}); pass the directory of a "
            "converted tokenizer"
        ) from error
    loaded = load_tokenizer(tokenizer)
    return LoadedTokenizer(name, loaded.vocab, loaded.content)


def _load_path(path: Path, name: str) -> LoadedTokenizer:
    file, content = read_content(path)
    config = _read_config(file.parent) if path.is_dir() else {}
    return LoadedTokenizer(name, _read_file(file, content, config), content)


def _unpacked(content: bytes, path: Path) -> bytes:
    parts, size = [], 0
    try:
        while content:
            decoder = lzma.LZMADecompressor(memlimit=MAX_FILE_BYTES)
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
        read = (
            Vocab.from_tekken if b'"default_vocab_size"' in content else Vocab.from_tokenizer_json
        )
        vocab = read(content)
        declared = {role: _role_id(vocab, config.get(f"{role}_token")) for role in _ROLES}
        return vocab.with_roles({role: i for role, i in declared.items() if i is not None})
    if content[:1] == b"\n" or not content[:16].isascii():
        raise FormatError(
            f"{path} looks like a SentencePiece model, which carries no fast tokenizer; convert it "
            "once with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    return Vocab.from_tiktoken(content, {})


def _read_config(directory: Path) -> Mapping[str, JsonValue]:
    file = directory / "tokenizer_config.json"
    if not file.is_file():
        return {}
    config = read_json(file, "tokenizer configuration")
    return config if isinstance(config, dict) else {}


def _role_id(vocab: Vocab, token: JsonValue) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return special_id(vocab, text) if isinstance(text, str) else None


def _printed(tokenizer: SerializableTokenizer, name: str) -> bytes:
    try:
        return tokenizer.to_str().encode()
    # A part written in Python cannot be printed; tokenizers raises bare Exception.
    except Exception as error:
        raise UnsupportedTokenizerError(
            f"{name} cannot be printed as a tokenizer.json ({error}); a part of it is Python code, "
            "replace it with one of the tokenizers library"
        ) from error


def _declared_roles(tokenizer: FastTokenizer) -> dict[str, int | None]:
    ids = {role: getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES}
    return {role: token_id for role, token_id in ids.items() if token_id is not None}


def _read_tiktoken_encoding(encoding: TiktokenEncoding) -> Vocab:
    ranks, specials = encoding._mergeable_ranks, encoding._special_tokens
    size = max([*ranks.values(), *specials.values()]) + 1
    tokens = [b""] * size
    for token, rank in ranks.items():
        tokens[rank] = token
    special_tokens = {token_id: text for text, token_id in specials.items()}
    return Vocab.from_tokens(tokens, special_tokens, ranked=True)
