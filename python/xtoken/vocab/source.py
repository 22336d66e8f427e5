"""What can be read as a tokenizer, as a type."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Protocol, TypeAlias, runtime_checkable

from xtoken._core import Vocab


@runtime_checkable
class SerializableTokenizer(Protocol):
    """A `tokenizers.Tokenizer`: it prints itself as a `tokenizer.json`."""

    def to_str(self) -> str:
        """The content of its `tokenizer.json`."""
        ...


@runtime_checkable
class FastTokenizer(Protocol):
    """A fast tokenizer of `transformers`: one that is backed by a `tokenizers.Tokenizer`."""

    @property
    def backend_tokenizer(self) -> SerializableTokenizer:
        """The tokenizer that does the work."""
        ...


@runtime_checkable
class TiktokenEncoding(Protocol):
    """A `tiktoken.Encoding`."""

    @property
    def _mergeable_ranks(self) -> Mapping[bytes, int]: ...

    @property
    def _special_tokens(self) -> Mapping[str, int]: ...

    def token_byte_values(self) -> list[bytes]:
        """The bytes of all tokens."""
        ...


LoadedTokenizer: TypeAlias = FastTokenizer | SerializableTokenizer | TiktokenEncoding
"""A tokenizer object that encodes text."""

# A path is a directory or a file; a string may also be the name of a model on the hub.
TokenizerSource: TypeAlias = Vocab | str | PathLike[str] | LoadedTokenizer
