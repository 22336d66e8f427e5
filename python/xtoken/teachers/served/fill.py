"""Fill a store with a teacher's predictions; what is there is never asked for again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from xtoken.errors import OptionError, ServerError, StoreError, UnavailableServerError
from xtoken.teachers.live import LiveTeacher
from xtoken.teachers.packed import StoreDtype
from xtoken.teachers.served.probe import Probe
from xtoken.teachers.served.teacher import ServedTeacher
from xtoken.teachers.shard import StoreKey
from xtoken.teachers.store import ShardWriter, TopKStore

Ids = NDArray[np.int64]

_DESCRIPTION = "served.json"


class ProgressReporter(Protocol):
    """The part of `xtoken.training.prepare.Reporter` that is told here."""

    def progress(
        self, title: str, total: int
    ) -> AbstractContextManager[Callable[[int, str], None]]:
        """Open a bar; the context gives a function that takes the amount done and a remark."""


@dataclass(frozen=True)
class Filled:
    """What filling a store took.

    Attributes:
        sequences, tokens: that had to be asked for.
        seconds: of the whole call.
    """

    sequences: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """The rate over the whole call."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def open_store(
    directory: Path | str,
    source: ServedTeacher,
    dtype: StoreDtype = "float32",
    mass: float | None = None,
) -> TopKStore:
    """The store of a served teacher in a folder, which is made if absent.

    Args:
        dtype, mass: what is kept of the answers, see `StoreKey`.

    The folder keeps the server's answer to a fixed prompt beside the predictions. A server that
    rounds differently from one start to the next is recognised by it.

    Raises:
        StoreError: the folder holds predictions of another model or setting.
        OptionError: a mass with chosen ids, which it would drop.
        PairError: it holds predictions of another tokenizer.
        ServerError: the server cannot be reached, or serves something else than expected.
    """
    path = Path(directory) / _DESCRIPTION
    if path.exists():
        known = Probe.load(path)
        if not source.recognise(known):
            raise StoreError(
                f"{directory} was filled by {known.model} (digest {known.digest[:12]}), "
                f"{source.connection.url} serves {source.model} (digest "
                f"{source.probe.digest[:12]}), which answers differently; use another folder"
            )
    if dtype == "spread":
        raise OptionError(
            "dtype = 'spread' needs the teacher's full logits, of which a server gives the "
            "likeliest columns; pass uint8, float16 or float32"
        )
    if mass is not None and source.chosen is not None:
        raise OptionError(
            f"mass = {mass} would drop chosen ids; pass mass=None, or a teacher without chosen="
        )
    key = StoreKey(source.fingerprint, source.width, dtype, source.vocab_fingerprint, mass)
    # What a server was asked for must not be lost with the process.
    store = TopKStore(directory, key)
    if not path.exists():
        source.probe.save(path)
    return store


def fill_store(
    store: TopKStore,
    source: ServedTeacher | LiveTeacher,
    sequences: Iterable[Ids],
    reporter: ProgressReporter | None = None,
    *,
    title: str = "teacher predictions",
) -> Filled:
    """Get what a store lacks of some sequences, and write each answer as it comes.

    A call that was ended at any moment can be repeated: only what had not arrived is asked for.

    Args:
        store: of this teacher; from `open_store` where it is served.
        source: asked for what is missing.
        sequences: [T] int64 each, teacher ids; empty ones are left out.
        reporter: told of the tokens done, with tokens per second and the time left.
        title: of the progress bar.

    Raises:
        StoreError: the store is of another teacher.
        ServerError: the server died or refused; what arrived before is stored.
    """
    if source.fingerprint != store.key.teacher:
        raise StoreError(
            f"the store in {store.directory} is for teacher {store.key.teacher}, this one is "
            f"{source.fingerprint}; use another folder"
        )
    distinct = {ids.tobytes(): ids for ids in sequences if len(ids)}
    missing = sorted((ids for ids in distinct.values() if ids not in store), key=len)
    total = sum(map(len, missing))
    began = time.monotonic()
    bar: AbstractContextManager[Callable[[int, str], None]] = contextlib.nullcontext(_tell_nobody)
    if reporter is not None:
        bar = reporter.progress(title, total)
    with bar as update:

        def report(done: int, whole: int) -> None:
            update(done, pace(done, whole, time.monotonic() - began))

        if isinstance(source, LiveTeacher):
            store.fill(source, missing, progress=report)
        else:
            _ask(store, source, missing, total, report)
    return Filled(len(missing), total, time.monotonic() - began)


def _ask(
    store: TopKStore,
    source: ServedTeacher,
    missing: list[Ids],
    total: int,
    report: Callable[[int, int], None],
) -> None:
    def confirm() -> None:
        # A server that has answered all may have ended since.
        with contextlib.suppress(UnavailableServerError):
            source.require_same_model(retries=0)

    writer = ShardWriter(store, confirm)
    sequences = done = 0
    try:
        for answered in source.answers(missing):
            writer.add(answered.sequences, answered.predictions)
            sequences += len(answered.sequences)
            done += answered.tokens
            report(done, total)
        writer.merge()
    except ServerError as error:
        stored = sum(len(ids) for ids in missing if ids in store)
        raise ServerError(
            f"{error} ({stored:,} of {total:,} tokens arrived and are stored in "
            f"{store.directory}; the same call asks for the rest alone)"
        ) from error
    finally:
        store.sequences_computed += sequences


def _tell_nobody(done: int, remark: str) -> None:
    pass


def pace(done: int, total: int, seconds: float) -> str:
    """Tokens per second and the time left, as in `1,250 tokens/s, 3 min left`."""
    if done == 0 or seconds <= 0:
        return ""
    rate = done / seconds
    left = (total - done) / rate
    if left < 90:
        words = f"{left:.0f} s"
    elif left < 5400:
        words = f"{left / 60:.0f} min"
    else:
        words = f"{left / 3600:.1f} h"
    return f"{rate:,.0f} tokens/s, {words} left"
