"""What a loss compares as a table: the largest entries, the text's own, and the rest as one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xtoken.losses.engine.divergence import Direction, divergence
from xtoken.report.comparisons import LINES, Comparison, Line
from xtoken.report.structure import PairStructure


@dataclass(frozen=True, eq=False)
class Entries:
    """The entries that a loss compares at one place.

    Attributes:
        teacher, student: [n] the two probabilities of each; None where there is no student.
        adds: [n] what each adds to the loss; None without a student.
        label: of an entry's index.
        what: they are called, in the plural.
        own: those that the text itself goes on with.
        always: those that are shown however small they are; `own` are.
        sizes: how many tokens each of the first ones stands for; None where that says nothing.
        order: [n] by which they are ranked; None for the teacher's probabilities.
    """

    teacher: Tensor
    student: Tensor | None
    adds: Tensor | None
    label: Callable[[int], str]
    what: str
    own: Collection[int] = ()
    always: Collection[int] = ()
    sizes: Sequence[int | None] | None = None
    order: Tensor | None = None

    @classmethod
    def of_logs(
        cls,
        log_teacher: Tensor,
        log_student: Tensor | None,
        label: Callable[[int], str],
        what: str,
        *,
        direction: Direction = "forward",
        beta: float = 0.5,
        own: Collection[int] = (),
        always: Collection[int] = (),
        order: Tensor | None = None,
    ) -> Entries:
        """From log-probabilities [n], each adding its term of the divergence."""
        adds = None
        if log_student is not None:
            adds = terms(log_teacher, log_student, direction, beta)
        student = None if log_student is None else log_student.exp()
        return cls(
            log_teacher.exp(), student, adds, label, what, own=own, always=always, order=order
        )

    def table(self, title: str) -> Comparison:
        """The largest entries by falling size, and all others together."""
        size = len(self.teacher)
        by = self.teacher if self.order is None else self.order
        best = torch.topk(by, min(size, LINES)).indices.tolist()
        shown = [*best, *(place for place in (*self.own, *self.always) if place not in best)]
        shown = list(dict.fromkeys(shown))
        if size == len(shown) + 1:  # a line of its own takes no more room than the rest's
            shown = list(range(size))
        shown.sort(key=lambda place: -float(by[place]))
        lines = tuple(self._line(place) for place in shown)
        left = size - len(shown)
        if not left:
            return Comparison(title, lines)
        others = torch.ones(size, dtype=torch.bool)
        others[shown] = False
        rest = Line(
            f"{left:,} other {self.what}",
            teacher=float(self.teacher[others].sum()),
            student=None if self.student is None else float(self.student[others].sum()),
            adds=None if self.adds is None else float(self.adds[others].sum()),
        )
        return Comparison(title, lines, rest)

    def _line(self, place: int) -> Line:
        sizes = self.sizes
        return Line(
            self.label(place),
            place in self.own,
            teacher=float(self.teacher[place]),
            student=None if self.student is None else float(self.student[place]),
            adds=None if self.adds is None else float(self.adds[place]),
            tokens=None if sizes is None or place >= len(sizes) else sizes[place],
        )


def terms(
    log_teacher: Tensor, log_student: Tensor, direction: Direction = "forward", beta: float = 0.5
) -> Tensor:
    """[n] what each entry adds to the divergence of two lists of log-probabilities [n]."""
    pair = log_teacher.to(log_student.dtype)[:, None], log_student[:, None]
    return divergence(*pair, direction, beta)


def places_of(ids: Tensor, token: int) -> list[int]:
    """Where a token is among ids [n]."""
    return (ids == token).nonzero().flatten().tolist()


def both(structure: PairStructure, student: int, teacher: int) -> str:
    """A teacher and a student token that are compared, once where they look the same."""
    one, other = structure.teacher(teacher), structure.student(student)
    return one if one == other else f"{one} | {other}"
