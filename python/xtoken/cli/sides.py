"""What the command line names: tokenizers and text files."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from xtoken.cli.command import without_collection
from xtoken.cli.plain_console import plain_console
from xtoken.data.file_rows import file_rows
from xtoken.data.rows import Document, document_of
from xtoken.errors import DataError, MissingFileError, OptionError
from xtoken.vocab.side import Side, SideName, labels

_HELP = "Directory or file of a tokenizer (tokenizer.json, .xz too), or a hub name (owner/model)."
Student = Annotated[str, typer.Option("--student", help=f"The student's tokenizer. {_HELP}")]
Teacher = Annotated[str, typer.Option("--teacher", help="The same for the teacher.")]
MaybeStudent = Annotated[str | None, typer.Option("--student", help=f"The student's. {_HELP}")]
MaybeTeacher = Annotated[str | None, typer.Option("--teacher", help="The same for the teacher.")]


def sources_of(student: str, teacher: str) -> list[tuple[str, object]]:
    """Both options with what they name, as `check_apart` takes them."""
    return [("--student", student), ("--teacher", teacher)]


def read_side(name: SideName, source: str) -> Side:
    """Read a tokenizer that is to encode text.

    Raises:
        MissingFileError: there is none.
        ModelSourceError: the hub does not give it.
        FormatError, UnsupportedTokenizerError: it cannot be read, or cannot encode text.
    """
    side = Side(name, source)
    with without_collection():
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
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{file} is not UTF-8 at byte {error.start}; tokenizers read text: convert it first"
        ) from error


def page_names(
    student: Side, teacher: Side, student_name: str | None, teacher_name: str | None
) -> tuple[str, str]:
    """What a page calls the two: as asked, else as their models are called."""
    found = _model_name(student), _model_name(teacher)
    if found[0] == found[1]:
        found = labels(student, teacher)
    return student_name or found[0], teacher_name or found[1]


# Folders that say nothing of what is in them.
_GENERIC = frozenset(
    ("student", "teacher", "tokenizer", "tok", "model", "final", "output", "out", "hf")
)


def _model_name(side: Side) -> str:
    """The name of the hub where the folder is one of its cache; of a folder that is called as any
    other might be, its parent's too."""
    if not side.is_path or not os.path.exists(str(side.source)):
        return side.label
    path = Path(str(side.source)).resolve()
    for part in path.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    folder = path if path.is_dir() else path.parent
    if side.label == folder.name and (
        folder.name.lower() in _GENERIC or folder.name.startswith("checkpoint-")
    ):
        return "/".join(folder.parts[-2:])
    return side.label


# One word that ends as a file does, or names a folder: a text would hardly look so.
_FILE_NAME = re.compile(r"\S*[/\\]\S*|\S+\.[A-Za-z][A-Za-z0-9]{0,5}")


def read_document(given: str, row: int = 1) -> tuple[Document, str]:
    """The text or the conversation that an option names, and what to call it.

    Args:
        given: a UTF-8 file, `-` for standard input, or the text itself.
        row: of a `.jsonl` file, from 1; a row with a blank text counts.

    Raises:
        MissingFileError: it looks like the name of a file, and there is none.
        OptionError: it is a directory or not UTF-8, or the file has fewer rows.
        DataError: the row is no text and no conversation, or blank.
    """
    if given == "-":
        return read_text(Path(given)), "standard input"
    if not _exists(given):
        if _FILE_NAME.fullmatch(given):
            raise MissingFileError(
                f"text file {given} does not exist; pass a UTF-8 file, or, if this is the text "
                "itself, through standard input"
            )
        return given, "the given text"
    path = Path(given)
    if path.suffix != ".jsonl":
        return read_text(path), path.name
    count = 0
    for count, (place, value) in enumerate(file_rows(path), 1):
        if count == row:
            if isinstance(value, DataError):
                raise value
            document = value if isinstance(value, str) else document_of(value, source=place)
            return document, f"{path.name}, row {row}"
    raise OptionError(f"--row {row}: {path} has {count} rows; expected 1 to {count}")


def _exists(given: str) -> bool:
    try:
        return os.path.exists(given)
    except (OSError, ValueError):  # longer than a name can be, or with a zero byte
        return False


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on stderr, so that output can be piped."""
    console = plain_console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield
