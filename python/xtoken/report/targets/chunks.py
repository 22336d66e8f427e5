"""What ALM and partition KL compare: likelihoods of whole chunks, and what else they could be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from xtoken.losses.alm import _blocks as alm_blocks
from xtoken.losses.alm import _toss
from xtoken.losses.engine.row_blocks import Block
from xtoken.losses.partition_kl.block import Ending, PartitionKLBlocks
from xtoken.losses.partition_kl.loss import _blocks as partition_kl_blocks
from xtoken.report.aligned_text import Chunk
from xtoken.report.comparisons import Comparison, Line, LossView
from xtoken.report.targets.case import Case
from xtoken.report.targets.entries import Entries, both


def alm_views(case: Case) -> Iterator[LossView]:
    """A chunk's two likelihoods, and the two tosses that are made of them."""
    loss, _ = alm_blocks(case.call)
    for at in range(len(case.chunks)):
        rows, block = case.rows(loss, at)
        teacher = loss.teacher[at : at + 1]
        student, said = None, f"log-likelihood {_signed(float(teacher))} of the teacher"
        if case.has_student:
            found = case.metrics(loss, rows, block)["student_log_prob"]
            student = teacher.new_tensor([found]).to(rows.dtype)
            said = f"{said}, {_signed(found)} of the student"
        whole = Line(
            "this chunk",
            own=True,
            teacher=float(teacher.exp()),
            student=None if student is None else float(student.exp()),
        )
        toss = Entries.of_logs(
            _toss(teacher / loss.temperature)[0],
            None if student is None else _toss(student / loss.temperature)[0],
            lambda place: ("this chunk", "anything else")[place],
            "outcomes",
            direction=loss.direction,
            beta=loss.beta,
            own=[0],
        )
        tables = (
            Comparison("likelihood of the chunk, the product of its tokens'", (whole,)),
            toss.table(f"its {loss.temperature:g}th root, as a coin toss"),
        )
        yield LossView(case.name, tables, case.value(loss, rows, block), said)


def _signed(value: float) -> str:
    return f"{value:.3f}".replace("-", "\u2212")


def partition_kl_views(case: Case) -> Iterator[LossView]:
    """The chunk itself, what else it could have been, and all the rest."""
    loss, _ = partition_kl_blocks(case.call)
    for at, chunk in enumerate(case.chunks):
        rows, block = case.rows(loss, at)
        table = _partition(case, loss, rows, block, chunk)
        note = "" if len(table.lines) > 2 else "nothing else that both sides can name"
        yield LossView(case.name, (table,), case.value(loss, rows, block), note)


def _partition(
    case: Case, loss: PartitionKLBlocks, rows: Tensor, block: Block, chunk: Chunk
) -> Comparison:
    assert block.segments is not None
    known = loss.knowledge(block.start, block.stop)
    log_student = case.log_student(rows, loss.fold)
    own_log_probs = log_student.gather(1, known.tokens[:, None]).squeeze(1)
    student = Ending.of(log_student, known.tokens, own_log_probs, block.segments, known.ends)
    # The loss marks in both which tokens have a slot.
    teacher = replace(known.teacher, compared=known.teacher.compared.clone())
    unused = log_student.new_zeros(1)
    if bool(known.single[0]):
        pairs = loss.common.student_ids, loss.common.teacher_ids
        loss._shared(student, teacher, known.single, unused)
    else:
        pairs = known.own, known.other
        loss._other_ends(student, teacher, known, unused)
    kept = student.compared[0, pairs[0]] & teacher.compared[0, pairs[1]]
    kept = kept & (pairs[0] != student.own[0]) & (pairs[1] != teacher.own[0])
    students, teachers = pairs[0][kept], pairs[1][kept]
    rests = loss._rests(student, teacher)
    log_teacher, log_student = (
        torch.cat([side.before + side.own_log_prob, side.before + side.rows[0, ids], rest])
        for side, ids, rest in zip((teacher, student), (teachers, students), rests, strict=True)
    )
    last = len(log_teacher) - 1
    shape = chunk.student[1] - chunk.student[0], chunk.teacher[1] - chunk.teacher[0]

    def label(place: int) -> str:
        if place in (0, last):
            return "all the rest" if place else "this chunk"
        one, other = int(students[place - 1]), int(teachers[place - 1])
        if shape == (1, 1):
            return both(case.structure, one, other)
        return case.structure.student(one) if shape[0] == 1 else case.structure.teacher(other)

    entries = Entries.of_logs(
        log_teacher,
        log_student if case.has_student else None,
        label,
        "ends" if max(shape) > 1 else "tokens",
        direction=loss.direction,
        beta=loss.beta,
        own=[0],
        always=[last],
    )
    return entries.table(_title(case, chunk, shape))


def _title(case: Case, chunk: Chunk, shape: tuple[int, int]) -> str:
    if shape == (1, 1):
        return "tokens of the same bytes on both sides"
    if min(shape) > 1:
        return "several tokens on both sides: the chunk as it is"
    if shape[0] == 1:
        before = [case.structure.teacher(t) for t in case.teacher_ids[slice(*chunk.teacher)][:-1]]
        return f"student tokens that are {' '.join(before)} and one more to the teacher"
    before = [case.structure.student(t) for t in case.student_ids[slice(*chunk.student)][:-1]]
    return f"teacher tokens that are {' '.join(before)} and one more to the student"
