"""Fill a store with a teacher's predictions of a corpus: how much it takes, and who may."""

from __future__ import annotations

import contextlib
import datetime
import math
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from xtoken._checks import token_limit
from xtoken._core import Vocab
from xtoken._files import writes
from xtoken._locks import locked_alone
from xtoken.data.chat_template import Rendering
from xtoken.data.documents import LeftOut
from xtoken.data.encode import Encoder, print_document
from xtoken.data.loss_mask import is_predicted
from xtoken.data.rows import Document
from xtoken.errors import DataError, StoreError
from xtoken.teachers.live import LiveTeacher
from xtoken.teachers.served.fill import fill_store
from xtoken.teachers.served.teacher import ServedTeacher
from xtoken.teachers.store import TOKENS_PER_FORWARD, TOKENS_PER_SHARD, TopKStore
from xtoken.vocab.source import LoadedTokenizer

Ids: TypeAlias = NDArray[np.int64]

_LOCK_FILE = ".teach.lock"
# Forward passes, or requests, that an estimate is measured on.
_MEASURED_BATCHES = 4
_DOCUMENTS_AT_ONCE = 256


@dataclass(frozen=True)
class Estimate:
    """What filling a store will take, measured on a few batches, which are stored already.

    Attributes:
        sequences, tokens: of the corpus.
        tokens_left: that are still to be computed.
        bytes_per_token: on the disk; NaN where nothing was left to measure.
        tokens_per_second: the same.
    """

    sequences: int
    tokens: int
    tokens_left: int
    bytes_per_token: float
    tokens_per_second: float

    @property
    def bytes_left(self) -> int:
        """Disk space for what is left; 0 where nothing was measured."""
        size = self.tokens_left * self.bytes_per_token
        return 0 if math.isnan(size) else int(size)

    @property
    def seconds_left(self) -> float:
        """Time for what is left; 0 where nothing was measured."""
        seconds = self.tokens_left / self.tokens_per_second
        return 0.0 if math.isnan(seconds) else seconds


class SequenceReader:
    """Makes of documents what a teacher reads; see `teacher_sequences`.

    Args:
        tokenizer, max_tokens, vocab, date, generation_config: as there.

    Raises:
        OptionError: `max_tokens` is no whole number of at least 2.
    """

    def __init__(
        self,
        tokenizer: LoadedTokenizer,
        *,
        max_tokens: int | None = None,
        vocab: Vocab | None = None,
        date: datetime.date | None = None,
        generation_config: object = None,
    ) -> None:
        limit = token_limit(max_tokens)  # before the tokenizer, which takes seconds
        self._encoder = Encoder(
            tokenizer, "teacher", vocab=vocab, date=date, generation_config=generation_config
        )
        self._end = (vocab or Vocab.from_tokenizer(tokenizer)).roles.get("eos")
        self._max_tokens = limit

    def read(self, rows: Sequence[tuple[str, Document]]) -> tuple[list[Ids], list[LeftOut]]:
        """[T] int64 each, distinct, of documents with their places; and those documents in which
        there is no token to predict.

        Raises:
            DataError: a conversation cannot be printed.
        """
        encoder, limit, end = self._encoder, self._max_tokens, self._end
        made = [
            (row[0], index)
            for index, (_, document) in enumerate(rows)
            for row in print_document(document, [encoder])
        ]
        sides = encoder.encode([item for item, _ in made], max_tokens=limit)
        found: dict[bytes, Ids] = {}
        used: set[int] = set()
        for (item, index), encoded in zip(made, sides, strict=True):
            ids, mask = encoded.ids[:limit], encoded.loss_mask[:limit]
            if not is_predicted(mask):
                continue
            room = limit is None or len(encoded.ids) < limit
            if end is not None and room and not isinstance(item, Rendering) and ids[-1] != end:
                ids = np.append(ids, end)
            found[ids.tobytes()] = ids
            used.add(index)
        empty = [
            LeftOut(source, "no token to predict")
            for index, (source, _) in enumerate(rows)
            if index not in used
        ]
        return list(found.values()), empty

    def read_usable(self, rows: Sequence[tuple[str, Document]]) -> tuple[list[Ids], list[LeftOut]]:
        """What `read` gives, with those that cannot be printed among the documents left out."""
        try:
            return self.read(rows)
        except DataError as error:
            if len(rows) == 1:
                return [], [LeftOut(rows[0][0], str(error))]
        half = len(rows) // 2
        first, second = (self.read_usable(part) for part in (rows[:half], rows[half:]))
        return first[0] + second[0], first[1] + second[1]

    def read_all(
        self, documents: Sequence[Document], *, strict: bool = False
    ) -> tuple[list[Ids], list[LeftOut]]:
        """The sequences of a corpus, and the documents that are left out.

        Args:
            strict: whether a conversation that cannot be printed ends the call.

        Raises:
            DataError: there is nothing to predict.
        """
        rows = [(getattr(each, "source", f"documents[{at}]"), each)
                for at, each in enumerate(documents)]  # fmt: skip
        read = self.read if strict else self.read_usable
        found: dict[bytes, Ids] = {}
        left_out: list[LeftOut] = []
        for start in range(0, len(rows), _DOCUMENTS_AT_ONCE):
            sequences, unusable = read(rows[start : start + _DOCUMENTS_AT_ONCE])
            found |= {ids.tobytes(): ids for ids in sequences}
            left_out += unusable
        if not found:
            first = f" ({left_out[0].source}: {left_out[0].reason})" if left_out else ""
            raise DataError(
                f"none of the {len(documents):,} documents has a token that can be predicted "
                f"within max_tokens = {self._max_tokens}{first}; give longer texts, or raise it"
            )
        return list(found.values()), left_out


