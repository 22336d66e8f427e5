"""What the command line names: tokenizers and text files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from xtoken.errors import MissingFileError, OptionError
from xtoken.vocab.side import Side, SideName

_HELP = "Directory or file of a tokenizer (tokenizer.json, .xz too), or a hub name (owner/model)."
Student = Annotated[str, typer.Option("--student", help=f"The student's tokenizer. {_HELP}")]
Teacher = Annotated[str, typer.Option("--teacher", help="The same for the teacher.")]
MaybeStudent = Annotated[str | None, typer.Option("--student", help=f"The student's. {_HELP}")]
MaybeTeacher = Annotated[str | None, typer.Option("--teacher", help="The same for the teacher.")]


def read_side(name: SideName, source: str) -> Side:
    """Read a tokenizer that is to encode text.

    Raises:
        MissingFileError: there is none.
        ModelSourceError: the hub does not give it.
        FormatError, UnsupportedTokenizerError: it cannot be read, or cannot encode text.
    """
    side = Side(name, source)
    # First, as the vocabulary is then the tokenizer's own.
    _ = side.tokenizer
    _ = side.vocab
    return side


def read_text(file: Path) -> str:
    """The text of a file, `-` for standard input.

    Raises:
        MissingFileError: there is no such file.
        OptionError: it is a directory, or not UTF-8.
    """
    if str(file) != "-" and not file.exists():
        raise MissingFileError(
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
