"""What P-KL and prefix KL compare: the student through W, and the ways to go on after a piece."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from xtoken.losses.engine.row_blocks import Block
from xtoken.losses.p_kl.block import PKLBlocks
from xtoken.losses.p_kl.loss import p_kl_blocks
from xtoken.losses.prefix_kl.loss import prefix_kl_blocks
from xtoken.losses.prefix_kl.targets import PrefixBlock
from xtoken.report.aligned_text import Chunk
from xtoken.report.comparisons import Comparison, LossView
from xtoken.report.page import percent
from xtoken.report.structure import PairStructure
from xtoken.report.targets.case import Case
from xtoken.report.targets.entries import Entries, places_of
from xtoken.tensors.sparse_ops import log_project
from xtoken.trie import PieceTrie


def p_kl_views(case: Case) -> Iterator[LossView]:
    """The teacher's tokens that W reaches."""
    assert case.call.pair.projection is not None
    loss, _ = p_kl_blocks(case.call, case.call.pair.projection)
    for at, chunk in enumerate(case.chunks):
        rows, block = case.rows(loss, at)
        own = case.own(chunk)[1]
        table, dropped = _columns(case, loss, rows, block, own, "teacher tokens that W reaches")
        notes = []
        if not any(line.own for line in table.lines):
            token = case.structure.teacher(own)
            notes.append(f"what the text has, {token}, is reached by no row of W and left out")
        if dropped >= 5e-4:
            notes.append(f"{percent(dropped)} of the teacher's mass is on tokens that W misses")
        yield LossView(case.name, (table,), case.value(loss, rows, block), "; ".join(notes))


def _columns(
    case: Case, loss: PKLBlocks, rows: Tensor, block: Block, own: int, title: str
) -> tuple[Comparison, float]:
    """What P-KL compares at a chunk, and the teacher's mass elsewhere."""
    columns = loss.part.columns
    log_teacher = loss.teacher.log_probs(block.start, block.stop, columns)[0]
    mass = float(log_teacher.exp().sum())
    student = None
    if case.has_student:
        inputs = rows if loss.part.rows is None else rows[:, _places(loss)]
        student = log_project(inputs, loss.params[0], loss.part.map)[0].log_softmax(-1)
    ids = torch.arange(len(log_teacher)) if columns is None else columns
    entries = Entries.of_logs(
        log_teacher.log_softmax(-1),
        student,
        lambda place: case.structure.teacher(int(ids[place])),
        "tokens",
        own=places_of(ids, own),
    )
    return entries.table(title), max(0.0, 1.0 - mass)


def _places(loss: PKLBlocks) -> Tensor:
    """Where the rows of W's part are among the student columns that are read."""
    assert loss.part.rows is not None
    if loss.columns is None:
        return loss.part.rows
    return torch.searchsorted(loss.columns, loss.part.rows)


def prefix_kl_views(case: Case) -> Iterator[LossView]:
    """The first piece, then the ways to go on after each further one."""
    loss, _ = prefix_kl_blocks(case.call)
    for at, chunk in enumerate(case.chunks):
        rows, block = case.rows(loss, at)
        inner = Block(at, at + 1, None)
        own = case.own(chunk)[1]
        tables = [_columns(case, loss.root, rows[:1], inner, own, "the first piece")[0]]
        for part in loss.parts:
            items = part.block(block)
            if items is not None:
                tables += _slots(case, items, rows, chunk)
        note = "" if len(tables) > 1 else "nothing beyond the first piece"
        yield LossView(case.name, tuple(tables), case.value(loss, rows, block), note)


def _slots(case: Case, items: PrefixBlock, rows: Tensor, chunk: Chunk) -> list[Comparison]:
    structure = case.structure
    assert structure.tries is not None
    trie = structure.tries.teacher if items.mirrored else structure.tries.student
    ids = case.student_ids if items.mirrored else case.teacher_ids
    start, end = chunk.student if items.mirrored else chunk.teacher
    row = torch.zeros_like(items.chunk)
    log_student = items.student_log_mass(items.pick(rows, row))
    tables = []
    for item, depth in enumerate(items.depth.tolist()):
        slots = slice(items.layout.slot_ends[item], items.layout.slot_ends[item + 1])
        path = " ".join(structure.spelled(trie, piece) for piece in ids[start : start + depth])
        title = f"after {path}"
        if not bool(items.targets.counted[item]):
            tables.append(Comparison(f"{title}: left out, the teacher has too little there", ()))
            continue
        valid = items.targets.valid[slots]
        pieces = items.layout.piece[slots][valid].tolist()
        own = ids[start + depth] if start + depth < end else -1
        entries = Entries.of_logs(
            items.targets.log_probs[slots][valid],
            log_student[slots][valid].log_softmax(-1) if case.has_student else None,
            partial(_piece_name, structure, trie, pieces),
            "ways to go on",
            own=[place for place, piece in enumerate(pieces) if piece == own],
        )
        tables.append(entries.table(title))
    return tables


def _piece_name(structure: PairStructure, trie: PieceTrie, pieces: list[int], place: int) -> str:
    return structure.spelled(trie, pieces[place])
