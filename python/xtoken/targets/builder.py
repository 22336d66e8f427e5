"""The builder of exact targets, from a projection's pieces and the two tokenizers."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import InitVar, dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from xtoken import _core
from xtoken._checks import check_flag, check_number, expect, whole_within
from xtoken._core import Vocab
from xtoken.align.ids import Ids, as_ids, as_int64
from xtoken.errors import ArgumentTypeError, OptionError, ShapeError, TokenIdError
from xtoken.projection.arrays import RULE_CODES, ProjectionArrays
from xtoken.targets.arrays import Int64, Targets
from xtoken.targets.rows import check_log_probs, check_rows
from xtoken.vocab.fingerprints import PairFingerprint

_OF_ALIGNMENT = {
    "student_bounds": np.dtype(np.int64),
    "teacher_bounds": np.dtype(np.int64),
    "kind": np.dtype(np.uint8),
}


class AlignedChunks(Protocol):
    """An `Alignment`, as far as targets read it."""

    @property
    def student_bounds(self) -> Int64: ...
    @property
    def teacher_bounds(self) -> Int64: ...
    @property
    def kind(self) -> NDArray[np.uint8]: ...


@dataclass(frozen=True)
class TargetOptions:
    """Which corrections a target has; all off is the target of P-KL with decay 0.

    Attributes:
        cells: the teacher's mass on tokens that no student token begins with goes to the student
            token that they begin with, not nowhere. Positions inside a teacher token and depths
            need it.
        consistent: what the student's own tokenizer would have joined to its last token is left
            out.
        levels: earlier teacher tokens that are asked for longer ones, which the teacher would have
            said instead; 0 for none. Positions inside a teacher token need 1.
        max_depth: most teacher tokens along the text that the target tells student tokens apart by;
            0 for none.
        sure: leave the groups out, and compare the others with one another only, where a student
            token that is longer than a teacher's would move mass into, out of or between groups.
        min_prob: columns of a row below this probability are its tail, in [0, 1).

    Raises:
        OptionError: a value is out of range, or of another type.

    >>> TargetOptions().levels
    1
    """

    cells: bool = True
    consistent: bool = True
    levels: int = 1
    max_depth: int = 8
    min_prob: float = 2e-4
    sure: bool = False

    def __post_init__(self) -> None:
        for name in ("levels", "max_depth"):
            rule = "is out of range; expected a whole number from 0 to 255"
            value = whole_within(name, getattr(self, name), 0, 255, rule=rule)
            # One of NumPy would have no place in the JSON that kept targets are known by.
            object.__setattr__(self, name, value)
        rule = "is out of range; expected a probability in [0, 1)"
        check_number("min_prob", self.min_prob, 0, rule=rule)
        if self.min_prob >= 1:
            raise OptionError(f"min_prob = {self.min_prob!r} {rule}")
        for name in ("cells", "consistent", "sure"):
            check_flag(name, getattr(self, name))


@dataclass(frozen=True, eq=False)
class TargetExample:
    """One text as both sides' ids, aligned, with the teacher's predictions.

    Attributes:
        student_ids, teacher_ids: [T_s] and [T_t] int64, or lists.
        alignment: of these ids.
        log_probs: [T_t, K] float32 natural logarithms at temperature 1; row `p` is what the teacher
            says after its token `p`. Fewer rows leave the last tokens unknown.
        column_ids: [T_t, K] int64 teacher ids of the columns, distinct within a row, -1 for none;
            None where the columns are all of the vocabulary.

    Args:
        validate: look at the numbers; False for what was checked before.

    Raises:
        ArgumentTypeError: numbers of another kind than these.
        ShapeError: arrays that do not fit.
        NonFiniteError: a log-probability is NaN.
        OptionError: a row has more than all mass, or names a column twice.
    """

    student_ids: Int64
    teacher_ids: Int64
    alignment: AlignedChunks
    log_probs: NDArray[np.float32]
    column_ids: Int64 | None = None
    validate: InitVar[bool] = True

    def __post_init__(self, validate: bool) -> None:
        check_flag("validate", validate)
        for name in ("student_ids", "teacher_ids"):
            object.__setattr__(self, name, as_ids(name, getattr(self, name), "pass one sequence"))
        _check_alignment(self.alignment)
        check_log_probs(self.log_probs)
        if self.column_ids is not None:
            columns = as_int64("column_ids", self.column_ids)
            if columns.shape != self.log_probs.shape:
                raise ShapeError(
                    f"column_ids has shape {columns.shape}, expected {self.log_probs.shape} like "
                    "log_probs; pass the id of each column"
                )
            object.__setattr__(self, "column_ids", columns)
        if validate:
            check_rows(self.log_probs, self.column_ids)


class TargetBuilder:
    """Makes exact targets for one pair; immutable, shared between threads.

    Attributes:
        pair: the fingerprints of the two vocabularies.
    """

    def __init__(
        self,
        projection: ProjectionArrays,
        *,
        student_stops: Collection[int] | None = None,
        teacher_stops: Collection[int] | None = None,
    ) -> None:
        """
        Args:
            projection: of the pair, built or loaded with its tokenizers.
            student_stops, teacher_stops: ids of all that can stop a side; by default
                `Vocab.stops`.

        Raises:
            ArgumentTypeError: no projection, or stops that are no whole numbers.
            TokenIdError: a stop is outside its vocabulary.
            OptionError: the projection was loaded without its tokenizers.
            UnsupportedTokenizerError: a tokenizer has no model that can segment.
        """
        expect(projection, ProjectionArrays, "projection", "pass Projection.build(...)")
        student, teacher = projection.vocabularies()
        if projection.teacher_pieces_indptr is None or projection.teacher_pieces is None:
            raise OptionError(
                "the projection has no student pieces of the teacher's tokens; build it from a "
                "student tokenizer that can segment (a tokenizer.json or a rank file)"
            )
        own = _stops("student_stops", student, student_stops)
        other = _stops("teacher_stops", teacher, teacher_stops)
        self._made_from = (
            projection,
            None if student_stops is None else own,
            None if teacher_stops is None else other,
        )
        self.pair = PairFingerprint(projection.student_fingerprint, projection.teacher_fingerprint)
        specials = [pair for pair in _specials(projection) if pair[0] not in own]
        self._marks = (own, other, specials)
        self._core = _core.TargetBuilder(
            student,
            teacher,
            projection.pieces_indptr,
            projection.pieces,
            projection.teacher_pieces_indptr,
            projection.teacher_pieces,
            [pair for pair in specials if pair[1] not in other],
            own,
            other,
        )

    @classmethod
    def from_projection(cls, projection: ProjectionArrays) -> TargetBuilder:
        """With the stops of the two vocabularies; made once for each projection.

        Of a part of W (`Projection.limited`) it is that of the whole: which tokens a head lacks is
        for whoever reads the targets, see `TargetBatch.limited`.

        Raises: as the constructor.
        """
        expect(projection, ProjectionArrays, "projection", "pass Projection.build(...)")
        whole = projection.whole or projection
        return whole.once(cls, lambda: cls(whole))

    @property
    def sizes(self) -> tuple[int, int]:
        """(V_s, V_t) of the tokenizers."""
        return self._made_from[0].shape

    @cached_property
    def tokens(self) -> Int64:
        """[n] the student ids that the ranges of all targets point into, read-only."""
        tokens = self._core.tokens()
        tokens.flags.writeable = False
        return tokens

    @cached_property
    def roots(self) -> Int64:
        """[V_t] the cell of each teacher text token, by the teacher token it is named after; -1 for
        none. Read-only.

        A token is its own cell where some student token has exactly its bytes. Otherwise it is in
        the cell of the first teacher piece of the first student piece of it.
        """
        roots = self._core.roots()
        roots.flags.writeable = False
        return roots

    @cached_property
    def fingerprint(self) -> str:
        """A stable hash of all that targets depend on beside the teacher's predictions."""
        student, teacher = self._made_from[0].vocabularies()
        found = hashlib.sha256(b"xtoken targets 1\0")
        for vocab in (student, teacher):
            found.update(f"{vocab.fingerprint} {vocab.model_fingerprint}\0".encode())
        found.update(self.tokens.tobytes())
        found.update(self.roots.tobytes())
        found.update(repr(self._marks).encode())
        return found.hexdigest()

    def swallowing(self, tokens: Ids, *, threads: int = 1) -> tuple[Int64, Int64]:
        """The teacher's text tokens behind which the student does not keep a token of its own: its
        tokenizer would have joined the two. What `consistent` leaves out.

        Args:
            tokens: [n] int64 student ids, or a list. Behind a special one nothing is joined.
            threads: 0 for one per core, 1 for none beside the caller's. The GIL is released.

        Returns: [n + 1] offsets into [m] teacher ids.

        Raises:
            ArgumentTypeError, ShapeError: no sequence of whole numbers.
            TokenIdError: an id is outside the student's vocabulary.
        """
        ids = as_ids("tokens", tokens, "pass one sequence of student ids")
        return self._core.swallowing(ids, _threads(threads))

    def __reduce__(self) -> tuple[object, ...]:
        return _remade, self._made_from

    def build(
        self,
        examples: Sequence[TargetExample],
        options: TargetOptions | None = None,
        *,
        threads: int = 0,
    ) -> Targets:
        """The targets of each example; the same for any number of threads.

        Args:
            threads: 0 for one per core, 1 for none beside the caller's. The GIL is released.

        Raises:
            ArgumentTypeError: other classes than these.
            OptionError: `threads` is out of range.
            TokenIdError: an id is outside its vocabulary.
            ShapeError: an alignment or predictions of other ids.
        """
        return self._build(examples, options, threads, accounts=False)[0]

    def accounts(
        self,
        examples: Sequence[TargetExample],
        options: TargetOptions | None = None,
        *,
        threads: int = 0,
    ) -> tuple[Targets, NDArray[np.float32]]:
        """The targets, and what became of the teacher's mass at each of their positions.

        Returns: the targets of P positions, and [P, 4] shares of the row at the boundary: on tokens
            that the student cannot say, which are dropped; on tokens after which it would not have
            its boundary, which are left out; of longer tokens of earlier rows, which are carried
            here, beside the row's own; and on columns that no student token begins with, which
            P-KL drops. All 0 inside a teacher token, where there is no such row.
        """
        found, flat = self._build(examples, options, threads, accounts=True)
        return found, flat.reshape(-1, 4)

    def _build(
        self,
        examples: Sequence[TargetExample],
        options: TargetOptions | None,
        threads: int,
        *,
        accounts: bool,
    ) -> tuple[Targets, NDArray[np.float32]]:
        threads = _threads(threads)
        if options is None:
            options = TargetOptions()
        expect(options, TargetOptions, "options", "pass TargetOptions(...)")
        expect(examples, Sequence, "examples", "pass a list of TargetExample(...)")
        for at, example in enumerate(examples):
            expect(example, TargetExample, f"examples[{at}]", "pass TargetExample(...)")
        columns = [e.column_ids for e in examples if e.column_ids is not None]
        if 0 < len(columns) < len(examples):
            raise ShapeError(
                "some examples have whole rows and others chosen columns; pass those of "
                "one kind together"
            )
        alignments = [example.alignment for example in examples]
        made = self._core.build(
            _flat([example.student_ids for example in examples]),
            _indptr([len(example.student_ids) for example in examples]),
            _flat([example.teacher_ids for example in examples]),
            _indptr([len(example.teacher_ids) for example in examples]),
            _flat([alignment.student_bounds for alignment in alignments]),
            _flat([alignment.teacher_bounds for alignment in alignments]),
            np.concatenate([np.empty(0, np.uint8), *(a.kind for a in alignments)], dtype=np.uint8),
            _indptr([len(alignment.kind) for alignment in alignments]),
            [np.ascontiguousarray(ids, np.int64) for ids in columns] if columns else None,
            [np.ascontiguousarray(example.log_probs, np.float32) for example in examples],
            (
                options.cells,
                options.consistent,
                options.levels,
                options.max_depth,
                options.min_prob,
                options.sure,
                accounts,
            ),
            threads,
        )
        targets = Targets(
            made.position_indptr,
            made.positions,
            made.chunks,
            made.tails,
            made.open,
            made.group_indptr,
            made.probs,
            made.depths,
            made.range_indptr,
            made.starts,
            made.ends,
        )
        return targets, made.accounts


