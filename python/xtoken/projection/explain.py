"""One row of W in words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xtoken._core import PROJECTION_RULES, Vocab
from xtoken.errors import ArgumentTypeError, TokenIdError
from xtoken.projection.arrays import ProjectionArrays
from xtoken.vocab.display import quoted, special_id

REASONS = {
    "unused": "the id is a hole in the student's vocabulary",
    "unspellable": "the teacher cannot spell these bytes",
    "unpaired": "a special token without a partner in the teacher's vocabulary",
    "exact": "a teacher token has the same bytes",
    "canonical": "a teacher token has the same bytes up to the declared differences",
    "forward": "the teacher's own segmentation of the bytes",
    "reverse": "teacher tokens that the student splits into this token and others",
    "role": "special tokens with the same role",
    "name": "special tokens with similar names",
    "duplicate": "a teacher token has the same bytes, but the student emits another id for them",
    "imported": "read from another program's table",
}


@dataclass(frozen=True)
class Entry:
    """One teacher token of a row.

    Attributes:
        teacher_id: the column.
        token: the token for people, as `Explanation.token`.
        token_bytes: what it contributes; empty for special tokens.
        weight: of the entry, above 0.
    """

    teacher_id: int
    token: str
    token_bytes: bytes
    weight: float


@dataclass(frozen=True)
class Explanation:
    """A row of W: see `Projection.explain`.

    Attributes:
        student_id: the row.
        token: the token for people: its text, or its bytes where they are no text.
        token_bytes: what the token contributes; empty for special tokens.
        rule: what made the row, a name in `PROJECTION_RULES`.
        reason: the rule in words.
        pieces: the teacher's own pieces of the bytes.
        entries: the row, by falling weight.
    """

    student_id: int
    token: str
    token_bytes: bytes
    rule: str
    reason: str
    pieces: tuple[str, ...]
    entries: tuple[Entry, ...]

    def __str__(self) -> str:
        row = ", ".join(f"{entry.token} ({entry.weight:.4f})" for entry in self.entries)
        return f"{self.token} [{self.student_id}] -> {row or 'nothing'}: {self.reason}"


def explain(projection: ProjectionArrays, token: int | str | bytes) -> Explanation:
    """See `Projection.explain`."""
    student, teacher = projection.vocabularies()
    student_id = find_token(student, token)
    pieces = projection.token_pieces(student_id)  # or it is beyond this part of W
    rule = PROJECTION_RULES[projection.rules[student_id]]
    indices, weights = projection.csr.row(student_id)
    return Explanation(
        student_id=student_id,
        token=quoted(student, student_id),
        token_bytes=student.token_bytes(student_id),
        rule=rule,
        reason=REASONS[rule],
        pieces=tuple(quoted(teacher, piece) for piece in pieces),
        entries=tuple(
            Entry(t, quoted(teacher, t), teacher.token_bytes(t), weight)
            for t, weight in zip(indices.tolist(), weights.tolist(), strict=True)
        ),
    )


def find_token(vocab: Vocab, token: int | str | bytes) -> int:
    """The id of a token given by id, bytes, text, or the name of a special token.

    Raises:
        TokenIdError: there is none; says how the vocabulary spells it instead.
    """
    if isinstance(token, int | np.integer) and not isinstance(token, bool):
        token = int(token)
        if not 0 <= token < len(vocab):
            raise TokenIdError(
                f"token id {token} is outside the student vocabulary (V_s = {len(vocab)})"
            )
        return token
    if not isinstance(token, str | bytes):
        raise ArgumentTypeError(f"token is a {type(token).__name__}; pass an id, a text or bytes")
    # Half a character in a string is a byte that the shell or Python could not decode.
    spelled = _as_bytes(token) if isinstance(token, str) else token
    found = vocab.id_of(spelled)
    if found is None and isinstance(token, str):
        found = special_id(vocab, token)
    if found is None:
        pieces = vocab.segment(spelled) if vocab.model else None
        spelling = "+".join(quoted(vocab, piece) for piece in pieces or ())
        raise TokenIdError(
            f"{token!r} is not one token of the student"
            + (f": it is spelled {spelling}" if spelling else "")
            + "; pass a single token or its id"
        )
    return found


def _as_bytes(token: str) -> bytes:
    try:
        return token.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a character of another kind, which no token is
        return token.encode("utf-8", "surrogatepass")
