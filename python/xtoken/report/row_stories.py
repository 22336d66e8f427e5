"""Rows of W with all that follows from them: pieces, weights, cell, neighbours in the trie."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xtoken._checks import check_number
from xtoken._core import PROJECTION_RULES
from xtoken.audit.audit import CRITICAL
from xtoken.projection import RULE_CODES, Projection
from xtoken.report.structure import PairStructure
from xtoken.trie import PieceTrie
from xtoken.vocab.classes import SPECIAL, classes
from xtoken.vocab.display import quoted

Ints = NDArray[np.int64]

# Shown of a trie node: ways to go on, and tokens of each. The others are counted.
WAYS = 12
EXAMPLES = 3


class Row(NamedTuple):
    """A row of W, named as in `Explanation`.

    Attributes:
        token: student id.
        kind, rule: indices of its class and rule.
        pieces: the teacher's spelling, teacher ids.
        columns, weights: its entries.
        cell: teacher id, -1 for none.
        nodes: indices of the trie nodes along its pieces.
    """

    token: int
    kind: int
    rule: int
    pieces: list[int]
    columns: list[int]
    weights: list[float]
    cell: int
    nodes: list[int]


class Way(NamedTuple):
    """How tokens go on at a trie node: `piece` is -1 where they end; some of the `size` tokens."""

    piece: int
    size: int
    some: list[int]


class Node(NamedTuple):
    """A trie node: its prefix, its most important ways, the number of others and their tokens."""

    prefix: list[int]
    ways: list[Way]
    other_ways: int
    other_tokens: int


class Cell(NamedTuple):
    """The student tokens that are compared under one teacher token: their number, and some."""

    size: int
    some: list[int]


@dataclass(frozen=True)
class RowStories:
    """Rows as plain values for a page.

    Attributes:
        rows: by id.
        classes, rules: their names.
        nodes: of the trie, those that rows name.
        cells: by teacher id.
        student, teacher: tokens by id, of all ids that are named above.
        total: rows of W that a tokenizer emits.
        lacking: why tries or cells are not there, by name.
    """

    rows: list[Row]
    classes: list[str]
    rules: list[str]
    nodes: list[Node]
    cells: dict[int, Cell]
    student: dict[int, str]
    teacher: dict[int, str]
    total: int
    lacking: dict[str, str]


def row_stories(projection: Projection, limit: int) -> RowStories:
    """The rows that matter most: critical classes and special tokens, then those that split, then
    the others, the last two evenly over the vocabulary.

    Args:
        projection: built, or loaded with its tokenizers.
        limit: the most rows.

    Raises:
        OptionError: the limit is below 1, or the projection was loaded without its tokenizers.
    """
    rule = "is out of range; expected a whole number of at least 1"
    check_number("rows", limit, 1, whole=True, rule=rule)
    structure = PairStructure(projection)
    class_of = dict(classes(projection.vocabularies()[0]))
    chosen = _chosen(projection, class_of, limit)
    names = sorted(set(class_of.values()))
    trie = None if structure.tries is None else structure.tries.student
    paths = _paths(trie, projection, chosen)
    number = {node: at for at, node in enumerate(sorted({n for path in paths for n in path}))}
    cells = structure.cells
    rows = []
    for token, path in zip(chosen, paths, strict=True):
        indices, weights = projection.csr.row(token)
        rows.append(
            Row(
                token,
                names.index(class_of[token]),
                int(projection.rules[token]),
                projection.token_pieces(token),
                indices.tolist(),
                [round(weight, 6) for weight in weights.tolist()],
                int(cells[token]),
                [number[node] for node in path],
            )
        )
    nodes = [] if trie is None else [_node(trie, projection, node) for node in number]
    wanted = [int(cell) for cell in np.unique(cells[chosen]) if cell >= 0]
    found = {cell: _cell(structure, cell) for cell in wanted}
    return RowStories(
        rows,
        names,
        list(PROJECTION_RULES),
        nodes,
        found,
        _named(projection, 0, _student_ids(rows, nodes, found)),
        _named(projection, 1, _teacher_ids(rows, nodes, found)),
        len(class_of),
        structure.lacking,
    )


def _chosen(projection: Projection, class_of: dict[int, str], limit: int) -> list[int]:
    exact = RULE_CODES["exact"]
    first, split, plain = [], [], []
    for token, name in class_of.items():
        if name in CRITICAL or name == SPECIAL:
            first.append(token)
        elif projection.rules[token] != exact:
            split.append(token)
        else:
            plain.append(token)
    chosen: list[int] = []
    for group in (first, split, plain):
        room = min(limit - len(chosen), len(group))
        # Evenly over the ids: early ids are frequent tokens.
        chosen += [group[at] for at in np.linspace(0, len(group) - 1, room).astype(int)]
    return sorted(chosen)


def _paths(trie: PieceTrie | None, projection: Projection, chosen: list[int]) -> list[list[int]]:
    """The nodes along each token's own pieces at which there is something to decide."""
    paths: list[list[int]] = [[] for _ in chosen]
    if trie is not None:
        indptr = projection.pieces_indptr
        at = np.array(chosen, np.int64)
        found = trie.lookup(projection.pieces, indptr[at].copy(), indptr[at + 1].copy())
        for chunk, node in zip(found.chunk.tolist(), found.node.tolist(), strict=True):
            paths[chunk].append(node)
    return paths


