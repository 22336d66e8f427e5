"""A warning where one and the same text is covered by too few chunks that count."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from xtoken.align import Coverage
from xtoken.errors import LowCoverageWarning
from xtoken.vocab.side import Side

_LEAST_COVERED = 0.9
# Less text than this says nothing: a conversation of one word has as many tokens around it.
_ENOUGH_TOKENS = 50


class CoverageWatch:
    """Adds up what batches cover, and warns once.

    Args:
        sides: student and teacher.
    """

    def __init__(self, sides: Sequence[Side]) -> None:
        self._sides = sides
        self._tokens = 0
        self._taught = 0
        self._coverage: Coverage | None = None
        self._warned = False

    def see(self, tokens: int, taught: int, coverage: Coverage, *, stacklevel: int = 2) -> None:
        """Count a batch; warn where less than 90 % of the tokens counted so far are taught.

        Args:
            tokens: student tokens in the loss.
            taught: those of them that lie in usable chunks.
            coverage: of the same texts.
        """
        if self._warned:
            return
        self._tokens, self._taught = self._tokens + tokens, self._taught + taught
        self._coverage = coverage if self._coverage is None else self._coverage + coverage
        if self._tokens < _ENOUGH_TOKENS:
            return
        share = self._taught / self._tokens
        advice = _advice(
            f"chunks teach {share:.0%} of the student's tokens", share, self._sides, self._coverage
        )
        if advice is not None:
            self._warned = True
            warnings.warn(advice, LowCoverageWarning, stacklevel=stacklevel + 1)
        # Each stretch of text is judged by itself: a good beginning hides nothing.
        self._tokens, self._taught, self._coverage = 0, 0, None


def low_exact_bytes(sides: Sequence[Side], coverage: Coverage) -> str | None:
    """A warning where less than 90 % of the bytes of one text are in EXACT chunks of both sides."""
    if min(coverage.student_tokens, coverage.teacher_tokens) < _ENOUGH_TOKENS:
        return None
    share = min(coverage.student_byte_share, coverage.teacher_byte_share)
    message = f"{share:.0%} of the bytes of one and the same text are in EXACT chunks"
    return _advice(message, share, sides, coverage)


def _advice(message: str, share: float, sides: Sequence[Side], coverage: Coverage) -> str | None:
    if share >= _LEAST_COVERED:
        return None
    cause = _likely_cause(sides, coverage)
    return f"{message}; likely cause: {cause}; look at a text with pair.align(text) or xtoken align"


def _likely_cause(sides: Sequence[Side], coverage: Coverage) -> str:
    lossy = [side.name for side in sides if side.vocab.is_lossy]
    sizes = coverage.student_bytes, coverage.teacher_bytes
    if lossy:
        return f"the {lossy[0]}'s WordPiece vocabulary loses case and white space"
    if abs(sizes[0] - sizes[1]) > 0.01 * max(sizes):
        return (
            f"the two sides spell different texts ({sizes[0]:,} and {sizes[1]:,} bytes): unknown "
            "tokens, a normalizer, a template, or a tokenizer that was damaged in a conversion"
        )
    return "the two sides spell different bytes: a normalizer or a template of one side"
