"""An alignment as a person sees it: student tokens over teacher tokens, and the coverage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from xtoken.align import Alignment, ChunkKind, Coverage
from xtoken.vocab.display import is_utf8, visible, visible_token
from xtoken.vocab.side import Side

# Two shades for exact chunks, so that neighbours can be told apart.
_SHADES = ("black on bright_green", "black on green")
_STYLES = {
    ChunkKind.MISMATCH: "white on red",
    ChunkKind.STUDENT_ONLY: "black on yellow",
    ChunkKind.TEACHER_ONLY: "black on bright_cyan",
    ChunkKind.SPECIAL: "black on magenta",
}
_SIGNS = {ChunkKind.MISMATCH: "≠", ChunkKind.SPECIAL: "="}
_MAX_SHAPES = 12
# Below this many columns a table of five is unreadable.
_TABLE_WIDTH = 64
_NOTHING = "∅"
_SEPARATORS = "│≠="


def alignment_view(
    alignment: Alignment,
    student: Side,
    teacher: Side,
    student_ids: Sequence[int],
    teacher_ids: Sequence[int],
    limit: int,
) -> RenderableType:
    """The first `limit` chunks of an alignment, with a legend and the coverage."""
    chunks = [
        _Chunk.build(alignment, chunk, (student, student_ids), (teacher, teacher_ids))
        for chunk in range(min(limit, len(alignment)))
    ]
    more = len(alignment) - len(chunks)
    rest = Text(f"… {more:,} more chunks (--limit)", "dim") if more else Text()
    return Group(
        _Rows(chunks), rest, _Legend(), Text(), _Coverage(alignment.coverage),
        _shapes(alignment),
    )  # fmt: skip


@dataclass(frozen=True)
class _Chunk:
    """A chunk as two texts, one per side."""

    student: str
    teacher: str
    style: str
    ends_line: bool

    @classmethod
    def build(
        cls,
        alignment: Alignment,
        chunk: int,
        student: tuple[Side, Sequence[int]],
        teacher: tuple[Side, Sequence[int]],
    ) -> _Chunk:
        texts = []
        bounds = (alignment.student_bounds, alignment.teacher_bounds)
        for (side, ids), ends in zip((student, teacher), bounds, strict=True):
            start, end = ends[chunk : chunk + 2].tolist()
            texts.append(_side_text(side, ids[start:end]))
        kind = ChunkKind(int(alignment.kind[chunk]))
        # Kinds are told apart without colour too.
        texts[1] = _SIGNS.get(kind, "") + texts[1]
        style = _STYLES.get(kind, _SHADES[chunk % 2])
        ends_line = kind == ChunkKind.EXACT and texts[1].endswith("⏎")
        student_text, teacher_text = (_based(text) or _NOTHING for text in texts)
        return cls(student_text, teacher_text, style, ends_line)

    @property
    def width(self) -> int:
        return max(cell_len(self.student), cell_len(self.teacher))

    def parts(self, room: int) -> list[_Chunk]:
        """The chunk in pieces of at most `room` cells, with `…` where it goes on in the next."""
        if self.width <= room:
            return [self]
        cut = [_cut(text, room - 1) for text in (self.student, self.teacher)]
        count = max(map(len, cut))
        texts = [
            [text + ("…" if at + 1 < len(side) else "") for at, text in enumerate(side)]
            + [""] * (count - len(side))
            for side in cut
        ]
        return [
            _Chunk(student, teacher, self.style, self.ends_line and at + 1 == count)
            for at, (student, teacher) in enumerate(zip(*texts, strict=True))
        ]


def _based(text: str) -> str:
    """The text with a base for each mark that would else sit on a separator, or on nothing."""
    based = []
    for before, character in zip(f"│{text}", text, strict=False):
        bare = before in _SEPARATORS and cell_len(character) == 0
        based.append(f"◌{character}" if bare else character)
    return "".join(based)


def _cut(text: str, room: int) -> list[str]:
    """Pieces of at most `room` cells; a mark stays with the character that it is on."""
    pieces, used = [""], 0
    for character in text:
        width = cell_len(character)
        if width and used + width > room:
            pieces.append("")
            used = 0
        pieces[-1] += character
        used += width
    return pieces


def _side_text(side: Side, ids: Sequence[int]) -> str:
    """The tokens of one side of a chunk; its text whole, with their number, where they cut
    characters that the chunk holds whole."""
    pieces = [side.vocab.token_bytes(token_id) for token_id in ids]
    whole = b"".join(pieces)
    if len(ids) > 1 and is_utf8(whole) and not all(map(is_utf8, pieces)):
        return f"{visible(whole)}[{len(ids)}]"
    return "│".join(visible_token(side.vocab, token_id) for token_id in ids)


class _Rows:
    """Student tokens over teacher tokens, chunk by chunk, broken to the width of the console."""

    def __init__(self, chunks: Sequence[_Chunk]) -> None:
        self.chunks = chunks

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names = ("student  ", "teacher  ")
        room = max(options.max_width - len(names[0]), 8)
        for line in _lines(self.chunks, room):
            for name, row in zip(names, ("student", "teacher"), strict=True):
                text = Text(name, "dim", no_wrap=True, overflow="crop")
                for chunk in line:
                    content = getattr(chunk, row)
                    text.append(content + " " * (chunk.width - cell_len(content)), chunk.style)
                    text.append(" ")
                yield text
            yield Text()


def _lines(chunks: Sequence[_Chunk], room: int) -> Iterator[list[_Chunk]]:
    line: list[_Chunk] = []
    used = 0
    for chunk in (part for whole in chunks for part in whole.parts(room)):
        if line and used + chunk.width > room:
            yield line
            line, used = [], 0
        line.append(chunk)
        used += chunk.width + 1
        if chunk.ends_line:
            yield line
            line, used = [], 0
    if line:
        yield line


class _Legend:
    """What the signs mean; the colours too, where there are any."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        legend = Text()
        if console.color_system is not None:
            legend.append("exact", _SHADES[0]).append(" ").append("exact", _SHADES[1])
            legend.append("   ")
        for text, kind in (
            ("≠ bytes differ", ChunkKind.MISMATCH),
            (f"{_NOTHING} below: student only", ChunkKind.STUDENT_ONLY),
            (f"{_NOTHING} above: teacher only", ChunkKind.TEACHER_ONLY),
            ("= special tokens of one role", ChunkKind.SPECIAL),
        ):
            legend.append(text, _STYLES[kind]).append("   ")
        legend.append("│ between tokens   [n] text of n tokens   … goes on below")
        yield legend


