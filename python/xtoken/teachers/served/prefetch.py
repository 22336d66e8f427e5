"""A served teacher as a live source: the next batches are asked for while this one trains."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from xtoken.errors import OptionError, ServerError
from xtoken.losses import TeacherTopK
from xtoken.teachers.predict import padded_signal
from xtoken.teachers.served.teacher import ServedTeacher
from xtoken.teachers.shard import Predictions
from xtoken.teachers.store import TopKStore

Ids = NDArray[np.int64]


# Calls of `announce` whose answers are kept: those of one step, and of the step read ahead.
_HELD = 2


class PrefetchedTeacher:
    """A teacher source that is ahead of the training.

    What is ahead is known in one of two ways: `batches` has the order of all calls, or `announce`
    is told of the next ones as they become known, as the trainers do.

    Args:
        source: the server.
        batches: the sequences of each call of `signal`, in the order of the calls. What is asked
            for and was not among them is answered too, without the head start.
        ahead: batches that may wait for their call.
        store: read first, and filled with what arrives; None keeps answers until they are used.

    Example: with a list of batches in the sampler's order,
        `PrefetchedTeacher(teacher, ([e.teacher_ids for e in batch] for batch in order))`.
    """

    def __init__(
        self,
        source: ServedTeacher,
        batches: Iterable[Sequence[Ids]] = (),
        *,
        ahead: int = 2,
        store: TopKStore | None = None,
    ) -> None:
        if ahead < 1:
            raise OptionError(f"ahead = {ahead}, expected at least 1")
        self.source = source
        self.store = store
        # Guards all below; told when an answer is used.
        self._changed = threading.Condition()
        self._waiting: dict[bytes, Future[Predictions]] = {}
        # Of `batches`: announced and not used yet; below 0 for what was used before its turn.
        self._announced: Counter[bytes] = Counter()
        self._batches: list[set[bytes]] = []
        self._ahead = ahead
        # Of `announce`: what is kept, and what is still to be asked for.
        self._held: deque[set[bytes]] = deque()
        self._jobs: deque[tuple[dict[bytes, Ids], dict[bytes, Future[Predictions]]]] = deque()
        self._worker: threading.Thread | None = None
        self._closed = threading.Event()
        self._feeding = True
        self._thread = threading.Thread(
            target=self._feed, args=(batches,), name="teacher-prefetch", daemon=True
        )
        self._thread.start()

    @property
    def fingerprint(self) -> str:
        """That of the server."""
        return self.source.fingerprint

    def announce(self, sequences: Iterable[Ids]) -> None:
        """Ask for sequences in the background, after what was announced before.

        Their answers are kept, however often they are used, until the call after the next one.

        Args:
            sequences: [T] int64 each; empty ones are left out.

        Raises:
            ServerError: this teacher was closed.
        """
        group = {ids.tobytes(): ids for ids in sequences if len(ids)}
        with self._changed:
            if self._closed.is_set():
                raise _closed_error()
            self._held.append(set(group))
            if len(self._held) > _HELD:
                self._forget(self._held.popleft())
            new = {key: ids for key, ids in group.items() if key not in self._waiting}
            if not new:
                return
            futures: dict[bytes, Future[Predictions]] = {key: Future() for key in new}
            self._waiting |= futures
            self._jobs.append((new, futures))
            if self._worker is None:  # one that has nothing left to do has ended
                self._worker = threading.Thread(
                    target=self._work, name="teacher-announced", daemon=True
                )
                self._worker.start()

    def signal(self, ids: Tensor, attention_mask: Tensor) -> TeacherTopK:
        """The predictions of a padded batch, waiting for those that are under way.

        Raises:
            ServerError: the server died, refused, or gave an answer that cannot be used.
        """
        rows = [
            row[mask.bool()].numpy()
            for row, mask in zip(ids.cpu(), attention_mask.cpu(), strict=True)
        ]
        distinct = {row.tobytes(): row for row in rows}
        with self._changed:
            mine = {key: row for key, row in distinct.items() if key not in self._waiting}
            # Among the waiting at once, so that the thread does not ask for them too.
            self._waiting |= {key: Future() for key in mine}
            futures = {key: self._waiting[key] for key in distinct}
        try:
            self._settle(mine, {key: futures[key] for key in mine})
            found = {key: future.result() for key, future in futures.items()}
        finally:
            self._use(distinct)
        return padded_signal(
            lambda row: found[row.tobytes()],
            ids,
            attention_mask,
            self.source.vocab_fingerprint,
        )

    def _use(self, keys: Iterable[bytes]) -> None:
        with self._changed:
            for key in keys:
                # Of what `batches` cannot name any more no count is kept.
                if self._announced[key] > 0 or self._feeding:
                    self._announced[key] -= 1
                if self._announced[key] == 0:
                    del self._announced[key]
                future = self._waiting.get(key)
                failed = future is not None and future.done() and future.exception() is not None
                self._forget([key], even_held=failed)
            self._batches = [batch for batch in self._batches if batch & self._waiting.keys()]
            self._changed.notify_all()

    def _forget(self, keys: Iterable[bytes], *, even_held: bool = False) -> None:
        """Drop the answers that no later call was announced for."""
        for key in keys:
            held = not even_held and any(key in group for group in self._held)
            if not held and self._announced[key] <= 0:
                self._waiting.pop(key, None)

    def _settle(
        self, sequences: dict[bytes, Ids], futures: dict[bytes, Future[Predictions]]
    ) -> None:
        missing = dict(sequences)
        try:
            if self.store is not None:
                for key, ids in sequences.items():
                    if ids in self.store:
                        futures[key].set_result(self.store.get(ids))
                        del missing[key]
            for answered in self.source.answers(missing.values(), spread=True):
                if self.store is not None:
                    self.store.add(answered.sequences, answered.predictions)
                for ids, found in zip(answered.sequences, answered.predictions, strict=True):
                    futures[ids.tobytes()].set_result(found)
        except BaseException as error:
            for future in futures.values():
                if not future.done():
                    future.set_exception(error)
            raise

    def _feed(self, batches: Iterable[Sequence[Ids]]) -> None:
        try:
            self._run(batches)
        finally:
            with self._changed:
                self._feeding = False
                self._announced = +self._announced  # no batch will name what was used before

    def _run(self, batches: Iterable[Sequence[Ids]]) -> None:
        for batch in batches:
            announced = {ids.tobytes(): ids for ids in batch if len(ids)}
            new: dict[bytes, Ids] = {}
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed.is_set() or len(self._batches) < self._ahead
                )
                if self._closed.is_set():
                    return
                for key, ids in announced.items():
                    self._announced[key] += 1
                    if self._announced[key] > 0 and key not in self._waiting:
                        new[key] = ids
                        self._waiting[key] = Future()
                    if self._announced[key] == 0:  # used before its turn
                        del self._announced[key]
                if waiting := set(announced) & self._waiting.keys():
                    self._batches.append(waiting)
                futures = {key: self._waiting[key] for key in new}
            try:
                self._settle(new, futures)
            # Told by the futures to the call that waits for them; later calls ask themselves.
            except Exception:
                return

    def _work(self) -> None:
        """Ask for what was announced, one call after another, until nothing is left."""
        failure: Exception | None = None
        while True:
            with self._changed:
                if not self._jobs:
                    self._worker = None
                    return
                sequences, futures = self._jobs.popleft()
                if self._closed.is_set():
                    failure = _closed_error()
            if failure is not None:
                # A server that failed for good is not asked for the rest too.
                for future in futures.values():
                    future.set_exception(failure)
                continue
            try:
                self._settle(sequences, futures)
            # Told by the futures to the call that waits for them; later calls ask themselves.
            except Exception as error:
                failure = error

    def close(self) -> None:
        """End the threads after the requests that are under way."""
        with self._changed:
            self._closed.set()
            self._changed.notify_all()
            worker = self._worker
        self._thread.join()
        if worker is not None:
            worker.join()

    def __enter__(self) -> PrefetchedTeacher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _closed_error() -> ServerError:
    return ServerError("the prefetched teacher was closed; make another one to go on")
