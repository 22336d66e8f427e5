"""What the losses over single tokens compare: one vocabulary, a common set, ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from xtoken.losses.engine.row_blocks import Block
from xtoken.losses.engine.sorting import _sorted_with_order
from xtoken.losses.engine.sorting import top_k as best_of
from xtoken.losses.hybrid.hybrid import HybridBlocks, hybrid_blocks
from xtoken.losses.same_vocab_kl import _blocks as same_vocab_blocks
from xtoken.losses.strict_top_k import StrictTopKBlocks
from xtoken.losses.strict_top_k import _blocks as strict_top_k_blocks
from xtoken.report.comparisons import Comparison, LossView
from xtoken.report.page import percent
from xtoken.report.targets.case import Case
from xtoken.report.targets.entries import Entries, both, places_of
from xtoken.tensors.stop_fold import folded_logits


def same_vocab_kl_views(case: Case) -> Iterator[LossView]:
    """All tokens of the one vocabulary."""
    loss, _ = same_vocab_blocks(case.call)
    for at, chunk in enumerate(case.chunks):
        rows, block = case.rows(loss, at)
        log_student = case.log_student_of_chunk(rows, block)[0] if case.has_student else None
        entries = Entries.of_logs(
            loss.teacher.log_probs(at, at + 1)[0],
            log_student,
            case.structure.teacher,
            "tokens",
            direction=loss.direction,
            beta=loss.beta,
            own=[case.own(chunk)[1]],
        )
        tables = (entries.table("all tokens"),)
        yield LossView(case.name, tables, case.value(loss, rows, block))


def hybrid_views(case: Case) -> Iterator[LossView]:
    """GOLD, H-KL and ULD: the common set, and the other tokens rank by rank."""
    pair = case.call.pair
    common = {"gold": pair.strict_common, "h-kl": pair.relaxed_common}.get(case.name)
    loss, _ = hybrid_blocks(case.call, common)
    for at, chunk in enumerate(case.chunks):
        rows, block = case.rows(loss, at)
        log_teacher = loss.teacher.log_probs(at, at + 1)[0]
        log_student = case.log_student_of_chunk(rows, block, loss.fold)[0]
        own = case.own(chunk)
        tables = []
        if len(loss.student_common):
            tables.append(_common(case, loss, log_teacher, log_student, own))
        if len(loss.student_rest) + len(loss.teacher_rest):
            tables.append(_ranks(case, loss, log_teacher, log_student, own))
        note = ""
        if common is not None and not len(common):
            note = "the vocabularies have no token in common"
        yield LossView(case.name, tuple(tables), case.value(loss, rows, block), note)


def _common(
    case: Case, loss: HybridBlocks, log_teacher: Tensor, log_student: Tensor, own: tuple[int, int]
) -> Comparison:
    students, teachers = loss.student_common, loss.teacher_common
    entries = Entries.of_logs(
        log_teacher[teachers],
        log_student[students] if case.has_student else None,
        lambda place: both(case.structure, int(students[place]), int(teachers[place])),
        "pairs",
        direction=loss.direction,
        beta=loss.beta,
        own=sorted({*places_of(students, own[0]), *places_of(teachers, own[1])}),
    )
    masses = f"{percent(float(entries.teacher.sum()))} of the teacher's mass"
    if entries.student is not None:
        masses += f", {percent(float(entries.student.sum()))} of the student's"
    name = "pairs of tokens that W joins" if case.name == "h-kl" else "tokens of the same bytes"
    return entries.table(f"{name}, {masses}")


def _ranks(
    case: Case, loss: HybridBlocks, log_teacher: Tensor, log_student: Tensor, own: tuple[int, int]
) -> Comparison:
    """The tokens without a partner, each side by falling probability."""
    width = max(len(loss.student_rest), len(loss.teacher_rest))
    found = []
    for log_probs, rest in ((log_student, loss.student_rest), (log_teacher, loss.teacher_rest)):
        probs, order = _sorted_with_order(log_probs[rest].exp()[None])
        padded = torch.nn.functional.pad(probs[0], (0, width - probs.shape[1]))
        found.append((padded, rest[order[0]]))
    (student, student_ids), (teacher, teacher_ids) = found

    def label(rank: int) -> str:
        name = case.structure.teacher(int(teacher_ids[rank])) if rank < len(teacher_ids) else "∅"
        if not case.has_student:
            return name
        other = case.structure.student(int(student_ids[rank])) if rank < len(student_ids) else "∅"
        return f"{name} | {other}"

    mine = {*places_of(teacher_ids, own[1])}
    if case.has_student:
        mine |= {*places_of(student_ids, own[0])}
    entries = Entries(
        teacher,
        student if case.has_student else None,
        (student - teacher).abs() if case.has_student else None,
        label,
        "ranks",
        own=sorted(mine),
        order=-torch.arange(width),
    )
    every = "all tokens" if not len(loss.student_common) else "tokens without a partner"
    sides = "teacher's | student's" if case.has_student else "teacher's"
    return entries.table(f"{every}, rank by rank: {sides}")


def strict_top_k_views(case: Case) -> Iterator[LossView]:
    """The shared tokens that the student likes best, at chunks of one token on both sides."""
    loss, _ = strict_top_k_blocks(case.call)
    for at, chunk in enumerate(case.chunks):
        rows, block = case.rows(loss, at)
        value = case.value(loss, rows, block)
        if not bool(loss.strict[at]):
            note = f"a chunk of {chunk.shape} tokens counts as 0: only 1:1 chunks are compared"
            yield LossView(case.name, (), value, note)
        elif loss.kept == 0:
            yield LossView(case.name, (), value, "the vocabularies have no token in common")
        elif not case.has_student:
            note = "the student chooses which tokens are compared: no model of it is given"
            yield LossView(case.name, (), value, note)
        else:
            yield _support(case, loss, rows, block, case.own(chunk))


def _support(
    case: Case, loss: StrictTopKBlocks, rows: Tensor, block: Block, own: tuple[int, int]
) -> LossView:
    logits = folded_logits(rows, loss.temperature, loss.fold)
    shared = logits.index_select(1, loss.common.student_ids)
    log_teacher = loss.teacher.log_probs(block.start, block.stop, loss.common.teacher_ids)
    _, places = best_of(shared, loss.kept)
    log_student = shared.gather(1, places).log_softmax(1)[0]
    students, teachers = loss.common.student_ids[places[0]], loss.common.teacher_ids[places[0]]
    table = Entries.of_logs(
        log_teacher.gather(1, places).log_softmax(1)[0],
        log_student,
        lambda place: both(case.structure, int(students[place]), int(teachers[place])),
        "tokens",
        direction="reverse",
        own=sorted({*places_of(students, own[0]), *places_of(teachers, own[1])}),
        order=log_student,
    ).table(f"the student's {loss.kept} likeliest tokens of the same bytes on both sides")
    metrics = case.metrics(loss, rows, block)
    note = (
        f"they have {percent(metrics['teacher_mass'])} of the teacher's mass and "
        f"{percent(metrics['student_mass'])} of the student's, each scaled to 1"
    )
    if not any(line.own for line in table.lines):
        note += "; what the text has is not among them"
    return LossView(case.name, (table,), case.value(loss, rows, block), note)
