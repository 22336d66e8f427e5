"""KL on a common set of token pairs plus sorted L1 on the rest: what GOLD and H-KL share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xtoken.losses.engine.checks import check_batch, check_finite, check_temperature
from xtoken.losses.engine.divergence import Direction, check_direction, divergence
from xtoken.losses.engine.merge import ChunkRows, Merge, chunk_rows, merge_rows
from xtoken.losses.engine.row_blocks import Block, BlockLoss, reduce_chunks
from xtoken.losses.engine.sorting import sorted_l1
from xtoken.losses.engine.student_input import Student, student_rows
from xtoken.losses.engine.teacher_rows import TeacherRows
from xtoken.losses.output import LossOutput
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.rows import block_rows
from xtoken.tensors.teacher_signal import Teacher


@dataclass(eq=False, kw_only=True)
class HybridBlocks(BlockLoss):
    """Partial KL over common pairs and sorted L1 over the uncommon tokens, a block of chunks.

    The common probabilities are those of the full softmax, not renormalized: the partial KL can
    be below 0, and its gradient on each uncommon student logit j is p[j] * (the teacher's mass on
    the common set), never below 0 (Proposition 1 of X-Token, arXiv 2605.21699).
    """

    student: ChunkRows
    teacher: TeacherRows
    student_common: Tensor
    teacher_common: Tensor
    student_rest: Tensor
    teacher_rest: Tensor
    common_weight: float
    uld_weight: float
    temperature: float
    direction: Direction
    beta: float
    metric_names = ("kl", "uld", "teacher_mass", "student_mass", "top1_agreement")

    def forward(
        self, rows: Tensor, block: Block, params: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        logits = merge_rows(rows, block.segments, len(block))
        if self.temperature != 1.0:
            logits = logits / self.temperature
        log_student = torch.log_softmax(logits, -1)
        log_teacher = self.teacher.log_probs(block.start, block.stop)
        zero = log_student.new_zeros(len(block))
        kl = uld = zero
        masses = [zero, zero, zero]
        if len(self.student_common):
            common_student = log_student.index_select(1, self.student_common)
            common_teacher = log_teacher.index_select(1, self.teacher_common)
            kl = divergence(common_teacher, common_student, self.direction, self.beta)
            best = common_teacher.argmax(-1) == common_student.detach().argmax(-1)
            masses = [
                torch.exp(common_teacher).sum(-1),
                torch.exp(common_student.detach()).sum(-1),
                best.to(zero.dtype),
            ]
        if self.uld_weight and len(self.student_rest) + len(self.teacher_rest):
            uld = sorted_l1(
                torch.exp(log_student.index_select(1, self.student_rest)),
                torch.exp(log_teacher.index_select(1, self.teacher_rest)),
            )
        loss = (self.common_weight * kl + self.uld_weight * uld) * self.temperature**2
        return loss, torch.stack([x.detach().sum() for x in (kl, uld, *masses)])


def hybrid(
    student_logits: Student,
    teacher: Teacher,
    chunks: ChunkBatch,
    *,
    student_ids_common: Tensor,
    teacher_ids_common: Tensor,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    student_vocab_size: int | None,
    teacher_vocab_size: int | None,
    common_weight: float,
    uld_weight: float,
    merge: Merge,
    temperature: float,
    direction: Direction,
    beta: float,
    normalizer: float | Tensor | None,
    chunk_weights: Tensor | None,
    block_size: int | None,
) -> LossOutput:
    """The loss behind `gold`, `h_kl` and `uld`; see there."""
    check_temperature(temperature)
    check_direction(direction, beta)
    for name, weight in (("common_weight", common_weight), ("uld_weight", uld_weight)):
        if not weight >= 0:
            raise ValueError(f"{name} = {weight} must not be negative")
    source = student_rows(student_logits, student_vocab_size)
    check_batch(source, teacher, chunks, student_ids, teacher_ids)
    rows = TeacherRows.of(teacher, chunks, teacher_vocab_size, temperature, merge)
    device = source.tensors()[0].device
    check_common(student_ids_common, teacher_ids_common, source.vocab_size, rows.vocab_size)
    student_common, teacher_common = student_ids_common.to(device), teacher_ids_common.to(device)
    loss = HybridBlocks(
        student=chunk_rows(chunks, "student", source.positions[1], merge),
        teacher=rows,
        student_common=student_common,
        teacher_common=teacher_common,
        student_rest=_others(student_common, source.vocab_size),
        teacher_rest=_others(teacher_common, rows.vocab_size),
        common_weight=common_weight,
        uld_weight=uld_weight,
        temperature=temperature,
        direction=direction,
        beta=beta,
    )
    result = reduce_chunks(
        loss,
        source,
        rows_per_block=block_size
        or block_rows(max(source.vocab_size, rows.vocab_size), chunks.device),
        normalizer=normalizer,
        weights=chunk_weights,
    )
    check_finite(result.loss, source, teacher, chunks, merge)
    return result


def _others(ids: Tensor, size: int) -> Tensor:
    """The ids below `size` that are not in `ids`, ascending; their number is known beforehand."""
    taken = torch.zeros(size, dtype=torch.int8, device=ids.device)
    taken[ids] = 1
    return torch.argsort(taken, stable=True)[: size - len(ids)]


def check_common(student_ids: Tensor, teacher_ids: Tensor, v_s: int, v_t: int) -> None:
    """Raise ValueError unless the two lists are one-to-one pairs inside their vocabularies."""
    if student_ids.shape != teacher_ids.shape or student_ids.dim() != 1:
        raise ValueError(
            f"student_ids_common {tuple(student_ids.shape)} and teacher_ids_common "
            f"{tuple(teacher_ids.shape)} must be two lists of one length: pair i is (s_i, t_i)"
        )
    if torch.compiler.is_compiling():
        return
    for name, ids, size in (
        ("student_ids_common", student_ids, v_s),
        ("teacher_ids_common", teacher_ids, v_t),
    ):
        if ids.dtype != torch.int64:
            raise ValueError(f"{name} is {ids.dtype}, expected torch.int64")
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= size):
            raise ValueError(
                f"{name} spans [{int(ids.min())}, {int(ids.max())}], outside the vocabulary "
                f"(V = {size}); pass the common set of this pair"
            )
        if len(torch.unique(ids)) != len(ids):
            raise ValueError(f"{name} names a token twice; the common set must be one-to-one")
