"""The alignment of a text as a page: student tokens over teacher tokens, and what losses see."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xtoken.report.aligned_text import KINDS, AlignedText, Chunk, Token
from xtoken.report.comparisons import LossView
from xtoken.report.page import PageNames, render_page
from xtoken.report.structure import structural_views

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class _Probabilities:
    """What the models say: views by chunk, and the probability of each token of both sides."""

    views: list[list[LossView]]
    student: list[float | None] | None = None
    teacher: list[float | None] | None = None
    names: list[str] = field(default_factory=list)


def alignment_page(
    text: AlignedText,
    names: PageNames,
    *,
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
) -> str:
    """The page.

    Args:
        text: of `aligned_text`.
        names: what the page calls the tokenizers and the text.
        student, teacher: causal language models; with the teacher's, the page has what each loss
            compares at each chunk, and with both its value in nats.

    Raises:
        PairError: a model is of another tokenizer.
        OptionError: the text is longer than a model has positions.
    """
    chunks = text.chunks()
    said = _probabilities(text, chunks, student, teacher)
    tokens = text.tokens()
    coverage = text.coverage
    shown = [_shown(chunk, tokens) for chunk in chunks]
    data = {
        "names": {"student": names.student, "teacher": names.teacher},
        "models": said.names,
        "tokens": {
            "student": _tokens_json(tokens[0], said.student),
            "teacher": _tokens_json(tokens[1], said.teacher),
        },
        "chunks": [
            {
                "kind": chunk.kind.name,
                "meaning": KINDS[chunk.kind],
                "shape": chunk.shape,
                "student": chunk.student,
                "teacher": chunk.teacher,
                "counted": chunk.counted,
                "reason": chunk.reason,
                "whole": chunk.whole,
                "losses": [view.to_json() for view in views],
            }
            for chunk, views in zip(chunks, said.views, strict=True)
        ],
    }
    values = {
        "names": names,
        "chunks": shown,
        "coverage": coverage,
        "total_chunks": text.total_chunks,
        "total_tokens": text.total_tokens,
        "next_tokens": text.next_tokens,
        "shapes": [
            (f"{n}:{m}", number) for (n, m), number in list(text.alignment.shapes().items())[:8]
        ],
        "kinds": {chunk.kind.name for chunk in chunks},
        "uncounted": any(chunk.counted is False for chunk in chunks),
        "cut_characters": any(token.part for side in tokens for token in side),
        "fingerprints": text.pair.fingerprints,
    }
    return render_page("alignment", data, values)


def _probabilities(
    text: AlignedText, chunks: list[Chunk], student: nn.Module | None, teacher: nn.Module | None
) -> _Probabilities:
    if student is None and teacher is None:
        return _Probabilities(structural_views(text, chunks))
    from xtoken.report.targets.models import text_logits, token_probabilities
    from xtoken.report.targets.views import model_views

    example, sizes = text.example, text.pair.sizes
    sides = text.pair.sides
    own = None if student is None else text_logits(student, sides[0], example.student_ids)
    other = None if teacher is None else text_logits(teacher, sides[1], example.teacher_ids)
    if other is None:
        views = structural_views(text, chunks)
    else:
        views = model_views(text, chunks, other, own)
    return _Probabilities(
        views,
        None if own is None else token_probabilities(own, example.student_ids, sizes[0]),
        None if other is None else token_probabilities(other, example.teacher_ids, sizes[1]),
        [name for name, model in (("student", student), ("teacher", teacher)) if model is not None],
    )


@dataclass(frozen=True)
class _Shown:
    """A chunk as the template reads it."""

    chunk: Chunk
    student: list[Token]
    teacher: list[Token]
    spoken: str


def _shown(chunk: Chunk, tokens: tuple[list[Token], list[Token]]) -> _Shown:
    student, teacher = tokens[0][slice(*chunk.student)], tokens[1][slice(*chunk.teacher)]
    sides = [
        f"{name} {', '.join(token.label for token in side) or 'nothing'}"
        for name, side in (("student", student), ("teacher", teacher))
    ]
    whole = f", text {chunk.whole}" if chunk.whole else ""
    left_out = ", not in the loss" if chunk.counted is False else ""
    spoken = f"Chunk {chunk.index + 1}, {KINDS[chunk.kind]}: {'; '.join(sides)}{whole}{left_out}"
    return _Shown(chunk, student, teacher, spoken)


def _tokens_json(tokens: list[Token], probs: list[float | None] | None) -> list[list[object]]:
    """Each token as [label, id, bytes in hex, probability or null]."""
    known = probs or [None] * len(tokens)
    return [
        [token.label, token.token_id, token.data.hex(), None if p is None else float(f"{p:.6g}")]
        for token, p in zip(tokens, known, strict=True)
    ]
