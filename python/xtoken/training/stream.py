"""The training part of a stream: endless shuffled passes that begin where a run was interrupted."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch

from xtoken.data.documents import TextSplit, unit_hash
from xtoken.data.rows import Document
from xtoken.data.stream import DocumentStream, StreamedRow
from xtoken.errors import DataError, OptionError

HEAD_ROWS = 5_000
"""Rows from the beginning of a stream that its held-out texts are taken from."""

SAMPLE = 256
"""Training texts from there that stand for the whole: coverage, estimates, the run's identity."""

SHUFFLE_BUFFER = 10_000


@dataclass(frozen=True, eq=False)
class TrainingStream(torch.utils.data.IterableDataset[StreamedRow]):
    """Rows of a corpus without end: pass after pass, each shuffled within a buffer.

    The order depends on the seed alone, not on the workers of the loader, so that `skip` rows later
    a resumed run sees what an uninterrupted one does. Rows that cannot be used are among them: the
    collator counts them.

    Args:
        source: of the documents.
        held_out: documents that are never trained on.
        seed: of the order.
        buffer: rows held at once to draw the next one from; 1 keeps their order.
        block: rows that one worker reads before the next one's turn: a micro-batch of all
            processes.
        skip: rows that were trained on before.
    """

    source: DocumentStream
    held_out: Collection[Document] = field(default=(), repr=False)
    seed: int = 0
    buffer: int = SHUFFLE_BUFFER
    block: int = 1
    skip: int = 0

    def __post_init__(self) -> None:
        for name in ("buffer", "block"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} = {getattr(self, name)}, expected at least 1")
        object.__setattr__(self, "held_out", frozenset(self.held_out))

    def starting(self, skip: int, block: int) -> TrainingStream:
        """The same rows without the first ones."""
        return replace(self, skip=skip, block=block)

    @property
    def fingerprint(self) -> str:
        """What says that two streams give the same rows, as far as file sizes tell."""
        return f"{self.source.fingerprint}:{self.buffer}"

    def __iter__(self) -> Iterator[StreamedRow]:
        """The rows of this worker.

        Raises:
            DataError: a pass gave no row, or a source is damaged.
        """
        worker = torch.utils.data.get_worker_info()
        workers, own = (1, 0) if worker is None else (worker.num_workers, worker.id)
        for index, row in enumerate(itertools.islice(self._endless(), self.skip, None)):
            if index // self.block % workers == own:
                yield row

    def _endless(self) -> Iterator[StreamedRow]:
        for number in itertools.count():
            count = 0
            for row in shuffled(self._pass(), self.buffer, random.Random(f"{self.seed}/{number}")):
                count += 1
                yield row
            if not count:
                raise DataError("the stream holds no row to train on; give more texts")
            if number == 0:
                warnings.warn(
                    f"the data ended after {count:,} rows, and are read from their beginning again",
                    stacklevel=2,
                )

    def _pass(self) -> Iterator[StreamedRow]:
        return (row for row in self.source if row.document not in self.held_out)


def shuffled(
    rows: Iterable[StreamedRow], buffer: int, draw: random.Random
) -> Iterator[StreamedRow]:
    """Rows in the order in which they are drawn from a buffer that is kept full."""
    held: list[StreamedRow] = []
    for row in rows:
        if len(held) < buffer:
            held.append(row)
            continue
        at = draw.randrange(buffer)
        yield held[at]
        held[at] = row
    draw.shuffle(held)
    yield from held


@dataclass(frozen=True)
class StreamHead:
    """What is read of a stream before training.

    Attributes:
        texts: a sample of the training texts, and the held-out ones.
        rows: how many rows they were taken from.
        unusable: those of them that hold no document.
        teachers: of a document in the sample, what names its teachers.
    """

    texts: TextSplit
    rows: int
    unusable: tuple[StreamedRow, ...]
    teachers: dict[Document, object]


def read_head(
    source: DocumentStream, fraction: float, held_out: Collection[Document] | None = None
) -> StreamHead:
    """The held-out texts of a stream and a sample of the others.

    Args:
        fraction: of the first `HEAD_ROWS` rows, by hash as `split_held_out`: a corpus that ends
            before has the held-out texts that it has in memory.
        held_out: given ones, in place of them.

    Raises:
        DataError: one of both is empty, or no row has the column that names its teachers.
    """
    kept: dict[Document, None] = {}
    sample: dict[Document, None] = {}
    teachers: dict[Document, object] = {}
    unusable = []
    given = None if held_out is None else frozenset(held_out)
    count = 0
    named = source.teacher_column is None
    for row in itertools.islice(source, HEAD_ROWS):
        count += 1
        document = row.document
        named = named or row.names_teachers
        if document is None:
            unusable.append(row)
        elif given is None and unit_hash(document) < fraction:
            kept[document] = None
        elif len(sample) < SAMPLE and (given is None or document not in given):
            sample[document] = None
            teachers[document] = row.teachers
        if given is not None and len(sample) == SAMPLE:
            break
    parts = list(sample), list(kept if held_out is None else dict.fromkeys(held_out))
    if not all(parts):
        reason = f"; the first that cannot be used, {unusable[0].source}: {unusable[0].reason}"
        raise DataError(
            f"the first {count:,} rows of the stream give {len(parts[0])} texts for training and "
            f"{len(parts[1])} held out{reason if unusable else ''}; give more texts, or --held-out"
        )
    if not named:
        raise DataError(
            f"none of the first {count:,} rows of the stream has a column "
            f"{source.teacher_column!r}, which was to name its teachers; pass another name"
        )
    return StreamHead(TextSplit(*parts, dropped=0), count, tuple(unusable), teachers)
