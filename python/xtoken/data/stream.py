"""Documents of a corpus that is larger than memory: read as they are asked for, never kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from xtoken.data.file_rows import TXT_PASSAGE_CHARS, Row
from xtoken.data.read import DataSource, as_sources, check_source, load_rows, placed_rows
from xtoken.data.rows import Document, document_of, reason_of
from xtoken.errors import DataError

_BLOCK_CHARS = 1 << 20


@dataclass(frozen=True)
class StreamedRow:
    """A row of a stream.

    Args:
        source: its place.
        document: what it holds; None where it cannot be used.
        reason: why it cannot, in a few words.
        teachers: what the column says that names its teachers.
        names_teachers: whether there is that column.
    """

    source: str
    document: Document | None
    reason: str = ""
    teachers: object = None
    names_teachers: bool = False


class DocumentStream:
    """The documents of files, directories and hub datasets, one pass for each iteration.

    Nothing is kept: texts, tables and `.jsonl` are read a line at a time, packed or not, all else
    by `datasets` as a stream. A row that cannot be used comes with its reason, so that whoever
    reads can count it.

    Args:
        source, field, split, teacher_column: see `read_documents`.

    Raises:
        MissingFileError, DataError: a source does not exist, or is of another kind.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "texts.jsonl")
    >>> _ = path.write_text('{"text": "one"}\\n{"text": " "}\\n')
    >>> [(row.document, row.reason) for row in DocumentStream(path)]
    [('one', ''), (None, 'its text is blank')]
    """

    def __init__(
        self,
        source: DataSource | Sequence[DataSource],
        *,
        field: str | None = None,
        split: str = "train",
        teacher_column: str | None = None,
    ) -> None:
        self.sources = as_sources(source)
        for each in self.sources:
            check_source(each)
        self.field = field
        self.split = split
        self.teacher_column = teacher_column

    def __iter__(self) -> Iterator[StreamedRow]:
        """One pass, in order.

        Raises:
            DataError: a source is damaged, or cannot be read as a stream.
        """
        for source in self.sources:
            for place, row in placed_rows(source, self.split):
                yield self._read(place, row)

    def _read(self, place: str, row: Row) -> StreamedRow:
        if isinstance(row, str):
            return StreamedRow(place, row)
        try:
            if isinstance(row, DataError):
                raise row
            document = document_of(row, field=self.field, source=place)
        except DataError as error:
            return StreamedRow(place, None, reason_of(error, place))
        column = self.teacher_column
        if column is None:
            return StreamedRow(place, document)
        return StreamedRow(place, document, teachers=row.get(column), names_teachers=column in row)

    def expected_rows(self) -> int | None:
        """About how many rows a pass has: as Parquet and the hub say, and by the size of files of
        text; None where nobody says."""
        counts = [self._expected(source) for source in self.sources]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def _expected(self, source: DataSource) -> int | None:
        path = Path(source)
        if path.suffix == ".parquet" and path.is_file():
            from pyarrow import parquet  # type: ignore[import-untyped]

            return int(parquet.read_metadata(path).num_rows)
        if path.is_file() and path.suffix in (".jsonl", ".txt"):
            with path.open("rb") as file:
                head = file.read(_BLOCK_CHARS)
            rows = head.count(b"\n")
            if path.suffix == ".txt":
                rows = -(-len(head) // TXT_PASSAGE_CHARS)
            return max(1, round(path.stat().st_size / max(len(head), 1) * rows))
        if path.exists():
            return None
        info = load_rows(source, split=self.split, streaming=True).info
        split = (info.splits or {}).get(self.split)
        return None if split is None or not split.num_examples else int(split.num_examples)

    @property
    def fingerprint(self) -> str:
        """Hex digest of what is read: names and sizes of files, not their content, which only a
        pass over all of it would know."""
        digest = hashlib.sha256(repr((self.field, self.split, self.teacher_column)).encode())
        for source in self.sources:
            path = Path(source)
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            sizes = [(each.name, each.stat().st_size) for each in files if each.is_file()]
            digest.update(repr(sizes or str(source)).encode())
        return digest.hexdigest()
