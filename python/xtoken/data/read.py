"""Documents from files, directories and the hub."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from xtoken._extras import needs_extra
from xtoken._files import path_to_read
from xtoken.data.documents import Documents, LeftOut, cut_passages
from xtoken.data.file_rows import (
    READ_HERE,
    TXT_PASSAGE_CHARS,
    Row,
    ending,
    file_rows,
    json_lines,
    rows_alone,
    table_columns,
)
from xtoken.data.rows import document_of, reason_of
from xtoken.errors import (
    ArgumentTypeError,
    BlankTextError,
    DataError,
    MissingFileError,
    OptionError,
)
from xtoken.vocab.load import is_hub_name

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset  # type: ignore[import-untyped]

DataSource: TypeAlias = str | PathLike[str]
"""A file, a directory, or the name of a dataset on the hub (owner/name)."""

# What `datasets` calls each kind of file.
_KINDS = {
    ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv",
    ".arrow": "arrow", ".txt": "text",
}  # fmt: skip
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
            file each line is a row; each field of a `.csv` or `.tsv` is a text; a `.json` is a list
            or an object per line. All are UTF-8, packed or not; a byte order mark is dropped. All
            else is read by `datasets.load_dataset`: `.parquet`, `.arrow`, what `save_to_disk`
            wrote, and the hub. Of a directory the files of one kind are read, each as if alone.
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
    """The rows of files as a dataset, with the passages and fields of `read_documents`.

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
        kinds = {_KINDS[_ending(Path(each))] for each in sources}
        if len(kinds) != 1:
            raise DataError(
                f"{len(sources)} files of kinds {sorted(kinds)}; give files of one kind at a time"
            )
        (name,) = kinds
        options["data_files"] = {"train": sources}
    elif place.is_dir():
        # A name such as "." has no part that `datasets` could call what it makes by.
        name = str(place.resolve())
    elif is_hub_name(sources[0]):
        name = sources[0]
    else:
        raise _no_file(sources[0])
    try:
        if _is_saved(place):
            saved = datasets.load_from_disk(name)
            found = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
            return found.to_iterable_dataset() if streaming else found
        files, features = None, None
        if several or place.exists():
            builder = datasets.load_dataset_builder(name, **options)
            files, kind = _read_here(builder.config), builder.name
        if files is None:
            found = datasets.load_dataset(name, split=split, streaming=streaming, **options)
            return _checked(found, ", ".join(sources))
        if kind != "json":
            tables = [Path(file) for each in files.values() for file in each]
            columns = ["text"] if kind == "text" else _columns_of(tables)
            features = datasets.Features({column: datasets.Value("string") for column in columns})
        elif not streaming:
            found = datasets.load_dataset(name, split=split, **options)
            features = _without_times(found.features)
            if features is None:
                return found
        return _made(files, split, features, streaming)
    # It raises classes of its own, of pyarrow, fsspec and the hub's client, and builtins.
    except Exception as error:
        for told in (error, error.__cause__):
            if isinstance(told, DataError):
                raise told from None
        remedy = "check the name, the split and the network"
        if place.is_dir():
            remedy = f"expected {', '.join(_KINDS)} files of one kind in it; check the split too"
        elif place.exists():
            remedy = "check what it holds, and the split"
        raise DataError(
            f"{', '.join(sources)} cannot be read as a dataset with split {split!r} "
            f"({_one_line(error)}); {remedy}"
        ) from error


def _checked(found: Any, source: str) -> Any:
    """Rows that `datasets` read: of a table with a card, or of the hub, none has lost a field."""
    import datasets

    if found.info.builder_name != "csv":
        return found
    check = functools.partial(_check_fields, source)
    if found.features is not None:
        check(found.features)
    return found if isinstance(found, datasets.Dataset) else found.map(check)


