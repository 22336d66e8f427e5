"""`xtoken teach --streaming`: predictions of a corpus that is larger than memory, as it is read."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from xtoken.cli.console import Bars, warn_of_left_out
from xtoken.data import Document, LeftOut
from xtoken.data.stream import DocumentStream, StreamedRow
from xtoken.errors import DataError
from xtoken.teachers import LiveTeacher, TopKStore
from xtoken.teachers.served import ServedTeacher, fill_store
from xtoken.teachers.store_notes import StoreNotes
from xtoken.teachers.teach import Estimate, Ids, SequenceReader, estimate
from xtoken.training.prepare import Update
from xtoken.training.processes import process_count, process_index

ROWS_AT_ONCE = 512


class SequenceStream:
    """The teacher sequences of a stream, some rows at a time.

    Attributes:
        rows: read so far.
        named, left_out: of them, what cannot be used: the first, and how many they are.
        watch: told of the sequences before they are given.
    """

    watch: Callable[[list[Ids]], object] | None = None

    def __init__(self, source: DocumentStream, reader: SequenceReader) -> None:
        self.source = source
        self._reader = reader
        self._begin()

    def _begin(self) -> None:
        self.rows = self.left_out = 0
        self.named: list[LeftOut] = []

    def __iter__(self) -> Iterator[list[Ids]]:
        """One pass: the sequences of some rows, and of the next ones."""
        self._begin()
        rows = iter(self.source)
        while batch := list(itertools.islice(rows, ROWS_AT_ONCE)):
            sequences, unusable = self._reader.read_usable(list(self._documents(batch)))
            self._leave_out(unusable)
            self.rows += len(batch)
            if self.watch is not None:
                self.watch(sequences)
            yield sequences

    def first(self) -> list[Ids]:
        """The sequences of the first rows that have any; none where no row has."""
        return next(filter(None, self), [])

    def _documents(self, batch: list[StreamedRow]) -> Iterator[tuple[str, Document]]:
        for row in batch:
            if row.document is None:
                self._leave_out([LeftOut(row.source, row.reason)])
            else:
                yield row.source, row.document

    def _leave_out(self, rows: list[LeftOut]) -> None:
        self.left_out += len(rows)
        self.named += rows[: 3 - len(self.named)] if len(self.named) < 3 else []


def first_estimate(
    store: TopKStore, source: LiveTeacher | ServedTeacher, stream: SequenceStream
) -> Estimate:
    """Size and time of a stream, measured on its first rows; by its expected length where that is
    known, else of these rows alone.

    Raises:
        DataError: no row has anything to predict.
    """
    first = stream.first()
    if not first:
        told = f" ({stream.named[0].source}: {stream.named[0].reason})" if stream.named else ""
        raise DataError(
            f"none of the {stream.rows:,} rows has a token to predict{told}; give longer texts"
        )
    # Each process has its part of them, and works at the same rate.
    found = estimate(store, source, first[process_index() :: process_count()])
    found = replace(
        found,
        sequences=len(first),
        tokens=sum(map(len, first)),
        tokens_left=found.tokens_left * process_count(),
        tokens_per_second=found.tokens_per_second * process_count(),
    )
    expected = stream.source.expected_rows()
    if expected is None:
        return found
    times = max(1.0, expected / stream.rows)
    # What is stored of them says nothing of the rest: all of it is to be done.
    rest = round(found.tokens * (times - 1))
    return replace(
        found,
        sequences=round(found.sequences * times),
        tokens=found.tokens + rest,
        tokens_left=found.tokens_left + rest,
    )


def fill_streamed(
    store: TopKStore,
    source: LiveTeacher | ServedTeacher,
    stream: SequenceStream,
    notes: StoreNotes,
    bars: Bars,
) -> StoreNotes:
    """Compute what a store lacks of a stream, and return the notes with what there was.

    Under torchrun each process computes its part of each batch.

    Raises:
        StoreError, ServerError, FailedWriteError: as `fill_store`.
    """
    tokens = computed = 0
    # Of eight bytes each: the store itself remembers more of them.
    seen: set[int] = set()
    began = time.monotonic()
    expected = stream.source.expected_rows()
    with bars.progress("teacher predictions, by text", expected) as update:
        for found in stream:
            own = found[process_index() :: process_count()]
            within = _Within(update, stream.rows, computed, began)
            computed += fill_store(store, source, own, within).tokens
            for ids in found:
                known = len(seen)
                seen.add(hash(ids.tobytes()))
                tokens += len(ids) if len(seen) > known else 0
            within.show(0)
    warn_of_left_out(bars.console, stream.named, stream.rows, "rows", count=stream.left_out)
    return replace(notes, sequences=len(seen), tokens=tokens)


class _Within:
    """Shows the progress of one batch on the bar of all."""

    def __init__(self, update: Update, rows: int, before: int, began: float) -> None:
        self._update = update
        self._rows = rows
        self._before = before
        self._began = began

    def show(self, done: int) -> None:
        """With so many tokens of this batch."""
        seconds = time.monotonic() - self._began
        rate = f"{(self._before + done) / seconds:,.0f} tokens/s" if seconds > 0 else ""
        self._update(self._rows, rate)

    @contextlib.contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """As `fill_store` calls it."""
        yield lambda done, remark: self.show(done)
