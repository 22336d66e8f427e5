"""A text under both tokenizers of a pair, cut to the chunks that a page shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from xtoken._checks import check_number
from xtoken._extras import installed
from xtoken.align import Alignment, ChunkKind, Coverage
from xtoken.data.examples import Example
from xtoken.data.rows import Document
from xtoken.pair import Pair
from xtoken.vocab.display import is_utf8, special_name, visible, visible_token
from xtoken.vocab.side import Side

Css = Literal["a", "b", "differs", "only", "special"]

KINDS: dict[ChunkKind, str] = {
    ChunkKind.EXACT: "the same bytes on both sides",
    ChunkKind.MISMATCH: "the bytes differ",
    ChunkKind.STUDENT_ONLY: "the student's alone",
    ChunkKind.TEACHER_ONLY: "the teacher's alone",
    ChunkKind.SPECIAL: "special tokens of one role",
}
_CSS: dict[ChunkKind, Css] = {
    ChunkKind.MISMATCH: "differs",
    ChunkKind.STUDENT_ONLY: "only",
    ChunkKind.TEACHER_ONLY: "only",
    ChunkKind.SPECIAL: "special",
}
# Both sides of a counted chunk hold tokens, so no other chunk has its ranges.
_RANGE = ("student_start", "student_end", "teacher_start", "teacher_end")
_FROM, _TO = slice(None, -1), slice(1, None)
_SIGNS = {ChunkKind.MISMATCH: "≠", ChunkKind.SPECIAL: "="}


@dataclass(frozen=True)
class Token:
    """One token as a page shows it.

    Attributes:
        label: one visible line.
        token_id: in its vocabulary.
        data: its bytes; empty for a special token.
        part: it cuts a character.
        learned: a loss may predict it.
    """

    label: str
    token_id: int
    data: bytes
    part: bool
    learned: bool


@dataclass(frozen=True)
class Chunk:
    """One chunk as a page shows it.

    Attributes:
        index: in the alignment.
        kind: of the alignment.
        student, teacher: ranges of tokens.
        whole: its text, where a token cuts a character that the chunk holds whole; else empty.
        counted: whether a loss compares it; None where torch, which the rule needs, is absent.
        reason: why it is not; empty where it is, or where that is not known.
        ends_line: its text ends in a line break.
    """

    index: int
    kind: ChunkKind
    student: tuple[int, int]
    teacher: tuple[int, int]
    whole: str
    counted: bool | None
    reason: str
    ends_line: bool

    @property
    def css(self) -> Css:
        """The class of its look; exact neighbours are told apart."""
        return _CSS.get(self.kind, "b" if self.index % 2 else "a")

    @property
    def sign(self) -> str:
        """What stands between its two sides."""
        return self.whole or _SIGNS.get(self.kind, "")

    @property
    def shape(self) -> str:
        """Student by teacher tokens."""
        return f"{self.student[1] - self.student[0]}:{self.teacher[1] - self.teacher[0]}"


@dataclass(frozen=True, eq=False)
class AlignedText:
    """A text of a pair.

    Attributes:
        pair: the two tokenizers.
        example: the ids, masks and alignment of the chunks that are shown.
        coverage: of the whole text.
        total_chunks: of the whole text.
        total_tokens: student's and teacher's of the whole text.
        next_tokens: of both sides in the first chunk that is not shown; 0 where all are.
    """

    pair: Pair
    example: Example
    coverage: Coverage
    total_chunks: int
    total_tokens: tuple[int, int]
    next_tokens: int = 0

    @property
    def alignment(self) -> Alignment:
        """Of the chunks that are shown."""
        return self.example.alignment

    def tokens(self) -> tuple[list[Token], list[Token]]:
        """Student's and teacher's tokens of the chunks that are shown."""
        example = self.example
        sides = (
            (self.pair.student, example.student_ids, example.student_loss_mask),
            (self.pair.teacher, example.teacher_ids, example.teacher_loss_mask),
        )
        student, teacher = (
            [_token(side, int(i), bool(on)) for i, on in zip(ids, mask, strict=True)]
            for side, ids, mask in sides
        )
        return student, teacher

    def chunks(self) -> list[Chunk]:
        """The chunks that are shown."""
        counted = self._counted()
        student, teacher = self.tokens()
        bounds = self.alignment.student_bounds.tolist(), self.alignment.teacher_bounds.tolist()
        found = []
        for index, value in enumerate(self.alignment.kind.tolist()):
            kind = ChunkKind(value)
            ranges = [(side[index], side[index + 1]) for side in bounds]
            own = student[slice(*ranges[0])], teacher[slice(*ranges[1])]
            texts = [b"".join(token.data for token in side) for side in own]
            whole = _whole(own, texts[0]) if texts[0] == texts[1] else ""
            found.append(
                Chunk(
                    index,
                    kind,
                    ranges[0],
                    ranges[1],
                    whole,
                    None if counted is None else index in counted,
                    "" if counted is None or index in counted else self._reason(kind, ranges),
                    (texts[0] or texts[1]).endswith(b"\n"),
                )
            )
        return found

    def _counted(self) -> set[int] | None:
        """The chunks that a loss counts, by the losses' own rule."""
        if not installed("torch"):
            return None
        import torch

        from xtoken.tensors.chunks import ChunkBatch

        masks = self.example.student_loss_mask, self.example.teacher_loss_mask
        usable = ChunkBatch.usable_from_alignments(
            [self.alignment], *(torch.from_numpy(np.array(mask))[None] for mask in masks)
        )
        counted = set(zip(*(getattr(usable, name).tolist() for name in _RANGE), strict=True))
        own = (self.alignment.student_bounds, self.alignment.teacher_bounds)
        ranges = zip(*(side[at] for side in own for at in (_FROM, _TO)), strict=True)
        return {index for index, found in enumerate(ranges) if found in counted}

    def _reason(self, kind: ChunkKind, ranges: Sequence[tuple[int, int]]) -> str:
        if kind in (ChunkKind.STUDENT_ONLY, ChunkKind.TEACHER_ONLY):
            return "one side has no token here"
        if kind == ChunkKind.MISMATCH:
            return "its two sides spell different bytes"
        if min(ranges[0][0], ranges[1][0]) == 0:
            return "nothing predicts the first token of a text"
        return "it is not learned: a prompt, or what a template prints"


