"""From a directory, a file or a hub name to a tokenizer object that encodes text."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import warnings
from os import PathLike
from pathlib import Path
from urllib.parse import urlsplit

from xtoken._checks import panics_refused
from xtoken._core import Vocab
from xtoken._extras import installed
from xtoken._files import path_to_read, read_json
from xtoken.errors import (
    FormatError,
    MissingFileError,
    ModelSourceError,
    UnsupportedTokenizerError,
)
from xtoken.vocab.read import PLACES, read_content, read_object, read_path
from xtoken.vocab.source import LoadedTokenizer, TokenizerSource

# "owner/model". A name without owner is a directory: a mistyped path must not be sent out.
HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*)/[A-Za-z0-9][\w.-]*")
# The classes of transformers that take a tokenizer.json as it is.
_PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
_FILE_ENDINGS = (".json", ".xz", ".model", ".tiktoken", ".safetensors", ".pt", ".gguf")


def no_directory(path: str | PathLike[str]) -> str:
    """Why a path is no directory, in words."""
    return "is a file" if os.path.isfile(path) else "does not exist"


def is_hub_name(source: str | PathLike[str]) -> bool:
    """Whether a source that is no path has the form of a hub name, owner/model.

    Neither the name of a file, nor one whose owner is a directory here, has: it is a path with a
    slip in it, and stays on this machine.
    """
    found = HUB_NAME.fullmatch(str(source))
    if found is None or str(source).endswith(_FILE_ENDINGS):
        return False
    try:
        return not Path(source).exists() and not Path(found[1]).is_dir()
    except OSError:  # nobody can say what is there
        return False


def read_tokenizer(tokenizer: TokenizerSource) -> Vocab:
    """The vocabulary of a tokenizer object, path or hub name; see `Vocab.from_tokenizer`."""
    if isinstance(tokenizer, Vocab):
        return tokenizer
    if not isinstance(tokenizer, str | PathLike):
        return read_object(tokenizer)
    if is_hub_name(tokenizer):
        return read_object(load_tokenizer(tokenizer))
    if is_made_by_class(tokenizer):
        # What transformers cannot make encodes no text, and says so then.
        with contextlib.suppress(ModelSourceError, UnsupportedTokenizerError):
            return read_object(load_tokenizer(tokenizer))
    return read_path(tokenizer)


def is_made_by_class(source: str | PathLike[str]) -> bool:
    """Whether transformers makes the tokenizer of a directory by a class, which has a pipeline of
    its own whatever stands in tokenizer.json."""
    path = path_to_read("the tokenizer", source, PLACES)
    file = path / "tokenizer_config.json"
    if not file.is_file() or not (path / "tokenizer.json").is_file():
        return False
    config = read_json(file, "tokenizer config")
    name = config.get("tokenizer_class") if isinstance(config, dict) else None
    return name not in _PLAIN_CLASSES and installed("transformers")


def load_tokenizer(source: str | PathLike[str]) -> LoadedTokenizer:
    """The tokenizer of a directory, a tokenizer.json or a model on the hub.

    A directory or hub name is read by transformers where it is installed, with its chat template;
    otherwise, and for a file, by `tokenizers`.

    Raises:
        ArgumentTypeError: it is no path.
        MissingFileError: there is no such path, and it is no hub name.
        UnsupportedTokenizerError: it lists tokens but has no fast tokenizer.
        ModelSourceError: transformers or the hub cannot give it.
    """
    path = path_to_read("the tokenizer", source, PLACES)
    if not path.exists() and not is_hub_name(source):
        raise MissingFileError(f"{path} does not exist; {PLACES}")
    # Of a packed tokenizer.json transformers makes an empty tokenizer, without a word.
    packed = not (path / "tokenizer.json").is_file() and (path / "tokenizer.json.xz").is_file()
    named = (path / "tokenizer_config.json").is_file() and not packed
    if (named or is_hub_name(source)) and installed("transformers"):
        return by_transformers(str(source))
    if is_hub_name(source):
        return _from_hub(str(source))
    return _by_tokenizers(path)


def by_transformers(source: str, side: str = "") -> LoadedTokenizer:
    """The fast tokenizer of a directory or hub name; `side` goes before its name in messages.

    Raises:
        MissingFileError: it is neither: a mistyped path is not sent out.
        ModelSourceError: transformers cannot read it.
        UnsupportedTokenizerError: it is not a fast one.
    """
    from transformers import AutoTokenizer

    hint = (
        "pass a directory with a tokenizer, saved by tokenizer.save_pretrained, or the name of a "
        "model on the hub (owner/model)"
    )
    found = path_to_read(f"{side}tokenizer", source, hint)
    if not found.exists() and not is_hub_name(source):
        raise MissingFileError(f"{side}{source} does not exist; {hint}")
    with panics_refused(f"the tokenizer of {side}{source}"):
        try:
            # Warnings of the hub's client and of transformers are no use beside the line below.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tokenizer = AutoTokenizer.from_pretrained(
                    source, local_files_only=is_hub_name(source) and not _hub_is_reachable()
                )
        # transformers raises many kinds here, down to KeyError and bare Exception.
        except Exception as error:
            raise ModelSourceError(
                f"{side}{source} has no tokenizer that transformers can read ({_one_line(error)})"
                "; pass a directory with one, saved by tokenizer.save_pretrained, or a hub name"
            ) from error
    if not tokenizer.is_fast:
        raise UnsupportedTokenizerError(
            f"the tokenizer of {side}{source} is {type(tokenizer).__name__}, not a fast one; "
            "convert it to tokenizer.json first"
        )
    return tokenizer


def _from_hub(name: str) -> LoadedTokenizer:
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(name, "tokenizer.json", local_files_only=not _hub_is_reachable())
    # Its own classes, those of its transport, and OSError.
    except Exception as error:
        raise ModelSourceError(
            f"{name} could not be read from the hub ({_one_line(error)}); pass a "
            "directory, or check the name and the network"
        ) from error
    return _by_tokenizers(Path(file))


def hub_file(name: str, file: str) -> Path | None:
    """A file of a model on the hub, from the local cache where it is there; None where the model
    has none. Where that cannot be known, a warning says so."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    kept = try_to_load_from_cache(name, file)
    if kept is not None:
        return Path(kept) if isinstance(kept, str) else None
    try:
        return Path(hf_hub_download(name, file, local_files_only=not _hub_is_reachable()))
    # Its own classes, those of its transport, and OSError.
    except Exception as error:
        known = isinstance(error, EntryNotFoundError)
        if not known or isinstance(error, LocalEntryNotFoundError):
            warnings.warn(
                f"{name} may have a {file}, which cannot be read ({_one_line(error)}): what it "
                "says is left out; download the model, or pass a directory",
                stacklevel=3,
            )
        return None


def _hub_is_reachable() -> bool:
    """Whether to ask the hub, or its local cache alone: its client retries for a minute."""
    # Here, as it brings HTTP and TLS with it, which most calls do without.
    from urllib.request import getproxies

    if "https" in getproxies():
        return True  # only the client can tell
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
        with socket.create_connection((endpoint.hostname or "", port), timeout=5):
            return True
    except (OSError, ValueError):
        return False


def _by_tokenizers(path: Path) -> LoadedTokenizer:
    from tokenizers import Tokenizer

    file, content = read_content(path)
    with panics_refused(f"the tokenizer of {path}"):
        try:
            # tokenizers raises bare Exception for what it cannot read, a tekken file among it.
            tokenizer = Tokenizer.from_str(content.decode())
        except UnicodeDecodeError as error:
            raise FormatError(f"{file} is not UTF-8: {error}; copy it again") from error
        except Exception as error:
            raise UnsupportedTokenizerError(
                f"{path} lists tokens but holds no encoder for text; pass the tokenizer.json of a "
                "Hugging Face fast tokenizer, or the directory with it"
            ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
