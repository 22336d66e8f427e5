"""What each process of the cache's test runs; a module of its own, so that it imports no torch."""

from __future__ import annotations

from pathlib import Path

from xtoken import Projection, ProjectionOptions, Vocab
from xtoken.projection.cache import build_cached


def build_and_count(log: str, directory: str) -> int:
    """Ask for one projection; a line in `log` for each time that it is built."""
    student, teacher = (Vocab.from_tokens([b"a", b"b", b"ab"], ranked=True) for _ in range(2))

    def build() -> Projection:
        with open(log, "a") as file:
            file.write("built\n")
        return Projection.build(student, teacher, cache_dir=False, threads=1)

    w = build_cached(Projection, student, teacher, ProjectionOptions(), Path(directory), build)
    return len(w.indices)