def _remade(
    projection: ProjectionArrays,
    student_stops: Collection[int] | None,
    teacher_stops: Collection[int] | None,
) -> TargetBuilder:
    return TargetBuilder(projection, student_stops=student_stops, teacher_stops=teacher_stops)


def _flat(arrays: list[Int64]) -> Int64:
    if len(arrays) == 1 and arrays[0].dtype == np.int64:
        return np.ascontiguousarray(arrays[0])
    return np.concatenate([np.empty(0, np.int64), *arrays], dtype=np.int64)


def _indptr(lengths: list[int]) -> Int64:
    return np.cumsum([0, *lengths], dtype=np.int64)


def _check_alignment(alignment: AlignedChunks) -> None:
    for name, dtype in _OF_ALIGNMENT.items():
        array: Any = getattr(alignment, name, None)
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
            raise ArgumentTypeError(
                f"alignment is a {type(alignment).__name__} without {name} of {dtype}, expected "
                "an Alignment; pass Aligner.align(student_ids, teacher_ids)"
            )


def _threads(threads: int) -> int:
    rule = "is out of range; expected a whole number below 2^31, 0 for one per core"
    return whole_within("threads", threads, 0, 2**31 - 1, rule=rule)


def _stops(name: str, vocab: Vocab, stops: Collection[int] | None) -> list[int]:
    if stops is None:
        return sorted(set(vocab.stops))
    hint = "pass a list of token ids"
    ids = as_ids(name, list(expect(stops, Collection, name, hint)), hint)
    outside = ids[(ids < 0) | (ids >= len(vocab))]
    if len(outside):
        raise TokenIdError(
            f"{name} has {outside[0]}, which is outside the vocabulary (V = {len(vocab)}); pass "
            "ids of this side's tokenizer"
        )
    return sorted(set(ids.tolist()))


def _specials(projection: ProjectionArrays) -> list[tuple[int, int]]:
    """Special tokens that W pairs, as (student id, teacher id); a teacher token once."""
    paired: dict[int, int] = {}
    rows = np.isin(projection.rules, [RULE_CODES["role"], RULE_CODES["name"]])
    for student in np.flatnonzero(rows).tolist():
        paired.setdefault(int(projection.indices[projection.indptr[student]]), student)
    return [(student, teacher) for teacher, student in paired.items()]
