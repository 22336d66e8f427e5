"""KL to a teacher that shares the student's tokenizer: no alignment, no W."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xtoken.losses.engine.checks import check_batch, check_finite, check_temperature
from xtoken.losses.engine.divergence import Direction, check_direction, divergence
from xtoken.losses.engine.merge import ChunkRows, Merge, chunk_rows, merge_rows
from xtoken.losses.engine.module import LossModule
from xtoken.losses.engine.row_blocks import Block, BlockLoss, reduce_chunks
from xtoken.losses.engine.student_input import Student, student_rows
from xtoken.losses.engine.teacher_rows import TeacherRows
from xtoken.losses.output import LossOutput
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.rows import block_rows
from xtoken.tensors.teacher_signal import Teacher, TeacherTopK


def same_vocab_kl(
    student_logits: Student,
    teacher: Teacher,
    chunks: ChunkBatch,
    *,
    vocab_size: int | None = None,
    tail_bucket: bool = False,
    student_ids: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    merge: Merge = "chain",
    temperature: float = 1.0,
    direction: Direction = "forward",
    beta: float = 0.5,
    normalizer: float | Tensor | None = None,
    chunk_weights: Tensor | None = None,
    block_size: int | None = None,
) -> LossOutput:
    """Mean divergence over tokens; forward KL by default.

    Args:
        student_logits: [B, T_s, V'] float, raw; or an `LmHead` or `VocabShard`.
        teacher: [B, T_t, V''] float raw logits, or a `TeacherTopK`: both sides are then
            renormalized over each row's stored entries, or given a tail bucket.
        chunks: `ChunkBatch.from_mask(mask)`, or the chunks of an alignment.
        vocab_size: V of the shared tokenizer, where an lm_head is padded or the teacher a top-k.
        tail_bucket: with a `TeacherTopK`, one more entry for all that is not stored.
        student_ids, teacher_ids: [B, T] int64; only checked against the batch here.
        merge, temperature, direction, beta, normalizer, chunk_weights, block_size: as in `p_kl`.

    Returns: loss in nats per chunk, >= 0 up to rounding. Metrics: `kl`, `teacher_mass` (stored),
        `top1_agreement`.

    Raises:
        ValueError: as `p_kl`; sides of different width without `vocab_size`; `tail_bucket` with
            full logits, which leave no tail.
    """
    check_temperature(temperature)
    check_direction(direction, beta)
    stored = isinstance(teacher, TeacherTopK)
    if tail_bucket and not stored:
        raise ValueError("tail_bucket=True, but full logits leave no tail; pass a TeacherTopK")
    source = student_rows(student_logits, vocab_size)
    check_batch(source, teacher, chunks, student_ids, teacher_ids)
    rows = TeacherRows.of(
        teacher, chunks, vocab_size, temperature, merge, renormalized=not tail_bucket
    )
    if rows.vocab_size != source.vocab_size:
        raise ValueError(
            f"the student has {source.vocab_size} columns, the teacher {rows.vocab_size}; "
            "pass vocab_size, the size of the tokenizer that they share"
        )
    loss = SameVocabBlocks(
        student=chunk_rows(chunks, "student", source.positions[1], merge),
        teacher=rows,
        tail_bucket=tail_bucket,
        temperature=temperature,
        direction=direction,
        beta=beta,
    )
    result = reduce_chunks(
        loss,
        source,
        rows_per_block=block_size or block_rows(source.vocab_size, chunks.device),
        normalizer=normalizer,
        weights=chunk_weights,
    )
    check_finite(result.loss, source, teacher, chunks, merge)
    return result


@dataclass(eq=False, kw_only=True)
class SameVocabBlocks(BlockLoss):
    """The divergence of a block of chunks over one vocabulary."""

    student: ChunkRows
    teacher: TeacherRows
    tail_bucket: bool
    temperature: float
    direction: Direction
    beta: float
    metric_names = ("kl", "teacher_mass", "top1_agreement")

    def forward(
        self, rows: Tensor, block: Block, params: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        logits = merge_rows(rows, block.segments, len(block))
        if self.temperature != 1.0:
            logits = logits / self.temperature
        log_student = torch.log_softmax(logits, -1)
        if isinstance(self.teacher.signal, TeacherTopK):
            columns, log_teacher = self.teacher.top_k(block.start, block.stop)
            mass = torch.logsumexp(log_teacher * self.teacher.stored_power, -1).exp()
            # One column past the last, for stored ids beyond V.
            every = torch.nn.functional.pad(log_student, (0, 1), value=-torch.inf)
            log_student = every.gather(1, columns)
            if self.tail_bucket:
                rest = torch.logsumexp(every.scatter(1, columns, -torch.inf), -1)
                tail = torch.log1p(-mass.clamp(max=1.0))
                log_student = torch.cat([log_student, rest[:, None]], 1)
                log_teacher = torch.cat([log_teacher, tail[:, None]], 1)
            log_teacher = torch.log_softmax(log_teacher, -1)
            log_student = torch.log_softmax(log_student, -1)
        else:
            log_teacher = self.teacher.log_probs(block.start, block.stop)
            mass = log_teacher.new_ones(len(block))
        loss = divergence(log_teacher, log_student, self.direction, self.beta)
        best = log_teacher.argmax(-1) == log_student.detach().argmax(-1)
        sums = torch.stack([loss.detach().sum(), mass.sum(), best.sum().to(loss.dtype)])
        return loss * self.temperature**2, sums


class SameVocabKL(LossModule):
    """`same_vocab_kl` with its options held."""

    def __init__(self, **options: Any) -> None:
        super().__init__(same_vocab_kl, options)
