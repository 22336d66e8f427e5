"""An alignment as a picture: student tokens over teacher tokens, chunks as ribbons between them."""

from __future__ import annotations

from html import escape

from xtoken.align import Alignment, ChunkKind
from xtoken.pair import Pair
from xtoken.vocab.display import visible_token
from xtoken.vocab.side import Side

_WIDTH = 640
_MARGIN = 12
_CHARACTER = 8.2  # width of one character of the font below
_PADDING = 7
_GAP = 5
_BOX = 26
_RIBBON = 34
_LINE = 2 * _BOX + _RIBBON + 52
_LABEL = 16

_STYLE = """
text{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:#1f2328}
.label{font-family:system-ui,sans-serif;fill:#59636e}
.box{stroke-width:1}
.c0 .box,.c0 .ribbon{fill:#d6e8ff}.c0 .box{stroke:#7fb2f0}
.c1 .box,.c1 .ribbon{fill:#d9f2dd}.c1 .box{stroke:#7cc48a}
.other .box,.other .ribbon{fill:#fbe3d4}.other .box{stroke:#d99a6c;stroke-dasharray:3 2}
.ribbon{opacity:.75}
@media (prefers-color-scheme:dark){
text{fill:#e6edf3}.label{fill:#9198a1}
.c0 .box,.c0 .ribbon{fill:#1b3a5f}.c0 .box{stroke:#4a86cf}
.c1 .box,.c1 .ribbon{fill:#1d4429}.c1 .box{stroke:#4d9a5e}
.other .box,.other .ribbon{fill:#56341d}.other .box{stroke:#c07a45}}
"""


def alignment_svg(pair: Pair, text: str) -> str:
    """Draw the alignment of a text as an SVG that follows the viewer's light or dark setting.

    Args:
        pair: the two tokenizers.
        text: a few lines at most; lines of the picture break between chunks.

    Returns: the SVG, with a title and a description for screen readers.
    """
    ids = [side.encode([text])[0] for side in pair.sides]
    alignment = pair.align(*ids)
    student, teacher = (_tokens(side, row) for side, row in zip(pair.sides, ids, strict=True))
    lines = _broken(_columns(alignment, student, teacher))
    height = len(lines) * _LINE + _MARGIN
    body = "".join(
        _draw_line(line, _MARGIN + index * _LINE, pair) for index, line in enumerate(lines)
    )
    exact = alignment.coverage
    description = (
        f"{len(student)} student tokens ({pair.student.label}) over {len(teacher)} teacher tokens "
        f"({pair.teacher.label}), in {exact.chunks} chunks of which {exact.exact_chunks} spell the "
        "same bytes on both sides."
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-labelledby="t d"><title id="t">Alignment of {escape(repr(text))}</title>'
        f'<desc id="d">{escape(description)}</desc><style>{_STYLE}</style>{body}</svg>\n'
    )


class _Column:
    """One chunk: the texts of its tokens, and how wide each side is."""

    def __init__(self, index: int, kind: int, student: list[str], teacher: list[str]) -> None:
        exact = kind == ChunkKind.EXACT
        self.css = f"c{index % 2}" if exact else "other"
        self.sides = (student, teacher)
        self.width = max(_row_width(side) for side in self.sides)


def _columns(alignment: Alignment, student: list[str], teacher: list[str]) -> list[_Column]:
    bounds = alignment.student_bounds.tolist(), alignment.teacher_bounds.tolist()
    return [
        _Column(
            index,
            int(kind),
            student[bounds[0][index] : bounds[0][index + 1]],
            teacher[bounds[1][index] : bounds[1][index + 1]],
        )
        for index, kind in enumerate(alignment.kind.tolist())
    ]


def _tokens(side: Side, ids: list[int]) -> list[str]:
    return [visible_token(side.vocab, token) for token in ids]


def _box_width(text: str) -> float:
    return len(text) * _CHARACTER + 2 * _PADDING


def _row_width(tokens: list[str]) -> float:
    return sum(map(_box_width, tokens)) + _GAP * max(len(tokens) - 1, 0)


def _broken(columns: list[_Column]) -> list[list[_Column]]:
    lines: list[list[_Column]] = [[]]
    used = 0.0
    for column in columns:
        if lines[-1] and used + column.width > _WIDTH - 2 * _MARGIN:
            lines.append([])
            used = 0.0
        lines[-1].append(column)
        used += column.width + 2 * _GAP
    return lines


def _draw_line(columns: list[_Column], top: float, pair: Pair) -> str:
    labels = (
        (pair.student.label, top + _LABEL - 5),
        (pair.teacher.label, top + _LABEL + 2 * _BOX + _RIBBON + 14),
    )
    parts = [
        f'<text class="label" x="{_MARGIN}" y="{y:.0f}">{escape(label)}</text>'
        for label, y in labels
    ]
    x = float(_MARGIN)
    rows = (top + _LABEL, top + _LABEL + _BOX + _RIBBON)
    for column in columns:
        drawn, spans = [], []
        for tokens, y in zip(column.sides, rows, strict=True):
            width = _row_width(tokens)
            start = x + (column.width - width) / 2
            spans.append((start, start + width))
            for token in tokens:
                size = _box_width(token)
                drawn.append(
                    f'<rect class="box" x="{start:.1f}" y="{y:.0f}" width="{size:.1f}" '
                    f'height="{_BOX}" rx="4"/><text x="{start + _PADDING:.1f}" y="{y + 17:.0f}" '
                    f'textLength="{size - 2 * _PADDING:.1f}" lengthAdjust="spacingAndGlyphs">'
                    f"{escape(token)}</text>"
                )
                start += size + _GAP
        upper, lower = rows[0] + _BOX, rows[1]
        (a, b), (c, d) = spans
        ribbon = (
            f"M{a:.1f},{upper:.0f}L{b:.1f},{upper:.0f}L{d:.1f},{lower:.0f}L{c:.1f},{lower:.0f}Z"
        )
        shown = f'<path class="ribbon" d="{ribbon}"/>' if a < b and c < d else ""
        parts.append(f'<g class="{column.css}">{shown}{"".join(drawn)}</g>')
        x += column.width + 2 * _GAP
    return "".join(parts)
