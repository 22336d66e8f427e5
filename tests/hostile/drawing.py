"""Draws for the fuzzers: seeded, few in `make test`, many with XTOKEN_HOSTILE=deep."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from xtoken import XTokenError

DEEP = os.environ.get("XTOKEN_HOSTILE", "") == "deep"
# Another seed searches elsewhere; what it finds becomes a named test.
SEED = int(os.environ.get("XTOKEN_HOSTILE_SEED", "0"))


def count(fast: int, deep: int) -> int:
    """The number of draws."""
    return deep if DEEP else fast


def generator(name: str) -> random.Random:
    """A generator of its own for each fuzzer, the same in every run."""
    return random.Random(zlib.crc32(name.encode()) + SEED)


def damages(content: bytes, rng: random.Random, number: int) -> Iterator[tuple[str, bytes]]:
    """Files that a disk or a copy could make of this one: single bits for the most part."""
    for _ in range(number):
        kind = rng.choices(("bit", "cut", "zeros", "twice"), (12, 3, 1, 1))[0]
        at = rng.randrange(len(content))
        # Half of them in the first and last 2 kB, where headers and directories are.
        if rng.random() < 0.5:
            at = rng.choice((at % 2048, len(content) - 1 - at % 2048)) % len(content)
        if kind == "bit":
            bit = rng.randrange(8)
            flipped = bytes((content[at] ^ (1 << bit),))
            yield f"bit {bit} of byte {at}", content[:at] + flipped + content[at + 1 :]
        elif kind == "cut":
            yield f"cut at {at}", content[:at]
        elif kind == "zeros":
            end = min(len(content), at + rng.randrange(1, 4096))
            yield f"zeros {at}..{end}", content[:at] + bytes(end - at) + content[end:]
        else:
            yield f"twice from {at}", content + content[at:]


def silent_damages(
    path: Path, read: Callable[[], object], rng: random.Random, number: int
) -> tuple[list[str], int]:
    """Damage a file again and again, and read it.

    Returns: the damages that gave another content without an error, and how many were found.
    """
    content, expected = path.read_bytes(), read()
    silent, found = [], 0
    try:
        for name, damaged in damages(content, rng, number):
            if damaged == content:
                continue
            path.write_bytes(damaged)
            try:
                answer = read()
            except XTokenError as error:
                if "\n" in str(error):
                    raise AssertionError(f"{path.name}, {name}: {error}") from error
                found += 1
            else:
                if answer != expected:
                    silent.append(f"{path.name}: {name}")
    finally:
        path.write_bytes(content)
    return silent, found
