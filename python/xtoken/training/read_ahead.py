"""The batches of the next step, read while this one still trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any


class ReadAhead:
    """Reads the iterators of a trainer's epochs, some batches before they are asked for."""

    def __init__(self) -> None:
        self._source: Iterator[Any] = iter(())
        self._read: deque[Any] = deque()

    def over(self, source: Iterator[Any]) -> Iterator[Any]:
        """What was read ahead of a source, then what is left of it."""
        if source is not self._source:  # of another epoch
            self._source, self._read = source, deque()
        return self

    def peek(self, count: int) -> list[Any]:
        """The next batches, which stay to be read; fewer at the end of an epoch."""
        while len(self._read) < count:
            try:
                self._read.append(next(self._source))
            except StopIteration:
                break
        return list(self._read)[:count]

    def close(self) -> None:
        """Let go of the source, and of the workers that it may hold."""
        self._source, self._read = iter(()), deque()

    def __iter__(self) -> ReadAhead:
        return self

    def __next__(self) -> Any:
        return self._read.popleft() if self._read else next(self._source)
