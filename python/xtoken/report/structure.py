"""What the losses compare at each chunk, as far as the two tokenizers say it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from xtoken.align import ChunkKind
from xtoken.errors import XTokenError
from xtoken.projection import Projection
from xtoken.report.aligned_text import AlignedText, Chunk
from xtoken.report.comparisons import Comparison, Line, LossView, first_lines
from xtoken.targets import TargetBuilder
from xtoken.trie import PairTries, PieceTrie
from xtoken.vocab.display import visible_token

Ints = NDArray[np.int64]
_Part = TypeVar("_Part")
END = "END, no more pieces"


@dataclass(frozen=True, eq=False)
class PairStructure:
    """The parts of a pair that a page shows: W, tries, cells.

    A part that the tokenizers do not give is None, with the reason in `lacking`.

    Attributes:
        projection: built, or loaded with its tokenizers.
    """

    projection: Projection

    @cached_property
    def tries(self) -> PairTries | None:
        """Both tries."""
        return self._made("tries", lambda: PairTries.from_projection(self.projection))

    @cached_property
    def roots(self) -> Ints | None:
        """[V_t] the cell of each teacher token, -1 for none; see `TargetBuilder.roots`."""
        return self._made("cells", lambda: TargetBuilder.from_projection(self.projection).roots)

    @cached_property
    def lacking(self) -> dict[str, str]:
        """Why a part is not there, by its name; filled as parts are asked for."""
        return {}

    @cached_property
    def cells(self) -> Ints:
        """[V_s] the cell of each student token, that of its first piece; -1 for none."""
        projection = self.projection
        first = np.full(projection.shape[0], -1, np.int64)
        starts, ends = projection.pieces_indptr[:-1], projection.pieces_indptr[1:]
        some = starts < ends
        first[some] = projection.pieces[starts[some]]
        if self.roots is None:
            return np.full_like(first, -1)
        return np.where(first < 0, -1, self.roots[first.clip(min=0)])

    @cached_property
    def cell_members(self) -> tuple[Ints, Ints]:
        """Student tokens sorted by cell, and [V_t + 1] where each cell's begin."""
        order = np.argsort(self.cells, kind="stable")
        order = order[self.cells[order] >= 0]
        sizes = np.bincount(self.cells[order], minlength=self.projection.shape[1])
        return order, np.concatenate([[0], np.cumsum(sizes)])

    def members(self, cell: int) -> Ints:
        """The student tokens of a cell."""
        order, starts = self.cell_members
        return order[starts[cell] : starts[cell + 1]]

    def student(self, token_id: int) -> str:
        """A student token for people."""
        return visible_token(self.projection.vocabularies()[0], token_id)

    def teacher(self, token_id: int) -> str:
        """A teacher token for people."""
        return visible_token(self.projection.vocabularies()[1], token_id)

    def spelled(self, trie: PieceTrie, piece: int) -> str:
        """A piece of a trie for people; a negative one is the end of a token."""
        if piece < 0:
            return END
        return self.teacher(piece) if trie.side == "teacher" else self.student(piece)

    def row(self, student_id: int, own: int | None = None) -> Comparison:
        """The row of W of a student token; `own` is the teacher token that the text has."""
        indices, weights = self.projection.csr.row(student_id)
        lines = [
            Line(self.teacher(column), column == own, weight=weight)
            for column, weight in zip(indices.tolist(), weights.tolist(), strict=True)
        ]
        return Comparison(f"the row of W of {self.student(student_id)}", tuple(lines))

    def _made(self, part: str, make: Callable[[], _Part]) -> _Part | None:
        try:
            return make()
        except XTokenError as error:
            self.lacking[part] = str(error)
            return None


def node_lines(structure: PairStructure, trie: PieceTrie, node: int, own: int | None) -> list[Line]:
    """The slots of a trie node, with the number of tokens below each; `own` is a piece or -1."""
    slots = trie.slots
    at = slice(int(slots.slot_ptr[node]), int(slots.slot_ptr[node + 1]))
    pairs = zip(slots.slot_pieces[at].tolist(), slots.slot_sizes[at].tolist(), strict=True)
    return [
        Line(structure.spelled(trie, piece), piece == own, tokens=size) for piece, size in pairs
    ]


def structural_views(text: AlignedText, chunks: list[Chunk]) -> list[list[LossView]]:
    """For each chunk what P-KL, prefix KL and exact KL compare there, without probabilities.

    A chunk that no loss can use has none.
    """
    structure = PairStructure(text.pair.projection)
    prefixes = _prefixes(structure, text, chunks)
    return [
        _views(structure, text, chunk, prefixes[chunk.index]) if _comparable(chunk) else []
        for chunk in chunks
    ]


def _comparable(chunk: Chunk) -> bool:
    if chunk.counted is not None:
        return chunk.counted
    return chunk.kind == ChunkKind.EXACT


def _prefixes(
    structure: PairStructure, text: AlignedText, chunks: list[Chunk]
) -> list[list[Comparison]]:
    found: list[list[Comparison]] = [[] for _ in chunks]
    tries = structure.tries
    if tries is None:
        return found
    for trie, mirrored in ((tries.student, False), (tries.teacher, True)):
        chosen = [chunk for chunk in chunks if _comparable(chunk) and _fits(chunk, mirrored)]
        ids = text.example.student_ids if mirrored else text.example.teacher_ids
        ranges = [chunk.student if mirrored else chunk.teacher for chunk in chosen]
        starts, ends = (np.array([r[side] for r in ranges], np.int64) for side in (0, 1))
        nodes = trie.lookup(np.ascontiguousarray(ids), starts, ends)
        for chunk, depth, node in zip(*(part.tolist() for part in nodes), strict=True):
            start, end = ranges[chunk]
            own = int(ids[start + depth]) if start + depth < end else -1
            title = "after " + " ".join(
                structure.spelled(trie, int(piece)) for piece in ids[start : start + depth]
            )
            lines = node_lines(structure, trie, node, own)
            found[chosen[chunk].index].append(first_lines(title, lines, "ways to go on"))
    return found


def _fits(chunk: Chunk, mirrored: bool) -> bool:
    """Prefix KL compares chunks of one student token, and mirrored those of one teacher token."""
    sizes = [end - start for start, end in (chunk.student, chunk.teacher)]
    return (sizes[0] > 1 and sizes[1] == 1) if mirrored else sizes[0] == 1


def _views(
    structure: PairStructure, text: AlignedText, chunk: Chunk, prefixes: list[Comparison]
) -> list[LossView]:
    own = int(text.example.teacher_ids[chunk.teacher[0]])
    first = int(text.example.student_ids[chunk.student[0]])
    row = structure.row(first, own)
    views = [LossView("p-kl", (row,), note="" if row.lines else "the row is empty")]
    lacking = structure.lacking.get("tries")
    note = lacking or ("" if prefixes else "nothing beyond the first piece")
    views.append(LossView("prefix-kl", tuple(prefixes), note=note))
    if structure.roots is None:
        return [*views, LossView("exact-kl", (), note=structure.lacking["cells"])]
    cell = int(structure.roots[own])
    if cell < 0:
        return [*views, LossView("exact-kl", (), note="special tokens, compared by role")]
    members = structure.members(cell)
    lines = [Line(structure.student(token), token == first, tokens=1) for token in members.tolist()]
    title = f"the cell of {structure.teacher(cell)}: student tokens"
    return [*views, LossView("exact-kl", (first_lines(title, lines, "tokens"),))]
