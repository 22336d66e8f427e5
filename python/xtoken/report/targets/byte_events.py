"""What BPM and ESCD compare: what teacher tokens begin with, and how a begun one is completed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from xtoken.losses.bpm.block import compared
from xtoken.losses.bpm.loss import _blocks as bpm_blocks
from xtoken.losses.engine.row_blocks import Block
from xtoken.losses.escd.loss import BlockEvents, EscdBlocks
from xtoken.losses.escd.loss import _blocks as escd_blocks
from xtoken.report.comparisons import Comparison, LossView
from xtoken.report.targets.case import Case
from xtoken.report.targets.entries import Entries
from xtoken.tensors.segments import owners, ragged_arange, segment_logsumexp


def bpm_views(case: Case) -> Iterator[LossView]:
    """A table for each student position of a chunk."""
    loss, _ = bpm_blocks(case.call)
    for at, chunk in enumerate(case.chunks):
        rows, block = case.rows(loss, at)
        target, entries, counted, space = loss.targets(at, at + 1)
        if loss.mask_spaces:
            counted = counted & ~space
        log_student = case.log_student(rows, loss.fold)
        log_teacher, log_student = compared(target, entries, counted, log_student)
        tables = []
        for row, token in enumerate(case.student_ids[slice(*chunk.student)]):
            name = case.structure.student(token)
            if bool(counted[row]):
                sides = log_teacher[row], log_student[row]
                title = f"student tokens at {name}"
                tables.append(_one_by_one(case, *sides, entries[row], token, title))
                continue
            why = "spaces alone" if bool(space[row]) else "the two sides are not the same bytes"
            tables.append(Comparison(f"at {name}: left out, {why}", ()))
        yield LossView(case.name, tuple(tables), case.value(loss, rows, block))


def _one_by_one(
    case: Case, log_teacher: Tensor, log_student: Tensor, entries: Tensor, token: int, title: str
) -> Comparison:
    """The tokens that are compared one by one, and the complement [V_s + 1] of all others."""
    kept = torch.cat([entries, ~entries.all(0, keepdim=True)]).nonzero().flatten()
    last = len(log_teacher) - 1

    def label(place: int) -> str:
        index = int(kept[place])
        return "the complement" if index == last else case.structure.student(index)

    return Entries.of_logs(
        log_teacher[kept],
        log_student[kept] if case.has_student else None,
        label,
        "tokens",
        direction=case.call.options.direction,
        beta=case.call.options.beta,
        own=(kept == token).nonzero().flatten().tolist(),
        always=(kept == last).nonzero().flatten().tolist(),
    ).table(title)


def escd_views(case: Case) -> Iterator[LossView]:
    """The root, and the completions of what the token before began."""
    loss, _ = escd_blocks(case.call)
    for at, chunk in enumerate(case.chunks):
        rows, block = case.rows(loss, at)
        log_student = case.log_student(rows, loss.fold)
        events = loss.events(at, at + 1)
        sides = compared(
            events.target,
            events.entries,
            torch.ones_like(events.first, dtype=torch.bool),
            log_student.index_select(0, events.first),
        )
        token = case.own(chunk)[0]
        title = f"the root: student tokens at {case.structure.student(token)}"
        root = _one_by_one(case, sides[0][0], sides[1][0], events.entries[0], token, title)
        completions = _completions(case, loss, events, block, log_student)
        note = "" if completions else "no teacher token is left to be completed here"
        tables = (root, *completions)
        yield LossView(case.name, tables, case.value(loss, rows, block), note)


def _completions(
    case: Case, loss: EscdBlocks, events: BlockEvents, block: Block, log_student: Tensor
) -> list[Comparison]:
    tables = loss.completions
    if not len(events.mass):
        return []
    rows = loss.student.range_of(block.start, block.stop)
    children = loss.places.children.of_rows(rows.start, rows.stop)
    total = children.total("groups")
    begun = children["token"][owners(children["groups"], total)]
    entry = ragged_arange(tables.ptr[children["token"]], children["groups"], total)
    # A group's shortest member is its first.
    event = tables.members[torch.searchsorted(tables.groups, tables.group[entry])]
    read = log_student[events.row[events.event_of], events.tokens]
    log_completed = segment_logsumexp(read, events.event_of, len(events.mass))
    adds = -events.mass * log_completed.masked_fill(events.mass == 0, 0.0)
    found = []
    for row in sorted(set(events.row.tolist())):
        mine = (events.row == row).nonzero().flatten()
        names, sizes = event[mine], tables.size[entry[mine]].tolist()
        first = case.structure.student(int(begun[mine[0]]))
        # The first row follows the chunk before, the second this chunk's first token.
        what = "of the chunk before" if row == 0 else "of this chunk"
        found.append(
            Entries(
                events.mass[mine],
                log_completed[mine].exp() if case.has_student else None,
                adds[mine] if case.has_student else None,
                partial(_event_name, case, names),
                "events",
                sizes=sizes,
            ).table(f"after {first} {what}: teacher tokens that it began, and what completes them")
        )
    return found


def _event_name(case: Case, names: Tensor, place: int) -> str:
    return case.structure.teacher(int(names[place]))
