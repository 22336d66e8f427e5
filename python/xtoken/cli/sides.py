"""A tokenizer named on the command line: its vocabulary, and the encoder of its file."""

from __future__ import annotations

import lzma
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from xtoken import Vocab
from xtoken.errors import FormatError, OptionError, UnsupportedTokenizerError


@dataclass(frozen=True)
class Side:
    """One tokenizer of a pair.

    Args:
        name: `student` or `teacher`.
        path: where it was read from.
        vocab: what its tokens are.
        tokenizer: makes ids of text.
    """

    name: str
    path: Path
    vocab: Vocab
    tokenizer: Tokenizer

    def encode(self, texts: Sequence[str], special_tokens: bool) -> list[list[int]]:
        """The ids of each text, with the special tokens that the tokenizer adds or without."""
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=special_tokens)
        return [encoding.ids for encoding in encodings]

    def surface(self, token_id: int) -> str:
        """How a special or unused token is named."""
        text = self.vocab.special_tokens.get(token_id)
        return f"<unused {token_id}>" if text is None else text


def read_side(name: str, path: Path) -> Side:
    """Read a tokenizer.json (.xz too) or the directory that holds one.

    Raises:
        FileNotFoundError: there is none.
        FormatError, UnsupportedTokenizerError: it cannot be read.
        UnsupportedTokenizerError: the file describes tokens but cannot encode text.
    """
    vocab = Vocab.from_path(path)
    file = path
    if path.is_dir():
        names = ("tokenizer.json", "tokenizer.json.xz")
        file = next((path / name for name in names if (path / name).is_file()), path)
    if file.is_dir() or file.name.removesuffix(".xz").rpartition(".")[2] != "json":
        raise _no_encoder(name, path)
    content = file.read_bytes()
    try:
        text = (lzma.decompress(content) if file.suffix == ".xz" else content).decode()
        # tokenizers raises bare Exception for what it cannot read, a tekken file among it.
        tokenizer = Tokenizer.from_str(text)
    except UnicodeDecodeError as error:
        raise FormatError(f"{file} is not UTF-8: {error}; copy it again") from error
    except Exception as error:
        raise _no_encoder(name, path) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return Side(name, path, vocab, tokenizer)


def read_text(file: Path) -> str:
    """The text of a file, `-` for standard input.

    Raises:
        FileNotFoundError: there is no such file.
        OptionError: it is a directory, or not UTF-8.
    """
    if str(file) != "-" and not file.exists():
        raise FileNotFoundError(
            f"text file {file} does not exist; pass a UTF-8 text, or - for standard input"
        )
    if file.is_dir():
        raise OptionError(f"{file} is a directory, expected a text file; pass one file of it")
    content = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{file} is not UTF-8 at byte {error.start}; tokenizers read text: convert it first"
        ) from error


def _no_encoder(name: str, path: Path) -> UnsupportedTokenizerError:
    return UnsupportedTokenizerError(
        f"--{name} {path} lists tokens but holds no encoder for text; pass the tokenizer.json of a "
        "Hugging Face fast tokenizer, or the directory with it"
    )
