"""Documents from files, directories and the hub."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from xtoken._extras import needs_extra
from xtoken._files import path_to_read
from xtoken.data.documents import Documents, LeftOut, cut_passages
from xtoken.data.rows import document_of, reason_of
from xtoken.errors import ArgumentTypeError, BlankTextError, DataError, MissingFileError
from xtoken.vocab.load import is_hub_name

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset  # type: ignore[import-untyped]

TXT_PASSAGE_CHARS = 2000

DataSource: TypeAlias = str | PathLike[str]
"""A file, a directory, or the name of a dataset on the hub (owner/name)."""

# What `datasets` calls each kind of file.
_KINDS = {
    ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv",
    ".arrow": "arrow", ".txt": "text",
}  # fmt: skip
_PACKED = (".gz", ".bz2", ".xz", ".zst")
# Else "None", "NA" and "null" would be no text.
_CSV = {"keep_default_na": False, "na_values": [""]}
_PLACES = "pass a file, a directory, or the name of a dataset on the hub (owner/name)"
# Where pandas keeps the fields that rows have before those of the header.
_INDEX = "__index_level_0__"
# What `save_to_disk` writes beside its shards.
_SAVED = ("state.json", "dataset_info.json")


def read_documents(
    source: DataSource | Sequence[DataSource],
    *,
    field: str | None = None,
    split: str = "train",
    strict: bool = True,
    teacher_column: str | None = None,
) -> Documents:
    """Read texts, conversations and prompts with completions into memory.

    Args:
        source: a file, a directory, the name of a dataset on the hub, or several of them. A `.txt`
            file is cut at blank lines into passages of at most 2,000 characters; of a `.jsonl`
            file each line is a row. Both are UTF-8; a byte order mark is dropped. All else is read
            by `datasets.load_dataset`: `.parquet`, `.csv`, `.tsv`, `.json`, `.arrow`, packed files,
            directories of files, and what `save_to_disk` wrote.
        field: the column with the text or the messages; None takes those of `document_of`.
        split: of directories and of the hub.
        strict: whether a row that cannot be used ends the call; else it is left out and named in
            `left_out`, as rows with a blank text are in either case.
        teacher_column: the column that names the teachers of a row, kept in `Documents.teachers`;
            text files have none.

    Returns: the documents in order.

    Raises:
        MissingFileError: there is no such file.
        DataError: a file is of another kind or cannot be read, a row cannot be used (see
            `document_of`), or no document is left.
        MissingExtraError: `datasets` is needed and not installed.
    """
    sources = as_sources(source)
    documents = Documents([])
    for each in sources:
        found = _read(each, field, split, strict, teacher_column)
        if not found:
            reasons = [f" ({each.source}: {each.reason})" for each in found.left_out[:1]]
            raise DataError(
                f"data file {each} holds no text{''.join(reasons)}; give at least one document"
            )
        documents += found
        documents.left_out += found.left_out
        for document, names in found.teachers.items():
            documents.name_teachers(document, names)
    if teacher_column is not None and not documents.teachers:
        raise DataError(
            f"no row of {', '.join(map(str, sources))} has a column {teacher_column!r}, which was "
            "to name its teachers; pass another name"
        )
    return documents


def read_texts(path: DataSource, *, text_field: str = "text") -> list[str]:
    """Read texts alone, as `read_documents` does.

    Raises:
        DataError: besides what `read_documents` raises, if a row holds a conversation.
    """
    texts = []
    for document in read_documents(path, field=text_field):
        if not isinstance(document, str):
            raise DataError(
                f"{document.source} has messages in field {text_field!r}, expected a string; "
                "read the file with read_documents"
            )
        texts.append(document)
    return texts


def load_rows(
    source: DataSource | Sequence[DataSource], *, split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset:
    """The rows of files as `datasets.load_dataset` gives them.

    Memory-mapped from disk, so that a corpus need not fit into memory; a stream needs no disk
    either. Both are taken by `DistillTrainer`, and by `map` with `Pair.tokenize`.

    Args:
        source: a file, several of one kind, a directory, or the name of a dataset on the hub; see
            `read_documents`.
        split: of directories and of the hub; it may be sliced, as `train[:1%]`.
        streaming: whether rows are read as they are asked for.

    Raises:
        MissingFileError: there is no such file.
        DataError: `datasets` cannot read it; the message says why.
        MissingExtraError: `datasets` is not installed.
    """
    with needs_extra():
        import datasets

    several = not isinstance(source, str | PathLike)
    sources = [str(each) for each in as_sources(source)]
    place = Path(sources[0])
    options: dict[str, Any] = {}
    if several or place.is_file():
        endings = {_ending(Path(each)) for each in sources}
        kinds = {_KINDS[ending] for ending in endings}
        if len(kinds) != 1 or len(endings & {".csv", ".tsv"}) > 1:
            raise DataError(
                f"{len(sources)} files of kinds {sorted(endings)}; give files of one kind at a time"
            )
        (name,) = kinds
        options["data_files"] = {"train": sources}
        if name == "text":
            options["sample_by"] = "paragraph"
        if ".tsv" in endings:
            options["sep"] = "\t"
        if name == "csv":
            options |= _CSV
    elif place.is_dir():
        # A name such as "." has no part that `datasets` could call what it makes by.
        name = str(place.resolve())
        endings = {each.suffix for each in place.rglob("*")} & _KINDS.keys()
        if endings and endings <= {".csv", ".tsv"}:
            options |= _CSV
    elif is_hub_name(sources[0]):
        name = sources[0]
    else:
        raise _no_file(sources[0])
    try:
        if all((place / file).is_file() for file in _SAVED):
            saved = datasets.load_from_disk(name)
            found = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
            return found.to_iterable_dataset() if streaming else found
        found = datasets.load_dataset(name, split=split, streaming=streaming, **options)
    # It raises classes of its own, of pyarrow, fsspec and the hub's client, and builtins.
    except Exception as error:
        remedy = "check the name, the split and the network"
        if place.is_dir():
            remedy = f"expected {', '.join(_KINDS)} files of one kind in it; check the split too"
        elif place.exists():
            remedy = "check what it holds, and the split"
        raise DataError(
            f"{', '.join(sources)} cannot be read as a dataset with split {split!r} "
            f"({_one_line(error)}); {remedy}"
        ) from error
    if found.info.builder_name != "csv":
        return found
    check = functools.partial(_check_fields, ", ".join(sources))
    if streaming:
        return found.map(check)
    check(found.features)
    return found


def _check_fields(source: str, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row, or the features of all."""
    if _INDEX in row:
        raise DataError(
            f"{source} has rows of more fields than its header, whose first would be dropped; "
            "write texts that hold the separator in quotes, and name every column"
        )
    return row


