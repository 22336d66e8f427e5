"""Where the student's positions of a batch stand in the teacher's tokens, byte by byte."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.losses.engine.checks import check_token_ids
from xtoken.losses.engine.merge import ChunkRows
from xtoken.losses.engine.prepared import Ints, Items, Prepared
from xtoken.tensors.byte_prefixes import BytePrefixes
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.host import on_device
from xtoken.tensors.pair_parts import PairParts


@dataclass(frozen=True, eq=False)
class BytePlaces(Prepared):
    """The student's positions in exact chunks, in the order of the chunks.

    A chunk whose two sides are not the same bytes (special tokens, mismatches that the caller
    admits) is compared at its first position alone.

    Attributes:
        teacher_index: [M] int64 rows of the flattened teacher positions, all those of each chunk.
        teacher_ends: C + 1 numbers on the host, each chunk's range in them.
        item: [N] int64 the teacher row that each student position is read from.
        counted: [N] bool, whether a position has a target.
        space: [N] bool, whether the student's token there is spaces and tabs alone.
        inner: the positions inside a teacher token, with `item`, and `lo`, `size`, the range of
            teacher tokens that begin with the bytes so far, and `before`, their number.
        longer: student tokens of the text that run past the end of a teacher token; with `token`,
            the last teacher row that has a part of it, `item`, the range `lo`, `size` of teacher
            tokens that begin with that part, and `next`, the next longer one's place among all of
            them or -1.
        spelled: the teacher's own tokens before that part: for each the `longer` one, `item`, and
            `lo`, `size`, the range of teacher tokens with its bytes.
        heads: where the mass of the first `longer` token of a position is taken from: the column
            `token`, and its place `first` among the longer ones.
    """

    teacher_index: Tensor
    teacher_ends: Ints
    item: Tensor
    counted: Tensor
    space: Tensor
    inner: Items
    longer: Items
    spelled: Items
    heads: Items


@dataclass
class _Lists:
    """The items of a batch as they are found."""

    inner: dict[str, list[int]] = field(
        default_factory=lambda: {name: [] for name in ("row", "item", "lo", "size", "before")}
    )
    longer: dict[str, list[int]] = field(
        default_factory=lambda: {
            name: [] for name in ("row", "token", "item", "lo", "size", "next")
        }
    )
    spelled: dict[str, list[int]] = field(
        default_factory=lambda: {name: [] for name in ("row", "longer", "item", "lo", "size")}
    )
    heads: dict[str, list[int]] = field(
        default_factory=lambda: {name: [] for name in ("row", "token", "first")}
    )


def byte_places(
    pair: PairParts, chunks: ChunkBatch, student_ids: Tensor, teacher_ids: Tensor
) -> BytePlaces:
    """The places of a batch; ids on another device than the CPU are waited for.

    Raises:
        TokenIdError: an id inside a chunk is outside its vocabulary.
    """
    tables = pair.byte_prefixes
    assert tables is not None
    host = chunks.host
    sides = []
    for side, ids, size in (
        ("student", student_ids, pair.sizes[0]),
        ("teacher", teacher_ids, pair.sizes[1]),
    ):
        first, last = host.range_of(side)
        rows = ChunkRows.ragged(
            host.sample * ids.shape[1] + first, last - first, torch.device("cpu")
        )
        tokens = ids.cpu().flatten()[rows.index]
        check_token_ids(tokens, size, side)
        assert rows.ends is not None
        sides.append((rows.index.numpy() - 1, rows.ends, tokens.numpy()))
    (_, student_ends, own), (teacher_rows, teacher_ends, other) = sides
    count, device = len(own), chunks.device
    item, counted = np.repeat(teacher_ends[:-1], np.diff(student_ends)), np.zeros(count, np.bool_)
    counted[student_ends[:-1]] = True
    found = _Lists()
    several = (np.diff(student_ends) > 1) | (np.diff(teacher_ends) > 1)
    for chunk in np.flatnonzero(several).tolist():
        at, to = int(student_ends[chunk]), int(teacher_ends[chunk])
        own_tokens = own[at : student_ends[chunk + 1]].tolist()
        other_tokens = other[to : teacher_ends[chunk + 1]].tolist()
        _chunk(tables, own_tokens, other_tokens, at, to, item, counted, found)
    spaces = np.array([_is_space(tables.student_bytes[token]) for token in own], np.bool_)
    items = {
        name: Items.of(
            columns["row"],
            {key: values for key, values in columns.items() if key != "row"},
            device,
        )
        for name, columns in vars(found).items()
    }
    return BytePlaces(
        host,
        on_device(teacher_rows, device),
        teacher_ends,
        on_device(item, device),
        on_device(counted, device),
        on_device(spaces, device),
        **items,
    )


def _is_space(text: bytes) -> bool:
    return bool(text) and not text.strip(b" \t")


def _chunk(
    tables: BytePrefixes,
    own: list[int],
    other: list[int],
    row: int,
    first_item: int,
    item: NDArray[np.int64],
    counted: NDArray[np.bool_],
    found: _Lists,
) -> None:
    """One chunk of several tokens on a side, its positions from `row` on."""
    texts = [tables.teacher_bytes[token] for token in other]
    text = b"".join(texts)
    if not text or text != b"".join(tables.student_bytes[token] for token in own):
        return
    ends = list(accumulate(map(len, texts), initial=0))
    at = part = 0
    for token in own:
        while ends[part + 1] <= at:
            part += 1
        before = at - ends[part]
        item[row], counted[row] = first_item + part, True
        if before:
            lo, hi = tables.range_of(texts[part][:before])
            columns = (row, first_item + part, lo, hi - lo, before)
            for name, value in zip(found.inner, columns, strict=True):
                found.inner[name].append(value)
        _longer(tables, text, texts, ends, other, at, part, row, first_item, found)
        at += len(tables.student_bytes[token])
        row += 1


def _longer(
    tables: BytePrefixes,
    text: bytes,
    texts: list[bytes],
    ends: list[int],
    other: list[int],
    at: int,
    part: int,
    row: int,
    first_item: int,
    found: _Lists,
) -> None:
    """The student tokens that the text from `at` begins with and that end in a later part."""
    columns = found.longer
    start = len(columns["row"])
    last = part
    for end in range(ends[part + 1] + 1, len(text) + 1):
        token = tables.spellers.get(text[at:end])
        if token is None:
            continue
        while ends[last + 1] < end:
            last += 1
        for spelled in range(part, last):
            lo, hi = tables.range_of_equal(texts[spelled])
            values = (row, len(columns["row"]), first_item + spelled, lo, hi - lo)
            for name, value in zip(found.spelled, values, strict=True):
                found.spelled[name].append(value)
        lo, hi = tables.range_of(texts[last][: end - ends[last]])
        if len(columns["row"]) > start:
            columns["next"][-1] = len(columns["row"])
        values_of = (row, token, first_item + last, lo, hi - lo, -1)
        for name, value in zip(columns, values_of, strict=True):
            columns[name].append(value)
    if len(columns["row"]) > start:
        head = (row, tables.after(other[part], at - ends[part]), start)
        for name, value in zip(found.heads, head, strict=True):
            found.heads[name].append(value)