class _Coverage:
    """The coverage as a table, or as lines where the terminal is narrow."""

    def __init__(self, coverage: Coverage) -> None:
        self.coverage = coverage

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width >= _TABLE_WIDTH:
            yield coverage_table(self.coverage)
            return
        found = self.coverage
        for side in ("student", "teacher"):
            counts = (getattr(found, f"{side}_{unit}s") for unit in ("byte", "token"))
            shares = (getattr(found, f"{side}_{unit}_share") for unit in ("byte", "token"))
            bytes_, tokens = counts
            of_bytes, of_tokens = shares
            yield Text(
                f"{side}: {bytes_:,} bytes, {of_bytes:.3%} of them in exact chunks; "
                f"{tokens:,} tokens, {of_tokens:.3%} of them"
            )
        yield Text(_counted(found))


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
    table.caption = _counted(coverage)
    table.caption_justify = "left"
    return table


def _counted(coverage: Coverage) -> str:
    coarse = f", {coverage.coarse_chunks:,} coarse: the texts have too little in common there"
    return f"{coverage.chunks:,} chunks, {coverage.exact_chunks:,} exact" + (
        coarse if coverage.coarse_chunks else ""
    )


def _shapes(alignment: Alignment) -> Text:
    shapes = list(alignment.shapes([ChunkKind.EXACT]).items())
    listed = ", ".join(f"{n}:{m} {count:,}" for (n, m), count in shapes[:_MAX_SHAPES])
    more = ", …" if len(shapes) > _MAX_SHAPES else ""
    return Text(f"exact chunks by student:teacher tokens: {listed or 'none'}{more}")