def _node(trie: PieceTrie, projection: Projection, node: int) -> Node:
    slots = trie.slots
    low, high = int(slots.slot_ptr[node]), int(slots.slot_ptr[node + 1])
    sizes = slots.slot_sizes[low:high]
    starts = int(slots.node_starts[node]) + np.concatenate([[0], np.cumsum(sizes)[:-1]])
    pieces = slots.slot_pieces[low:high].tolist()
    ways = [
        Way(piece, size, slots.tokens[start : start + min(size, EXAMPLES)].tolist())
        for piece, size, start in zip(pieces, sizes.tolist(), starts.tolist(), strict=True)
    ]
    # Where tokens end first, then what most tokens go on with.
    ways.sort(key=lambda way: (way.piece >= 0, -way.size, way.piece))
    left = ways[WAYS:]
    prefix = _prefix(trie, projection, node)
    return Node(prefix, ways[:WAYS], len(left), sum(way.size for way in left))


def _prefix(trie: PieceTrie, projection: Projection, node: int) -> list[int]:
    """What all tokens below a node start with."""
    below = trie.below(node)
    first, last = (projection.token_pieces(int(token)) for token in (below[0], below[-1]))
    # Tokens lie in the order of their pieces: what the first and the last share, all share.
    prefix = []
    for one, other in zip(first, last, strict=False):
        if one != other:
            break
        prefix.append(one)
    return prefix


def _cell(structure: PairStructure, cell: int) -> Cell:
    members = structure.members(cell)
    return Cell(len(members), members[: 2 * EXAMPLES].tolist())


def _student_ids(rows: list[Row], nodes: list[Node], cells: dict[int, Cell]) -> set[int]:
    found = {row.token for row in rows}
    for node in nodes:
        for way in node.ways:
            found.update(way.some)
    for cell in cells.values():
        found.update(cell.some)
    return found


def _teacher_ids(rows: list[Row], nodes: list[Node], cells: dict[int, Cell]) -> set[int]:
    found = set(cells)
    for row in rows:
        found.update(row.pieces, row.columns)
    for node in nodes:
        found.update(node.prefix, (way.piece for way in node.ways if way.piece >= 0))
    return found


def _named(projection: Projection, side: int, ids: Iterable[int]) -> dict[int, str]:
    vocab = projection.vocabularies()[side]
    return {token: quoted(vocab, token) for token in sorted(ids)}
