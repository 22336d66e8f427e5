"""Which pair of vocabularies something was made for, and the refusal of another pair's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from xtoken.errors import PairError


class PairFingerprint(NamedTuple):
    """The fingerprints of a student's and a teacher's vocabulary.

    >>> made = PairFingerprint("a" * 32, "b" * 32)
    >>> made.check(PairFingerprint("a" * 32, "b" * 32), "chunks", "pass this pair's chunks")
    >>> made.check(PairFingerprint("a" * 32, "c" * 32), "chunks", "pass this pair's chunks")
    Traceback (most recent call last):
    ...
    xtoken.errors.PairError: chunks is of teacher cccccccccccc, expected bbbbbbbbbbbb; pass \
this pair's chunks
    """

    student: str
    teacher: str

    def check(self, other: PairFingerprint | None, what: str, remedy: str) -> None:
        """Raise PairError where `other`, the pair of `what`, is another pair than this.

        Args:
            other: None, which is unknown, matches any pair.
            what: the argument's name.
            remedy: what to do instead.
        """
        if other is None:
            return
        for side, mine, found in zip(("student", "teacher"), self, other, strict=True):
            check_fingerprint(mine, found, side, what, remedy)


def check_fingerprint(
    expected: str | None, found: str | None, side: str, what: str, remedy: str
) -> None:
    """Raise PairError where two fingerprints of one side differ; None is unknown and matches."""
    if expected is not None and found is not None and expected != found:
        raise PairError(f"{what} is of {side} {found[:12]}, expected {expected[:12]}; {remedy}")


def common_pair(pairs: Iterable[PairFingerprint | None], what: str) -> PairFingerprint | None:
    """The pair that several parts have in common, None where none of them knows its own.

    Raises:
        PairError: they are of several pairs.
    """
    found: PairFingerprint | None = None
    for pair in pairs:
        if found is None:
            found = pair
        elif pair is not found:
            found.check(pair, what, "pass parts that were made from the same two tokenizers")
    return found