# One chunk of two texts that have nothing in common may hold all of their tokens.
TOKENS_PER_CHUNK = 4


def aligned_text(
    pair: Pair,
    document: Document,
    *,
    limit: int,
    add_special_tokens: bool = True,
) -> AlignedText:
    """Tokenize a text, a conversation or a prompt with its completion on both sides and align.

    Args:
        document: a conversation is printed by each tokenizer's own chat template.
        limit: the most chunks that are shown, at least 1; and of either side 4 times as many
            tokens.
        add_special_tokens: of a text, whether those that each tokenizer adds are there.

    Raises:
        OptionError: the limit is below 1.
        DataError: a conversation cannot be printed.
        UnsupportedTokenizerError: a tokenizer cannot encode text.
    """
    rule = "is out of range; expected a whole number of at least 1"
    check_number("limit", limit, 1, rule=rule, whole=True)
    if not isinstance(document, str):
        example = pair.examples([document])[0]
    else:
        student, teacher = (
            side.encode([document], add_special_tokens=add_special_tokens)[0] for side in pair.sides
        )
        example = Example.whole(student, teacher, pair.aligner.align(student, teacher))
    whole, shown = example.alignment, first_chunks(example, limit)
    number = len(shown.alignment)
    bounds = whole.student_bounds, whole.teacher_bounds
    following = sum(int(np.diff(side[number : number + 2]).sum()) for side in bounds)
    totals = len(example.student_ids), len(example.teacher_ids)
    return AlignedText(pair, shown, whole.coverage, len(whole), totals, following)


def first_chunks(example: Example, limit: int) -> Example:
    """The beginning of an example that a page can show: at most `limit` chunks and, of either
    side, 4 times as many tokens."""
    whole = example.alignment
    sides = whole.student_bounds[1:], whole.teacher_bounds[1:]
    # Bounds rise, so what fits is a beginning.
    fits = [int(np.searchsorted(side, limit * TOKENS_PER_CHUNK, "right")) for side in sides]
    limit = min(limit, *fits)
    if len(whole) <= limit:
        return example
    ends = int(whole.student_bounds[limit]), int(whole.teacher_bounds[limit])
    shown = replace(
        whole,
        student_bounds=whole.student_bounds[: limit + 1],
        teacher_bounds=whole.teacher_bounds[: limit + 1],
        kind=whole.kind[:limit],
    )
    return Example(
        example.student_ids[: ends[0]],
        example.teacher_ids[: ends[1]],
        example.student_loss_mask[: ends[0]],
        example.teacher_loss_mask[: ends[1]],
        shown,
    )


def _whole(sides: Sequence[Sequence[Token]], text: bytes) -> str:
    """The text of a chunk, where a token cuts a character of it and no token shows it whole."""
    if not is_utf8(text) or not any(token.part for side in sides for token in side):
        return ""
    shown = visible(text)
    return "" if any(token.label == shown for side in sides for token in side) else shown


def _token(side: Side, token_id: int, learned: bool) -> Token:
    data = side.vocab.token_bytes(token_id)
    label = visible_token(side.vocab, token_id) if data else special_name(side.vocab, token_id)
    return Token(label, token_id, data, bool(data) and not is_utf8(data), learned)
