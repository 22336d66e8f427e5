"""Exact targets, the slow and obvious way, and the truth that they are held against.

`reference_target` is the oracle of `xtoken.targets`: float64, dictionaries, no cut-offs but the
ones asked for. `World` enumerates a distribution over all short texts, so that the conditionals of
both sides are known without error.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

STOP = -1
"""The teacher's and the student's stop tokens, all of them, in this file."""

Row = Mapping[int, float]
"""A teacher prediction: probability by teacher id, with STOP among them."""
Kind = Literal["child", "end", "stop", "special", "near", "tail", "open"]


class Group(NamedTuple):
    """A set of student tokens that the target holds for one event.

    `child` and `end` at a depth of the path; `near` by its student token, inside a chunk.
    """

    kind: Kind
    depth: int = 0
    token: int = 0


TAIL = Group("tail")
OPEN = Group("open")
"""In a target: the most that all student tokens in no group may have, as a share of all; the groups
are shares of what is left of it."""


@dataclass(frozen=True)
class Switches:
    """What a target corrects; all off is the target of P-KL with decay 0.

    With `sure` the groups are left out that a longer text could move mass into, out of or between:
    "cell" looks at the student tokens of each teacher token, "all" at all that could follow.
    """

    cells: bool = True
    consistent: bool = True
    levels: int = 1
    max_depth: int = 8
    min_prob: float = 0.0
    sure: Literal["", "cell", "all"] = ""
    max_unknown: float = 0.05


@dataclass(eq=False)
class TokenPair:
    """Two vocabularies as bytes, with how each spells the bytes of the other.

    Of tokens with the same bytes the lowest id stands for all.

    Attributes:
        segment_student, segment_teacher: bytes to token ids, None where they cannot be spelled.
        specials: teacher id to student id of control tokens that correspond.
        stops: whether anything stops the student.
    """

    student: list[bytes]
    teacher: list[bytes]
    segment_student: Callable[[bytes], Sequence[int] | None]
    segment_teacher: Callable[[bytes], Sequence[int] | None]
    student_pieces: list[tuple[int, ...]] = field(init=False)
    teacher_pieces: list[tuple[int, ...]] = field(init=False)
    student_twins: list[int] = field(init=False)
    teacher_twins: list[int] = field(init=False)
    specials: Mapping[int, int] = field(default_factory=dict)
    stops: bool = True

    def __post_init__(self) -> None:
        teacher_ids, student_ids = (
            {text: i for i, text in reversed([*enumerate(side)]) if text}
            for side in (self.teacher, self.student)
        )
        self.student_twins = [student_ids.get(text, i) for i, text in enumerate(self.student)]
        self.teacher_twins = [teacher_ids.get(text, i) for i, text in enumerate(self.teacher)]

        def spell(
            text: bytes, ids: Mapping[bytes, int], cut: Callable[[bytes], Sequence[int] | None]
        ) -> tuple[int, ...]:
            if not text:
                return ()
            return (ids[text],) if text in ids else tuple(cut(text) or ())

        self.student_pieces = [
            spell(text, teacher_ids, self.segment_teacher) for text in self.student
        ]
        self.teacher_pieces = [
            spell(text, student_ids, self.segment_student) for text in self.teacher
        ]
        self.nodes_of_tokens = set(self.student_pieces)
        self.reached = {pieces[0] for pieces in self.student_pieces if pieces}

    def root(self, column: int) -> int | None:
        """The cell of a teacher text token: R of the design, None where nothing spells it."""
        pieces = self.teacher_pieces[column]
        if not pieces or not self.student_pieces[pieces[0]]:
            return None
        first = self.student_pieces[pieces[0]][0]
        return first if len(pieces) == 1 else self.root(first)

    def first_piece(self, text: bytes) -> int | None:
        """The student token that a text starts with."""
        ids = self.segment_student(text)
        return ids[0] if ids else None

    def holds(self, last: int | None, token: int) -> bool:
        """Whether the student's tokenizer keeps `last` when `token` follows."""
        if last is None or tuple(self.segment_student(self.student[last]) or ()) != (last,):
            return True
        pair = self.segment_student(self.student[last] + self.student[token])
        return bool(pair) and pair[0] == last  # type: ignore[index]


