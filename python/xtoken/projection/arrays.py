"""The arrays of W and what they were built from: the data that the other files read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from xtoken._checks import as_whole
from xtoken._core import PROJECTION_RULES, Vocab
from xtoken.errors import OptionError, ShapeError, TokenIdError
from xtoken.projection.csr import Csr, check_row_sums
from xtoken.projection.options import ProjectionOptions
from xtoken.vocab.fingerprints import PairFingerprint

Made = TypeVar("Made")

RULE_CODES = {name: code for code, name in enumerate(PROJECTION_RULES)}
EMPTY_RULES = ("unused", "unspellable", "unpaired")


@dataclass(frozen=True, eq=False)
class ProjectionArrays:
    """W `[V_s, V_t]` in compressed rows, the pieces of both sides, and the pair they belong to.

    Attributes:
        indptr: [V_s + 1] int64; row s holds entries `indptr[s]` to `indptr[s + 1]`.
        indices: [nnz] int64 teacher ids.
        weights: [nnz] float32, above 0; in a row falling, to a sum of 1.
        shape: (V_s, V_t).
        rules: [V_s] uint8, what made each row: an index into `PROJECTION_RULES`.
        pieces_indptr: [V_s + 1] int64, offsets into `pieces`.
        pieces: [n] int64, the teacher's own pieces of each student token; none where it has no text
            or the teacher cannot spell it.
        teacher_pieces_indptr, teacher_pieces: the mirror, [V_t + 1] and [m] int64: the student's
            own pieces of each teacher token; None where the student has no model that can segment.
        stop_fold_from, stop_fold_to: [f] int64, the teacher's stop tokens that no row reaches, and
            for each the reached one that stands for it: all that stops a side is one event, so a
            loss adds the teacher's probability of the former to that of the latter. None where
            that is not known (an imported table, a file of an earlier version).
        student_stops: [n] int64, the student's stop tokens, the preferred one first: of those that
            claim one teacher token, it is the one-to-one partner. None where they are not known.
        teacher_stops: [n] int64, the teacher's, likewise.
        options: what it was built with.
        student_fingerprint, teacher_fingerprint: of the two vocabularies.
        model_fingerprint, student_model_fingerprint: of the teacher's and the student's
            segmentation models; empty where not known.
        student, teacher: the vocabularies, where they are known; `explain` needs them.
        whole: what this is a part of, where rows or columns were left out (`limited`): the pieces
            here do not cover the vocabularies then.

    Raises:
        ShapeError: the arrays do not fit one another, or a row is no distribution.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int64]
    weights: NDArray[np.float32]
    shape: tuple[int, int]
    rules: NDArray[np.uint8]
    pieces_indptr: NDArray[np.int64]
    pieces: NDArray[np.int64]
    options: ProjectionOptions
    student_fingerprint: str
    teacher_fingerprint: str
    model_fingerprint: str
    student: Vocab | None = None
    teacher: Vocab | None = None
    teacher_pieces_indptr: NDArray[np.int64] | None = None
    teacher_pieces: NDArray[np.int64] | None = None
    student_model_fingerprint: str = ""
    stop_fold_from: NDArray[np.int64] | None = None
    stop_fold_to: NDArray[np.int64] | None = None
    student_stops: NDArray[np.int64] | None = None
    teacher_stops: NDArray[np.int64] | None = None
    whole: ProjectionArrays | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def pair(self) -> PairFingerprint:
        """The fingerprints of both vocabularies, as all that is made from this carries them."""
        return PairFingerprint(self.student_fingerprint, self.teacher_fingerprint)

    def once(self, kind: type[Made], make: Callable[[], Made]) -> Made:
        """The one of this class that `make` makes of this projection: made for the first who asks,
        kept for the others.

        Nothing that is kept may be changed, and nothing of it goes into a pickle or a copy.
        """
        if kind not in self._kept:
            self._kept[kind] = make()
        made: Made = self._kept[kind]
        return made

    @cached_property
    def _kept(self) -> dict[type, Any]:
        return {}

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_kept"}

    @property
    def is_part(self) -> bool:
        """Whether rows or columns were left out."""
        return self.whole is not None and self.whole.shape != self.shape

    @property
    def csr(self) -> Csr:
        """The matrix alone: slices, transposition, row sums."""
        return Csr(self.indptr, self.indices, self.weights, self.shape)

    def token_pieces(self, student_id: int) -> list[int]:
        """The teacher's own pieces of a student token; see `pieces`.

        Raises:
            ArgumentTypeError: no id.
            TokenIdError: the id is outside the student's vocabulary, or this part of it.
        """
        student_id = as_whole("student_id", student_id, "pass one token id")
        self._check_id(student_id)
        start, stop = self.pieces_indptr[student_id : student_id + 2]
        pieces: list[int] = self.pieces[start:stop].tolist()
        return pieces

    def vocabularies(self) -> tuple[Vocab, Vocab]:
        """Student and teacher.

        Raises:
            OptionError: they are not known; pass the tokenizers to `load`.
        """
        if self.student is None or self.teacher is None:
            raise OptionError(
                "this projection was loaded without its tokenizers, so tokens have no bytes to "
                "show; pass both tokenizers to Projection.load"
            )
        return self.student, self.teacher

    def _check_id(self, student_id: int) -> None:
        if not 0 <= student_id < self.shape[0]:
            part = "this part of " if self.is_part else ""
            raise TokenIdError(
                f"token id {student_id} is outside {part}the student vocabulary "
                f"(V_s = {self.shape[0]})"
            )