def _read(
    source: DataSource, field: str | None, split: str, strict: bool, teachers: str | None
) -> Documents:
    path = Path(source)
    if path.is_file() and path.suffix == ".txt":
        return Documents(cut_passages(_decode(path), TXT_PASSAGE_CHARS))
    if path.is_file() and path.suffix == ".jsonl":
        # Not splitlines(): JSON allows U+2028 and U+0085 inside a string.
        return _documents(json_lines(_decode(path).split("\n"), path), field, strict, teachers)
    check_source(source)
    # What is here is read as a stream, which leaves no second copy of it on the disk.
    rows = load_rows(source, split=split, streaming=path.exists())
    return _documents(numbered(rows, source), field, strict, teachers)


def _documents(
    rows: Iterator[tuple[str, Mapping[str, Any] | DataError]],
    field: str | None,
    strict: bool,
    teachers: str | None,
) -> Documents:
    documents = Documents([])
    left_out = []
    for source, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            documents.append(document_of(row, field=field, source=source))
            if teachers is not None and teachers in row:
                documents.name_teachers(documents[-1], row[teachers])
        except DataError as error:
            if strict and not isinstance(error, BlankTextError):
                raise
            left_out.append(LeftOut(source, reason_of(error, source)))
    documents.left_out = tuple(left_out)
    return documents


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


def numbered(
    rows: Dataset | IterableDataset, source: DataSource
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a dataset, each with its place.

    Raises:
        DataError: the source is damaged.
    """
    stream = iter(rows)
    index = 0
    while True:
        try:
            row = next(stream)
        except StopIteration:
            return
        except DataError:
            raise
        # A damaged file is found where it is read.
        except Exception as error:
            raise DataError(
                f"{source} cannot be read after row {index} ({_one_line(error)}); write it again"
            ) from error
        yield f"{source}: row {index}", cast("Mapping[str, Any]", row)
        index += 1


def as_sources(source: object) -> list[DataSource]:
    """One source or several, as a list.

    Raises:
        ArgumentTypeError: one is no path.
        MissingFileError: the system cannot look at one.
        DataError: there is none.
    """
    sources: list[DataSource]
    if isinstance(source, str | PathLike):
        sources = [source]
    elif isinstance(source, Iterable) and not isinstance(source, bytes | Mapping):
        sources = list(source)
    else:
        raise ArgumentTypeError(f"source is a {type(source).__name__}, expected a path; {_PLACES}")
    if not sources:
        raise DataError("0 data files; give at least one")
    for each in sources:
        path_to_read("data file", each, _PLACES)
    return sources


def check_source(source: DataSource) -> None:
    """Refuse what is no file of a known kind, no directory and no name on the hub.

    Raises:
        MissingFileError, DataError: which it is.
    """
    path = Path(source)
    if path.is_file():
        _ending(path)
    elif not path.is_dir() and not is_hub_name(source):
        raise _no_file(source)


def _ending(path: Path) -> str:
    """That of a known kind of file, without that of its packing."""
    suffixes = [suffix for suffix in path.suffixes[-2:] if suffix not in _PACKED]
    if not path.is_file():
        raise _no_file(path)
    if not suffixes or suffixes[-1] not in _KINDS:
        raise DataError(
            f"data file {path} ends in {path.suffix or 'nothing'!r}, expected one of "
            f"{', '.join(_KINDS)}; convert it to one JSON object with a text field per line"
        )
    return suffixes[-1]


def _no_file(source: DataSource) -> MissingFileError:
    return MissingFileError(
        f"data file {source} does not exist; pass a {', '.join(_KINDS)} file, a directory of "
        "them, or the name of a dataset on the hub (owner/name)"
    )


def _decode(path: Path) -> str:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec counts from behind the byte order mark.
        start = error.start + len(content) - len(error.object)
        line = content.count(b"\n", 0, start) + 1
        raise DataError(
            f"{path}:{line} is not UTF-8 at byte {start} of the file, {content[start]:#04x}; "
            "convert the file to UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    if isinstance(error, RecursionError):
        return "lists or objects nested too deeply"
    return "a number of too many digits"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