def teacher_sequences(
    documents: Sequence[Document],
    tokenizer: LoadedTokenizer,
    *,
    max_tokens: int | None = None,
    vocab: Vocab | None = None,
    date: datetime.date | None = None,
    generation_config: object = None,
) -> list[Ids]:
    """What a teacher reads of documents: the tokens that any student's examples begin with.

    Documents without a token to predict are left out, with a warning.

    After a text that is whole stands the teacher's end of text, which some trainers append.

    Args:
        documents: texts and conversations.
        tokenizer: of the teacher, with a chat template for conversations.
        max_tokens: longer ones lose their tail; None for no limit.
        vocab, date, generation_config: as `Encoder` takes them.

    Returns: [T] int64 each, distinct, in the order of the documents.

    Raises:
        OptionError: `max_tokens` is no whole number of at least 2.
        DataError: a conversation cannot be printed, or there is nothing to predict.
    """
    reader = SequenceReader(
        tokenizer, max_tokens=max_tokens, vocab=vocab, date=date,
        generation_config=generation_config,
    )  # fmt: skip
    found, left_out = reader.read_all(documents, strict=True)
    if left_out:
        warnings.warn(
            f"{len(left_out):,} of {len(documents):,} documents are left out; the first, "
            f"{left_out[0].source}: {left_out[0].reason}",
            stacklevel=2,
        )
    return found


def estimate(
    store: TopKStore, source: LiveTeacher | ServedTeacher, sequences: Sequence[Ids]
) -> Estimate:
    """Measure the size and time of filling a store on a few batches, which are kept in it.

    Raises:
        StoreError, ServerError, FailedWriteError: as `fill_store`.
    """
    distinct = {ids.tobytes(): ids for ids in sequences}
    missing = sorted((ids for ids in distinct.values() if ids not in store), key=len)
    # Of all lengths; the first batch warms up and is not timed.
    left = len(missing)
    step = max(1, sum(map(len, missing)) // (_MEASURED_BATCHES * TOKENS_PER_FORWARD))
    picked = missing[step // 2 :: step]
    warm, timed = picked[::_MEASURED_BATCHES], []
    if len(picked) > 1:
        timed = [ids for index, ids in enumerate(picked) if index % _MEASURED_BATCHES]
    fill_store(store, source, warm)
    before = store.file_bytes - store.prior_bytes
    began = time.perf_counter()
    fill_store(store, source, timed)
    seconds = time.perf_counter() - began
    tokens = sum(map(len, timed))
    grown = store.file_bytes - store.prior_bytes - before
    # A file of many texts has one prior, however few there are in these.
    of_file = store.prior_bytes / max(store.files, 1) / TOKENS_PER_SHARD
    done = sum(map(len, warm)) + tokens
    return Estimate(
        sequences=len(distinct),
        tokens=sum(map(len, distinct.values())),
        tokens_left=sum(map(len, missing)) - done if left else 0,
        bytes_per_token=grown / tokens + of_file if tokens else float("nan"),
        tokens_per_second=tokens / seconds if tokens and seconds else float("nan"),
    )


def check_space(store: TopKStore, found: Estimate) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        StoreError: names both sizes.
    """
    free = shutil.disk_usage(store.directory).free
    if found.bytes_left > free:
        raise StoreError(
            f"the store in {store.directory} needs about {found.bytes_left / 1e9:,.1f} GB more, "
            f"and {free / 1e9:,.1f} GB are free; use another disk, or keep less: a smaller mass "
            "or top_k, dtype uint8 or spread"
        )


@contextlib.contextmanager
def filling(directory: Path | str) -> Iterator[None]:
    """Hold a store's folder for one process that fills it.

    Raises:
        StoreError: another process does.
        NoLockError: its file system has no locks.
    """
    folder = Path(directory)
    with writes(folder):
        folder.mkdir(parents=True, exist_ok=True)
    refused = StoreError(f"another process fills {folder}; wait for its end, or use another folder")
    with locked_alone(folder / _LOCK_FILE, refused):
        yield