def _check(projection: ProjectionArrays) -> None:
    """Refuse arrays that do not fit one another, and rows that are no distributions."""
    rows, columns = projection.shape
    csr = projection.csr
    row_of = csr.row_of()
    remedy = "build W again, and give it other weights by its with_weights, which scales rows"
    check_row_sums(row_of, csr.weights, remedy)
    rises = np.flatnonzero((np.diff(projection.weights) > 0) & (np.diff(row_of) == 0))
    if len(rises):
        raise ShapeError(
            f"row {row_of[rises[0]]} of W is not sorted by falling weight; build W again, and give "
            "it other weights by its with_weights, which sorts rows"
        )
    rules = len(PROJECTION_RULES)
    if len(projection.rules) != rows or int(projection.rules.max(initial=0)) >= rules:
        raise ShapeError(f"rules must hold {rows} codes below {rules}")
    _check_pieces(projection.pieces_indptr, projection.pieces, rows, columns)
    if projection.teacher_pieces_indptr is not None and projection.teacher_pieces is not None:
        _check_pieces(projection.teacher_pieces_indptr, projection.teacher_pieces, columns, rows)
    _check_stops(projection)


def _check_pieces(
    indptr: NDArray[np.int64], pieces: NDArray[np.int64], tokens: int, size: int
) -> None:
    Csr(indptr, pieces, np.ones(len(pieces), dtype=np.float32), (tokens, size))


def _check_stops(projection: ProjectionArrays) -> None:
    sides = (("student", projection.student_stops), ("teacher", projection.teacher_stops))
    for (side, stops), size in zip(sides, projection.shape, strict=True):
        if stops is not None and not bool(((stops >= 0) & (stops < size)).all()):
            raise ShapeError(f"{side}_stops must hold ids of the {side} (V_{side[0]} = {size})")
    folded, onto = projection.stop_fold_from, projection.stop_fold_to
    if folded is None and onto is None:
        return
    columns = projection.shape[1]
    if folded is None or onto is None or len(folded) != len(onto):
        raise ShapeError("stop_fold_from and stop_fold_to must both be there, of one length")
    ids = np.concatenate([folded, onto])
    if ids.size and not (0 <= ids.min() and ids.max() < columns):
        raise ShapeError(
            f"stop_fold_from and stop_fold_to must hold ids of the teacher (V_t = {columns})"
        )


AnyProjection = TypeVar("AnyProjection", bound=ProjectionArrays)
