"""Alignments that were made before: in memory, and on disk for other epochs and processes."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from xtoken._core import OptionError, ShapeError, TokenIdError
from xtoken._ids import Ids, as_ids
from xtoken.aligner import Aligner
from xtoken.alignment import Alignment, AlignmentBatch
from xtoken.data.alignment_store import AlignmentStore

_KEY_BYTES = 16
_DEFAULT_MEMORY = 256 * 2**20


@dataclass(frozen=True)
class CacheCounts:
    """What became of the pairs of sequences that a cache was asked for."""

    memory_hits: int = 0
    disk_hits: int = 0
    computed: int = 0
    damaged: int = 0
    """Stored alignments that were found damaged; they count as computed as well."""


class AlignmentCache:
    """Aligns through a store of earlier answers: a second epoch computes nothing.

    An answer is found by all that it depends on: both vocabularies, the aligner's options and both
    id sequences. The cache may be shared by threads; processes may share its directory, each
    writing a file of its own, and see what the others wrote. It may be sent to other processes,
    where it starts with empty memory on the same directory.

    Args:
        directory: where answers are kept on disk; None keeps them in memory only.
        max_memory: bytes of arrays kept in memory; the least recently used go first.

    Raises:
        OptionError: max_memory < 0.
        OSError: the directory cannot be made or read.
    """

    def __init__(
        self,
        directory: str | PathLike[str] | None = None,
        *,
        max_memory: int = _DEFAULT_MEMORY,
    ) -> None:
        if max_memory < 0:
            raise OptionError(
                f"max_memory = {max_memory} is out of range; expected 0 or more bytes"
            )
        self.directory = None if directory is None else os.fspath(directory)
        self.max_memory = max_memory
        self._lock = threading.Lock()
        self._memory: OrderedDict[bytes, Alignment] = OrderedDict()
        self._held = 0
        self._counts = CacheCounts()
        self._store = None if self.directory is None else AlignmentStore(self.directory)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.directory, self.max_memory)

    @property
    def counts(self) -> CacheCounts:
        """What became of the requests of this process so far."""
        return self._counts

    def align(self, aligner: Aligner, student_ids: Ids, teacher_ids: Ids) -> Alignment:
        """As `aligner.align`, made only where it was not made before."""
        return self.align_batch(aligner, [student_ids], [teacher_ids])[0]

    def align_batch(
        self,
        aligner: Aligner,
        student: Sequence[Ids],
        teacher: Sequence[Ids],
        *,
        threads: int | None = None,
    ) -> AlignmentBatch:
        """As `aligner.align_batch` on lists of sequences; those not made before are made together.

        Raises:
            ShapeError: the two sides differ in number.
            TokenIdError, TypeError: as `aligner.align_batch`.
        """
        if len(student) != len(teacher):
            raise ShapeError(
                f"{len(teacher)} teacher sequences where {len(student)} are expected; "
                "pass as many teacher sequences as student sequences"
            )
        left = [as_ids(f"student_ids[{at}]", ids) for at, ids in enumerate(student)]
        right = [as_ids(f"teacher_ids[{at}]", ids) for at, ids in enumerate(teacher)]
        base = aligner.fingerprint.encode()
        keys = [_key(base, s, t) for s, t in zip(left, right, strict=True)]
        with self._lock:
            found = self._find(keys)
            # One of several equal sequences is enough.
            missing = {key: at for at, key in enumerate(keys) if key not in found}
            if missing:
                rows = list(missing.values())
                try:
                    made = aligner.align_batch(
                        [left[row] for row in rows], [right[row] for row in rows], threads=threads
                    )
                except TokenIdError:
                    # The message counts the sequences that were missing; the caller's are all.
                    aligner.align_batch(left, right, threads=threads)
                    raise
                found |= self._keep(dict(zip(missing, made, strict=True)))
        return AlignmentBatch.stack([found[key] for key in keys])

    def _find(self, keys: Sequence[bytes]) -> dict[bytes, Alignment]:
        found: dict[bytes, Alignment] = {}
        for key in dict.fromkeys(keys):
            alignment = self._memory.get(key)
            if alignment is not None:
                self._memory.move_to_end(key)
                found[key] = alignment
        memory_hits = sum(key in found for key in keys)
        damaged = 0
        if self._store is not None and len(found) < len(set(keys)):
            wanted = [key for key in dict.fromkeys(keys) if key not in found]
            stored, damaged = self._store.read(wanted)
            for key, alignment in stored.items():
                self._remember(key, alignment)
            found |= stored
        disk_hits = sum(key in found for key in keys) - memory_hits
        self._count(memory_hits, disk_hits, len(keys) - memory_hits - disk_hits, damaged)
        return found

    def _keep(self, made: dict[bytes, Alignment]) -> dict[bytes, Alignment]:
        # Copies: a view would hold the arrays of the whole batch in memory.
        own = {key: _copy(alignment) for key, alignment in made.items()}
        if self._store is not None:
            self._store.write(own)
        for key, alignment in own.items():
            self._remember(key, alignment)
        return own

    def _remember(self, key: bytes, alignment: Alignment) -> None:
        self._memory[key] = alignment
        self._held += _size(alignment)
        while self._held > self.max_memory:
            _, dropped = self._memory.popitem(last=False)
            self._held -= _size(dropped)

    def _count(self, memory_hits: int, disk_hits: int, computed: int, damaged: int) -> None:
        counts = self._counts
        self._counts = CacheCounts(
            counts.memory_hits + memory_hits,
            counts.disk_hits + disk_hits,
            counts.computed + computed,
            counts.damaged + damaged,
        )


def _rebuild(directory: str | None, max_memory: int) -> AlignmentCache:
    return AlignmentCache(directory, max_memory=max_memory)


def _key(base: bytes, student: np.ndarray, teacher: np.ndarray) -> bytes:
    key = hashlib.blake2b(base, digest_size=_KEY_BYTES)
    key.update(len(student).to_bytes(8, "little"))
    key.update(student.data)
    key.update(teacher.data)
    return key.digest()


def _copy(alignment: Alignment) -> Alignment:
    return Alignment(
        alignment.student_bounds.copy(),
        alignment.teacher_bounds.copy(),
        alignment.kind.copy(),
        alignment.byte_counts.copy(),
    )


def _size(alignment: Alignment) -> int:
    arrays = (alignment.student_bounds, alignment.teacher_bounds, alignment.kind)
    return sum(array.nbytes for array in arrays) + 256
