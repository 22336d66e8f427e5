"""What a loss compares at a chunk, as tables: one shape for all losses, with or without models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Lines of a table; what is left is told as one more.
LINES = 6


@dataclass(frozen=True)
class Line:
    """One column, slot or group.

    Attributes:
        label: the token, piece or group.
        own: it is what the text itself goes on with.
        teacher, student: probabilities that the loss compares; None where no model is given.
        weight: of an entry of W.
        adds: what it adds to the loss.
        tokens: how many tokens it stands for.
    """

    label: str
    own: bool = False
    teacher: float | None = None
    student: float | None = None
    weight: float | None = None
    adds: float | None = None
    tokens: int | None = None

    def to_json(self) -> dict[str, object]:
        """Plain values, without those that are not known."""
        found: dict[str, object] = {"label": self.label}
        if self.own:
            found["own"] = True
        for name in ("teacher", "student", "weight", "adds"):
            value = getattr(self, name)
            if value is not None and math.isfinite(value):
                found[name] = _short(value)
        if self.tokens is not None:
            found["tokens"] = self.tokens
        return found


@dataclass(frozen=True)
class Comparison:
    """One distribution that a loss compares.

    Attributes:
        title: where it stands.
        lines: at most a few, by falling probability; the text's own is always among them.
        rest: all others together; None where there are none.
    """

    title: str
    lines: tuple[Line, ...]
    rest: Line | None = None

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        found: dict[str, object] = {
            "title": self.title,
            "lines": [line.to_json() for line in self.lines],
        }
        if self.rest is not None:
            found["rest"] = self.rest.to_json()
        return found


@dataclass(frozen=True)
class LossView:
    """What one loss makes of one chunk.

    Attributes:
        loss: its name.
        value: nats, where both models are given.
        note: a sentence, where there is more to know.
        comparisons: none where it compares nothing.
    """

    loss: str
    comparisons: tuple[Comparison, ...]
    value: float | None = None
    note: str = ""

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        found: dict[str, object] = {
            "loss": self.loss,
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
        }
        note = self.note
        if self.value is not None and math.isfinite(self.value):
            found["value"] = _short(self.value)
        elif self.value is not None:
            note = "; ".join(filter(None, (note, f"the loss is {self.value} here")))
        if note:
            found["note"] = note
        return found


def _short(value: float) -> float:
    """Six digits, as a page needs no more; a small one is never told as none."""
    return float(f"{value:.6g}")


def first_lines(title: str, lines: Iterable[Line], what: str) -> Comparison:
    """A table of the most important lines, the others as one.

    Args:
        lines: in any order.
        what: they are called, in the plural.
    """
    ranked = sorted(lines, key=_rank)
    shown = ranked[:LINES] if len(ranked) > LINES + 1 else ranked
    left = ranked[len(shown) :]
    own = [line for line in left if line.own]
    if own:  # what the text goes on with is never out of sight
        shown, left = [*shown, *own], [line for line in left if not line.own]
    if not left:
        return Comparison(title, tuple(shown))
    rest = Line(
        f"{len(left):,} other {what}",
        teacher=_sum(line.teacher for line in left),
        student=_sum(line.student for line in left),
        weight=_sum(line.weight for line in left),
        tokens=_whole_sum([line.tokens for line in left]),
    )
    return Comparison(title, tuple(shown), rest)


def _rank(line: Line) -> tuple[float, float, float, float]:
    values = (line.teacher, line.weight, line.student, line.tokens)
    first, second, third, fourth = (-(value or 0.0) for value in values)
    return first, second, third, fourth


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _whole_sum(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
