"""An alignment as a person sees it: the text in chunks, coloured by kind, and its coverage."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from xtoken.align import Alignment, ChunkKind, Coverage
from xtoken.vocab.display import visible_token
from xtoken.vocab.side import Side

# Two shades for exact chunks, so that neighbours can be told apart.
_SHADES = ("black on bright_green", "black on green")
_STYLES = {
    ChunkKind.MISMATCH: "white on red",
    ChunkKind.STUDENT_ONLY: "black on yellow",
    ChunkKind.TEACHER_ONLY: "black on bright_cyan",
    ChunkKind.SPECIAL: "black on magenta",
}
_MAX_SHAPES = 12


def alignment_view(
    alignment: Alignment,
    student: Side,
    teacher: Side,
    student_ids: Sequence[int],
    teacher_ids: Sequence[int],
    limit: int,
) -> RenderableType:
    """The first `limit` chunks of an alignment, with a legend and the coverage."""
    shown = Text(overflow="fold")
    for chunk in range(min(limit, len(alignment))):
        s0, s1 = alignment.student_bounds[chunk : chunk + 2].tolist()
        t0, t1 = alignment.teacher_bounds[chunk : chunk + 2].tolist()
        left = [visible_token(student.vocab, token_id) for token_id in student_ids[s0:s1]]
        right = [visible_token(teacher.vocab, token_id) for token_id in teacher_ids[t0:t1]]
        kind = ChunkKind(int(alignment.kind[chunk]))
        shown.append(_chunk_text(kind, left, right), _STYLES.get(kind, _SHADES[chunk % 2]))
        if kind in (ChunkKind.EXACT, ChunkKind.MISMATCH) and (len(left), len(right)) != (1, 1):
            shown.append(f"{len(left)}:{len(right)}", "dim italic")
        shown.append("⏎\n" if right[-1:] == ["⏎"] and kind == ChunkKind.EXACT else " ")
    if len(alignment) > limit:
        shown.append(f"\n… {len(alignment) - limit:,} more chunks (--limit)", "dim")
    return Group(
        shown, Text(), _legend(), Text(), coverage_table(alignment.coverage), _shapes(alignment)
    )


def _chunk_text(kind: ChunkKind, left: list[str], right: list[str]) -> str:
    if kind == ChunkKind.STUDENT_ONLY:
        return f"s+{'│'.join(left)}"
    if kind == ChunkKind.TEACHER_ONLY:
        return f"t+{'│'.join(right)}"
    if kind == ChunkKind.SPECIAL:
        return f"{left[0]}={right[0]}"
    if kind == ChunkKind.MISMATCH:
        return f"{'│'.join(left)}≠{'│'.join(right)}"
    if len(left) == len(right) == 1:
        return right[0] if len(right[0]) <= len(left[0]) else left[0]
    if len(left) == 1 or len(right) == 1:
        return "│".join(left if len(right) == 1 else right)
    return f"{'│'.join(left)}={'│'.join(right)}"


def _legend() -> Text:
    legend = Text()
    legend.append("exact", _SHADES[0])
    legend.append(" ")
    legend.append("exact", _SHADES[1])
    legend.append(" with n:m tokens of student:teacher   ")
    legend.append("s≠t", _STYLES[ChunkKind.MISMATCH])
    legend.append(" differs   ")
    legend.append("s+", _STYLES[ChunkKind.STUDENT_ONLY])
    legend.append(" student only   ")
    legend.append("t+", _STYLES[ChunkKind.TEACHER_ONLY])
    legend.append(" teacher only   ")
    legend.append("s=t", _STYLES[ChunkKind.SPECIAL])
    legend.append(" specials of one role")
    return legend


def coverage_table(coverage: Coverage) -> Table:
    """How much of either side lies in exact chunks."""
    table = Table(title="coverage", title_justify="left", min_width=40)
    for title in ("", "bytes", "in exact chunks", "tokens", "in exact chunks"):
        table.add_column(title, justify="left" if not title else "right")
    table.add_row(
        "student",
        f"{coverage.student_bytes:,}",
        f"{coverage.student_byte_share:.3%}",
        f"{coverage.student_tokens:,}",
        f"{coverage.student_token_share:.3%}",
    )
    table.add_row(
        "teacher",
        f"{coverage.teacher_bytes:,}",
        f"{coverage.teacher_byte_share:.3%}",
        f"{coverage.teacher_tokens:,}",
        f"{coverage.teacher_token_share:.3%}",
    )
    table.caption = f"{coverage.chunks:,} chunks, {coverage.exact_chunks:,} exact" + (
        f", {coverage.coarse_chunks:,} coarse: the texts have too little in common there"
        if coverage.coarse_chunks
        else ""
    )
    table.caption_justify = "left"
    return table


def _shapes(alignment: Alignment) -> Text:
    shapes = list(alignment.shapes([ChunkKind.EXACT]).items())
    listed = ", ".join(f"{n}:{m} {count:,}" for (n, m), count in shapes[:_MAX_SHAPES])
    more = ", …" if len(shapes) > _MAX_SHAPES else ""
    return Text(f"exact chunks by student:teacher tokens: {listed or 'none'}{more}")
