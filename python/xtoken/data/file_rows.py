"""Rows of files of text, plain or packed: each ending has one reader, wherever its file lies."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from xtoken._extras import needs_extra
from xtoken.data.documents import passages
from xtoken.errors import DataError

TXT_PASSAGE_CHARS = 2000

Row: TypeAlias = str | Mapping[str, Any] | DataError
"""A passage, a row by column, or why there is none."""

PACKED = (".gz", ".bz2", ".xz", ".zst")
# What is read here; all else is by `datasets`.
READ_HERE = (".txt", ".jsonl", ".json", ".csv", ".tsv")

_BLOCK_CHARS = 1 << 20
# csv refuses longer fields than its limit, 131,072 at first; it is one for the process.
_FIELD_CHARS = 2**31 - 1
_DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error)


def ending(path: Path) -> str:
    """The last ending of a file's name, in small letters and without that of its packing."""
    return Path(path.name.removesuffix(path.suffix) if path.suffix in PACKED else path.name).suffix


def file_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a file that is one of `READ_HERE`, each with its place, one at a time.

    Raises:
        DataError: the file is damaged, not UTF-8, or a table whose rows are of other columns.
    """
    kind = ending(path)
    if kind == ".txt":
        for index, passage in enumerate(passages(_paragraphs(_lines(path)), TXT_PASSAGE_CHARS)):
            yield f"{path}: passage {index}", passage
    elif kind == ".jsonl":
        yield from json_lines(_lines(path), path)
    elif kind == ".json":
        yield from _json_rows(path)
    else:
        for index, row in enumerate(_table_rows(path)):
            yield f"{path}: row {index}", row


def table_columns(path: Path) -> list[str]:
    """The columns that the header of a `.csv` or `.tsv` names; pandas' names where it names none,
    or one twice."""
    table = _table(path)
    _, header = next(table, (0, []))
    table.close()
    return _columns(header)


def rows_alone(
    files: Sequence[str], marks: Sequence[object], columns: Sequence[str] | None = None
) -> Iterator[Mapping[str, Any]]:
    """The rows of files for `datasets`, whose rows have the same columns.

    Args:
        files: which; `datasets` shares them out among workers.
        marks: of each, what tells that it was written again.
        columns: which, besides those of a row; None for those of the first thousand rows.

    Raises:
        DataError: as `file_rows`, or a row that is none.
    """
    del marks
    for file in files:
        rows = _mappings(file_rows(Path(file)))
        names = columns
        if names is None:
            first = list(itertools.islice(rows, 1000))
            names = list(dict.fromkeys(name for row in first for name in row))
            rows = itertools.chain(first, rows)
        nothing = dict.fromkeys(names)
        for row in rows:
            yield nothing | dict(row)


def _mappings(rows: Iterable[tuple[str, Row]]) -> Iterator[Mapping[str, Any]]:
    for _, row in rows:
        if isinstance(row, DataError):
            raise row
        yield {"text": row} if isinstance(row, str) else row


def json_lines(
    lines: Iterable[str], path: Path
) -> Iterator[tuple[str, Mapping[str, Any] | DataError]]:
    """The rows of a `.jsonl` file, each with its place, or why it is none."""
    for number, line in enumerate(lines, 1):
        # Files that were joined have a mark at each beginning.
        line = line.removeprefix("\ufeff")
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield (
                place,
                DataError(f"{place} is not JSON ({_reason(error)}); write one object per line"),
            )
        else:
            yield place, value if isinstance(value, dict) else {}


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | DataError]]:
    """The rows of a `.json` file: a list, which is read whole, or an object per line."""
    lines = _lines(path)
    first = list(itertools.islice(itertools.dropwhile(lambda line: not line.strip(), lines), 1))
    if not first or (first[0].lstrip().startswith("{") and _is_json(first[0])):
        lines.close()
        yield from json_lines(_lines(path), path)
        return
    try:
        found = json.loads("".join(itertools.chain(first, lines)))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not JSON ({_reason(error)}); write a list of objects, or one object per "
            "line"
        ) from error
    for index, value in enumerate(found if isinstance(found, list) else [found]):
        row = {"text": value} if isinstance(value, str) else value
        yield f"{path}: row {index}", row if isinstance(row, dict) else {}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _table_rows(path: Path) -> Iterator[Mapping[str, str | None]]:
    """The rows of a table: what is written is text, never a number, and what is not is None."""
    table = _table(path)
    columns = _columns(next(table, (0, []))[1])
    for line, row in table:
        if len(row) > len(columns):
            raise DataError(
                f"{path}:{line} has more fields than its header, {len(row)} for {len(columns)}; "
                "write texts that hold the separator in quotes, and name every column"
            )
        values = [value or None for value in row]
        yield dict(itertools.zip_longest(columns, values))


def _columns(header: Sequence[str]) -> list[str]:
    names: list[str] = []
    for at, given in enumerate(header):
        name = given or f"Unnamed: {at}"
        again = (f"{name}.{number}" for number in itertools.count(1))
        names.append(next(each for each in itertools.chain([name], again) if each not in names))
    return names


def _table(path: Path) -> Generator[tuple[int, list[str]], None, None]:
    """The fields of the header and of each row, with the line that they end at."""
    csv.field_size_limit(_FIELD_CHARS)
    lines = _lines(path, newline="")
    # Strict: a quote that is never closed would take the rest of the file for one text.
    reader = csv.reader(lines, delimiter="\t" if ending(path) == ".tsv" else ",", strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num} is no row of a table ({error}); write a text with quotes in "
            "quotes, and each quote in it twice"
        ) from error
    finally:
        lines.close()


def _lines(path: Path, newline: str | None = None) -> Generator[str, None, None]:
    """The lines of a file in UTF-8, packed or not, without a byte order mark.

    Args:
        newline: as `open` has it; None makes each end `\\n`.

    Raises:
        DataError: it is damaged, or not UTF-8.
    """
    line = 0
    try:
        # Its own iteration breaks lines at line ends alone: JSON allows U+2028 inside a string.
        with _opened(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline=newline) as file:
            for text in file:
                line += 1
                yield text
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 soon after line {line}, {error.object[error.start]:#04x}; "
            "convert the file to UTF-8"
        ) from error
    except _DAMAGED as error:
        raise DataError(
            f"{path} cannot be read after line {line} ({error}); write it again"
        ) from error


def _opened(path: Path) -> BinaryIO:
    if path.suffix not in PACKED:
        return path.open("rb")
    if path.suffix == ".zst":
        with needs_extra():
            import fsspec  # type: ignore[import-untyped]

        try:
            return cast("BinaryIO", fsspec.open(str(path), "rb", compression="zstd").open())
        except ValueError as error:  # where no package knows it
            raise DataError(f"{path} needs zstandard; pip install zstandard") from error
    packages: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return cast("BinaryIO", packages[path.suffix](path, "rb"))


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """What `text.split("\\n\\n")` gives of the lines together."""
    rest: list[str] = []
    size = 0
    for line in lines:
        rest.append(line)
        size += len(line)
        if size >= _BLOCK_CHARS:
            *whole, last = "".join(rest).split("\n\n")
            yield from whole
            rest, size = [last], 0
    yield from "".join(rest).split("\n\n")


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    if isinstance(error, RecursionError):
        return "lists or objects nested too deeply"
    return "a number of too many digits"