class Example(NamedTuple):
    """One text as both sides' ids, where every chunk is exact and there is no special token."""

    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    rows: Sequence[Row | None]
    """`rows[j]` predicts teacher token j; one more row after the last token, or None."""


def reference_target(
    pair: TokenPair, example: Example, at: int, switches: Switches
) -> tuple[dict[Group, float], Callable[[int], Group]] | None:
    """The target of student token `at`, and the group of each student text token under it.

    `at` may be the place after the last token. A student token whose group is not in the target
    belongs to `TAIL`.
    """
    builder = _Builder(pair, example, at, switches)
    return builder.build()


class _Builder:
    def __init__(self, pair: TokenPair, example: Example, at: int, switches: Switches) -> None:
        ids = tuple(pair.student_twins[s] for s in example.student_ids)
        example = example._replace(student_ids=ids)
        if switches.cells:  # without them a column is what W has of it
            other = tuple(pair.teacher_twins[t] for t in example.teacher_ids)
            example = example._replace(teacher_ids=other)
        self.pair, self.example, self.at, self.switches = pair, example, at, switches
        self.own = ids[at] if at < len(ids) else None
        self.last = example.student_ids[at - 1] if at else None
        self.begin = sum(len(pair.student[s]) for s in example.student_ids[:at])
        ends, end = [], 0
        for t in example.teacher_ids:
            end += len(pair.teacher[t])
            ends.append(end)
        # The teacher token that covers the byte at which the student token starts.
        self.j = next((j for j, end in enumerate(ends) if end > self.begin), len(ends))
        self.starts = [0, *ends]
        self.inside = self.starts[self.j] < self.begin
        self.masses: dict[Group, float] = defaultdict(float)
        self.path: tuple[int, ...] = ()
        self.closed = False
        self.doubted: set[Group] = set()

    # -- the path: the teacher tokens that cover the student token

    def row(self, j: int) -> Row | None:
        row = self.example.rows[j] if j < len(self.example.rows) else None
        if row is None:
            return None
        found: dict[int, float] = {}
        for v, q in row.items():
            if q >= self.switches.min_prob and q > 0:
                merged = v != STOP and self.switches.cells
                column = self.pair.teacher_twins[v] if merged else v
                found[column] = found.get(column, 0.0) + q
        return found

    def find_path(self) -> None:
        path: list[int] = []
        limit = self.switches.max_depth if self.switches.cells else 0
        covered = self.starts[self.j] - self.begin
        size = -1 if self.own is None else len(self.pair.student[self.own])
        while len(path) < limit and covered < size:
            token = self.example.teacher_ids[self.j + len(path)]
            row = self.row(self.j + len(path))
            if row is None:
                break
            if token not in row:
                self.closed = True  # what this row lists is all that is known
                break
            path.append(token)
            covered += len(self.pair.teacher[token])
        self.path = tuple(path)
        after = self.row(self.j + len(path))
        if not path or (covered == size and after is not None and not self.inside):
            self.closed = True

    # -- groups of student tokens

    def group_of(self, token: int) -> Group:
        """The group of a student text token at a common boundary."""
        pieces, path = self.pair.student_pieces[token], self.path
        if not pieces:
            return TAIL
        if not self.switches.cells:
            return Group("child", 0, pieces[0])
        depth = 0
        while depth < len(path) and depth < len(pieces) and pieces[depth] == path[depth]:
            depth += 1
        if depth == len(path) and depth and not self.closed:
            # Nothing tells apart what the last token of the path begins.
            if self.pair.student_twins[token] == self.own:
                return Group("end", depth)
            return TAIL if self.own is None else self.group_of(self.own)
        if depth == len(pieces):
            return Group("end", depth)
        node = pieces[: depth + 1]
        exact = len(self.pair.teacher_pieces[node[0]]) == 1 if depth == 0 else (
            node in self.pair.nodes_of_tokens
        )  # fmt: skip
        if depth == 0 and exact:
            root = self.pair.root(node[0])
            if root != node[0]:  # another id with the same bytes
                return TAIL if root is None else self.group_of(self.pair.teacher_pieces[root][0])
        if exact:
            return Group("child", depth, node[-1])
        if depth == 0:
            shorter = self.pair.teacher_pieces[node[0]]
            return self.group_of(shorter[0]) if shorter else TAIL
        text = b"".join(self.pair.teacher[piece] for piece in node)
        first = self.pair.first_piece(text)
        return TAIL if first is None else self.group_of(first)

    # -- masses

    def doubt(self, text: bytes, longer: Iterable[int]) -> None:
        """Leave the group of `text` out where longer tokens would decide otherwise than it does.

        Args:
            longer: the student tokens that a text beginning with `text` may begin with, beside the
                one that `text` alone begins with.
        """
        if not self.switches.sure:
            return
        if self.switches.sure == "all":
            texts = {
                text[:cut] + token
                for cut in range(len(text))
                for token in self.pair.student
                if token.startswith(text[cut:])
            }
            longer = map(self.pair.first_piece, texts)  # type: ignore[assignment]
        firsts = {self.pair.first_piece(text), *longer} - {None}
        held = {first for first in firsts if self.pair.holds(self.last, first)}  # type: ignore[arg-type]
        groups = {self.group_of(first) for first in held} - {TAIL}  # type: ignore[arg-type]
        if len(groups) > 1 or (held and held != firsts):
            self.doubted |= groups

    def below(self, prefix: tuple[int, ...]) -> list[int]:
        """The student tokens whose teacher pieces begin so."""
        pieces = self.pair.student_pieces
        return [s for s in range(len(pieces)) if pieces[s][: len(prefix)] == prefix]

    def beyond(self, rest: bytes) -> list[int]:
        """The student tokens that begin with what is beyond the boundary, where the teacher has
        none there.
        """
        last = self.example.teacher_ids[self.j - 1 : self.j]
        before = self.pair.teacher[last[0]] if last else b""
        return [
            s
            for s, text in enumerate(self.pair.student)
            if text.startswith(rest) and not self.ends_before(before, s)
        ]

    def place(self, first: int | None, mass: float, *, tested: bool = True) -> None:
        """Give mass to the group of the student token that comes first."""
        if first is None:
            return
        if tested and self.switches.consistent and not self.pair.holds(self.last, first):
            return
        self.masses[self.group_of(first)] += mass

    def place_row(self, depth: int, row: Row, mass: float, on_path: int | None) -> None:
        prefix = b"".join(self.pair.teacher[t] for t in self.path[:depth])
        for v, q in row.items():
            if v == on_path:
                continue
            if v == STOP or not self.pair.teacher[v]:
                if depth:  # the text so far decides
                    self.place(self.pair.first_piece(prefix), mass * q)
                elif v == STOP:
                    if self.pair.stops:
                        self.masses[Group("stop")] += mass * q
                elif v in self.pair.specials:
                    self.masses[Group("special", 0, self.pair.specials[v])] += mass * q
            elif depth:
                self.doubt(prefix + self.pair.teacher[v], self.below((*self.path[:depth], v)))
                self.place(self.pair.first_piece(prefix + self.pair.teacher[v]), mass * q)
            elif self.switches.cells:
                self.doubt(self.pair.teacher[v], self.below((v,)))
                pieces = self.pair.teacher_pieces[v]
                self.place(pieces[0] if pieces else None, mass * q)
            elif v in self.pair.reached:
                pieces = self.pair.teacher_pieces[v]
                if not (self.switches.consistent and pieces) or self.pair.holds(
                    self.last, pieces[0]
                ):
                    self.masses[Group("child", 0, v)] += mass * q
        rest = 1.0 - sum(row.values())
        if rest > 1e-12:
            if depth:
                self.place(self.pair.first_piece(prefix), mass * rest)
            else:
                self.masses[TAIL] += mass * rest

    def longer(self, first_level: int, levels: int) -> Iterator[tuple[bytes, float, bool]]:
        """Teacher tokens of earlier rows that run past the boundary, by what is beyond it.

        Yields the bytes beyond, the mass, and whether the token is the text's own.
        """
        scale = 1.0
        for level in range(levels):
            j = self.j - first_level - level
            if j < 0:
                return
            row = self.row(j)
            if row is None:
                return
            if j < self.j:
                token = self.example.teacher_ids[j]
                if token not in row:
                    return
                scale /= row[token]
            before = b"".join(self.pair.student[s] for s in self.example.student_ids)
            before = before[self.starts[j] : self.begin]
            for v, q in row.items():
                if v == STOP:
                    continue
                text = self.pair.teacher[v]
                if text.startswith(before) and len(text) > len(before):
                    own = j == self.j and v == self.example.teacher_ids[j]
                    yield text[len(before) :], q * scale, own

    def build(self) -> tuple[dict[Group, float], Callable[[int], Group]] | None:
        if self.inside:
            return self.build_inside()
        self.find_path()
        mass = 1.0
        for depth in range(len(self.path) + int(self.closed)):
            row = self.row(self.j + depth)
            if row is None:
                return None
            on_path = self.path[depth] if depth < len(self.path) else None
            self.place_row(depth, row, mass, on_path)
            if on_path is not None:
                mass *= row[on_path]
        if not self.closed:
            self.doubt(b"".join(self.pair.teacher[t] for t in self.path), self.below(self.path))
            self.place(self.own, mass, tested=False)
        if self.switches.levels and self.at:
            for rest, extra, _ in self.longer(1, self.switches.levels):
                self.doubt(rest, self.beyond(rest))
                first = self.pair.first_piece(rest)
                if not self.switches.cells and first is not None:
                    pieces = self.pair.student_pieces[first]
                    if not pieces:
                        continue
                self.place(first, extra)
        if self.doubted:
            out = {*self.doubted, TAIL}
            self.masses = {g: m for g, m in self.masses.items() if g not in out}
            self.masses[OPEN] = math.inf
        return self.normalized(self.group_of)

    def build_inside(self) -> tuple[dict[Group, float], Callable[[int], Group]] | None:
        """Inside a teacher token: by the first student piece of what is left of each candidate."""
        if not self.switches.cells or not self.switches.levels:
            return None
        self.find_path()
        by_token: dict[int, float] = defaultdict(float)

        def place(first: int | None, mass: float, *, tested: bool = True) -> None:
            held = not tested or not self.switches.consistent
            if first is not None and (held or self.pair.holds(self.last, first)):
                by_token[first] += mass

        mass = 0.0
        for rest, extra, own in self.longer(0, self.switches.levels):
            if own and self.path:
                mass = extra
            else:
                place(self.pair.first_piece(rest), extra)
        if self.path:
            text = b"".join(self.pair.teacher[t] for t in self.path)
            skipped = self.begin - self.starts[self.j]
            sizes = [len(self.pair.teacher[t]) for t in self.path]
            for depth in range(1, len(self.path) + int(self.closed)):
                row = self.row(self.j + depth)
                if row is None:
                    return None
                on_path = self.path[depth] if depth < len(self.path) else None
                prefix = text[skipped : sum(sizes[:depth])]
                for v, q in row.items():
                    if v == on_path:
                        continue
                    more = b"" if v == STOP else self.pair.teacher[v]
                    place(self.pair.first_piece(prefix + more), mass * q)
                rest = 1.0 - sum(row.values())
                if rest > 1e-12:
                    place(self.pair.first_piece(prefix), mass * rest)
                if on_path is not None:
                    mass *= row[on_path]
            if not self.closed:
                place(self.own, mass, tested=False)
        texts = {self.pair.student[token]: token for token in by_token}
        before = b"".join(self.pair.student[s] for s in self.example.student_ids)
        before = before[self.starts[self.j] : self.begin]

        candidates = sum(by_token.values())
        ending = self.ending_here(before)

        def group_of(token: int) -> Group:
            text = self.pair.student[token]
            if self.ends_before(before, token):
                return TAIL
            if ending > self.switches.max_unknown * candidates and self.may_end_before(
                before, token
            ):
                return TAIL
            for size in range(len(text), 0, -1):
                if text[:size] in texts:
                    return Group("near", 0, texts[text[:size]])
            return TAIL

        # All others have no more than what is not known, and what is left out above.
        # Columns that are not listed are taken to begin with the bytes so far as often as others.
        row = self.row(self.j)
        assert row is not None
        listed = sum(row.values())
        unlisted = candidates * (1.0 - listed) / listed if 1.0 - listed > 1e-12 else 0.0
        self.masses[OPEN] = self.unknown() + unlisted
        for token, extra in by_token.items():
            self.masses[OPEN if group_of(token) == TAIL else group_of(token)] += extra
        return self.normalized(group_of)

    def unknown(self) -> float:
        """The teacher's mass on texts that go on as the student's do, of which later rows would
        tell how: on tokens that end before the boundary or at it and are not the text's own; and
        one level further back than is placed, on those that run past it. Infinite where a row on
        the way is not known.
        """
        found, scale = 0.0, 1.0
        text = b"".join(self.pair.student[s] for s in self.example.student_ids)
        for level in range(self.switches.levels + 1):
            j = self.j - level
            if j < 0:
                break
            row = self.row(j)
            if row is None:
                return math.inf
            own = self.example.teacher_ids[j] if level else None
            if level:
                if own not in row:
                    return math.inf
                scale /= row[own]
            before = text[self.starts[j] : self.begin]
            for v, q in row.items():
                token = b"" if v == STOP else self.pair.teacher[v]
                ends = v != own and before.startswith(token)
                runs = level == self.switches.levels and len(token) > len(before)
                if token and (ends or (runs and token.startswith(before))):
                    found += scale * q
        return found

    def ends_before(self, before: bytes, token: int) -> bool:
        """Whether the teacher has a boundary before this student token, so that its mass is not
        that of the candidates, which run past the boundary.
        """
        pieces = self.pair.student_pieces[token]
        spelled = self.pair.segment_teacher(before)
        if not pieces or not spelled:
            return False
        pair = self.pair.segment_teacher(
            self.pair.teacher[spelled[-1]] + self.pair.teacher[pieces[0]]
        )
        return bool(pair) and tuple(pair)[:1] == tuple(spelled)[-1:]  # type: ignore[arg-type]

    def ending_here(self, before: bytes) -> float:
        """The teacher's mass on tokens with which its spelling of these bytes begins, when only
        these bytes come: it has a boundary here or may have one, and what follows is not known."""
        row = self.row(self.j)
        spelled = self.pair.segment_teacher(before)
        return row.get(spelled[0], 0.0) if row and spelled else 0.0

    def may_end_before(self, before: bytes, token: int) -> bool:
        """Whether the teacher has a boundary before some longer token of its own than this one."""
        text = self.pair.student[token]
        spelled = self.pair.segment_teacher(before)
        if not spelled:
            return False
        for longer in self.pair.teacher:
            if longer.startswith(text) and len(longer) > len(text):
                pair = self.pair.segment_teacher(self.pair.teacher[spelled[-1]] + longer)
                if pair and pair[0] == spelled[-1]:
                    return True
        return False

    def normalized(
        self, group_of: Callable[[int], Group]
    ) -> tuple[dict[Group, float], Callable[[int], Group]] | None:
        unknown = self.masses.pop(OPEN, None)
        total = sum(self.masses.values())
        if total <= 0:
            return None
        shares = {group: mass / total for group, mass in self.masses.items()}
        if unknown is not None:
            shares[OPEN] = unknown / (total + unknown) if unknown < math.inf else 1.0
        return shares, group_of