def _check_fields(source: str, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row, or the features of all."""
    if _INDEX in row:
        raise DataError(
            f"{source} has rows of more fields than its header, whose first would be dropped; "
            "write texts that hold the separator in quotes, and name every column"
        )
    return row


def _is_saved(place: Path) -> bool:
    """Whether it is a directory that `save_to_disk` wrote."""
    return all((place / file).is_file() for file in _SAVED)


def _read_here(config: Any) -> dict[str, list[str]] | None:
    """The files by split that are read by `file_rows`; None where `datasets` reads them: other
    kinds, archives, and those of a directory whose card says how."""
    files = {str(split): [str(file) for file in each] for split, each in config.data_files.items()}
    if not all(ending(Path(file)) in READ_HERE for each in files.values() for file in each):
        return None
    usual = type(config)()
    said = {"name", "version", "description", "data_files", "data_dir"}
    if getattr(config, "sep", ",") == "\t":  # of itself, where most files are .tsv
        said |= {"sep"}
    others = (each.name for each in fields(config) if each.name not in said)
    return files if all(getattr(config, name) == getattr(usual, name) for name in others) else None


def _columns_of(tables: Iterable[Path]) -> list[str]:
    return list(dict.fromkeys(column for table in tables for column in table_columns(table)))


def _without_times(features: Any) -> Any:
    """The features with texts for the times that pyarrow makes of texts that look like one; None
    where it made none."""
    import datasets
    import pyarrow as pa  # type: ignore[import-untyped]

    def as_text(kind: Any) -> Any:
        if pa.types.is_temporal(kind):
            return pa.string()
        if pa.types.is_struct(kind):
            return pa.struct([each.with_type(as_text(each.type)) for each in kind])
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return pa.list_(as_text(kind.value_type))
        return kind

    found = {each.name: as_text(each.type) for each in features.arrow_schema}
    if all(found[each.name] == each.type for each in features.arrow_schema):
        return None
    texts = datasets.Features.from_arrow_schema(pa.schema(list(found.items())))
    return datasets.Features(
        {
            name: texts[name] if found[name] != features.arrow_schema.field(name).type else each
            for name, each in features.items()
        }
    )


def _made(
    files: Mapping[str, Sequence[str]], split: str, features: Any, streaming: bool
) -> Dataset | IterableDataset:
    """A dataset of the rows of a split's files, as `file_rows` reads them."""
    import datasets

    def whole(name: str) -> Any:
        # `datasets` knows what it keeps on the disk by these arguments alone.
        states = [Path(file).stat() for file in files[name]]
        arguments = {
            "files": list(files[name]),
            "marks": [[state.st_size, state.st_mtime_ns] for state in states],
            "columns": None if features is None else tuple(features),
        }
        make = datasets.IterableDataset if streaming else datasets.Dataset
        return make.from_generator(
            rows_alone, features=features, gen_kwargs=arguments, split=datasets.NamedSplit(name)
        )

    if split in files:
        return whole(split)
    if streaming or not set(split) & set("[+"):
        raise OptionError(f"expected one of {', '.join(files)}")
    made = {name: whole(name) for name in files}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(
        {name: len(each) for name, each in made.items()}
    )
    return datasets.concatenate_datasets(
        [made[part.splitname].select(range(part.from_, part.to)) for part in parts]
    )


def _read(
    source: DataSource, field: str | None, split: str, strict: bool, teachers: str | None
) -> Documents:
    path = Path(source)
    if path.is_file() and path.suffix == ".txt":
        return Documents(cut_passages(_decode(path), TXT_PASSAGE_CHARS))
    if path.is_file() and path.suffix == ".jsonl":
        # Not splitlines(): JSON allows U+2028 and U+0085 inside a string.
        return _documents(json_lines(_decode(path).split("\n"), path), field, strict, teachers)
    return _documents(placed_rows(source, split), field, strict, teachers)


def placed_rows(source: DataSource, split: str) -> Iterator[tuple[str, Row]]:
    """The rows of a source, each with its place, as they are asked for.

    Raises:
        MissingFileError, DataError: it does not exist, is of another kind, or is damaged.
    """
    check_source(source)
    path = Path(source)
    files = None
    if path.is_dir() and not _is_saved(path):
        files = _files_of(path, split)
    elif path.is_file() and _ending(path) in READ_HERE:
        # A split of one file is refused where the rows are loaded, but of a plain text.
        files = [str(path)] if split == "train" or path.suffix in (".txt", ".jsonl") else None
    if files is None:
        # What is here is read as a stream, which leaves no second copy of it on the disk.
        return numbered(load_rows(source, split=split, streaming=path.exists()), source)
    return (row for file in files for row in file_rows(Path(file)))


def _files_of(folder: Path, split: str) -> list[str] | None:
    """The files of a split of a directory; None where `datasets` reads them, or refuses."""
    with needs_extra():
        import datasets

    try:
        builder = datasets.load_dataset_builder(str(folder.resolve()))
    except Exception:
        return None  # it is told by whoever reads the rows
    return (_read_here(builder.config) or {}).get(split)


def _documents(
    rows: Iterable[tuple[str, Row]],
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
            if isinstance(row, str):
                documents.append(row)
                continue
            documents.append(document_of(row, field=field, source=source))
            if teachers is not None and teachers in row:
                documents.name_teachers(documents[-1], row[teachers])
        except DataError as error:
            if strict and not isinstance(error, BlankTextError):
                raise
            left_out.append(LeftOut(source, reason_of(error, source)))
    documents.left_out = tuple(left_out)
    return documents


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
    if not path.is_file():
        raise _no_file(path)
    if ending(path) not in _KINDS:
        raise DataError(
            f"data file {path} ends in {path.suffix or 'nothing'!r}, expected one of "
            f"{', '.join(_KINDS)}; convert it to one JSON object with a text field per line"
        )
    return ending(path)


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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
