"""ALM: the likelihoods of aligned chunks, each made a coin toss (arXiv 2503.20083).

A chunk's probability is the product of its tokens', on both sides, and the same bytes have one on
both. The loss compares the two tosses p^(1/temperature): it needs no correspondence of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xtoken.losses.engine.checks import check_batch, check_finite, check_token_ids
from xtoken.losses.engine.divergence import Direction, check_direction, divergence
from xtoken.losses.engine.merge import ChunkRows, chunk_rows
from xtoken.losses.engine.module import LossModule
from xtoken.losses.engine.row_blocks import Block, BlockLoss, reduce_chunks
from xtoken.losses.engine.student_input import Student, student_rows
from xtoken.losses.output import LossOutput
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.rows import block_rows, upcast
from xtoken.tensors.teacher_signal import Teacher, TeacherTopK, teacher_positions


def alm(
    student_logits: Student,
    teacher: Teacher,
    chunks: ChunkBatch,
    *,
    student_ids: Tensor,
    teacher_ids: Tensor,
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    temperature: float = 100.0,
    direction: Direction = "forward",
    beta: float = 0.5,
    normalizer: float | Tensor | None = None,
    chunk_weights: Tensor | None = None,
    block_size: int | None = None,
) -> LossOutput:
    """Mean over chunks of the divergence between two binarised chunk likelihoods.

    Args:
        student_logits: [B, T_s, V_s'] float, raw; or an `LmHead` or `VocabShard`.
        teacher: [B, T_t, V_t'] float raw logits, or a `TeacherTopK` with `token_log_probs`.
        chunks: the chunks to count, from `ChunkBatch.usable`.
        student_ids, teacher_ids: [B, T_s], [B, T_t] int64, the tokens of the chunks.
        student_vocab_size, teacher_vocab_size: V_s and V_t where an lm_head is padded.
        temperature: > 0, the root taken of the likelihoods, 100 as in the paper; the softmax
            itself stays at 1 and the loss is not rescaled.
        direction, beta: of the divergence between (p, 1 - p) and (q, 1 - q).
        normalizer, chunk_weights, block_size: as in `p_kl`.

    Returns: loss in nats per chunk, >= 0. Metrics: `kl` (the same divergence), and the mean chunk
        log-likelihoods `student_log_prob` and `teacher_log_prob`.

    Raises:
        ValueError: as `p_kl`; a token outside its vocabulary; a top-k without `token_log_probs`.

    Source: Minixhofer et al. 2025, arXiv 2503.20083, without its outcome debiasing and thresholds.
    """
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature} must be above 0")
    check_direction(direction, beta)
    source = student_rows(student_logits, student_vocab_size)
    check_batch(source, teacher, chunks, student_ids, teacher_ids)
    where = chunk_rows(chunks, "student", source.positions[1], None)
    targets = student_ids.flatten()[where.index + 1]
    check_token_ids(targets, source.vocab_size, "student")
    loss = AlmBlocks(
        student=where,
        targets=targets,
        teacher=teacher_chunk_log_probs(teacher, teacher_ids, chunks, teacher_vocab_size),
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
    check_finite(result.loss, source, teacher, chunks, None)
    return result


@torch.no_grad()
def teacher_chunk_log_probs(
    teacher: Teacher, teacher_ids: Tensor, chunks: ChunkBatch, vocab_size: int | None
) -> Tensor:
    """[C] the teacher's log-likelihood of each chunk's tokens."""
    where = chunk_rows(chunks, "teacher", teacher_positions(teacher)[1], None)
    tokens = teacher_token_log_probs(teacher, teacher_ids, where.index, vocab_size)
    assert where.ptr is not None
    owner = torch.repeat_interleave(where.ptr.diff())
    return tokens.new_zeros(where.count).index_add_(0, owner, tokens)


@torch.no_grad()
def teacher_token_log_probs(
    teacher: Teacher, teacher_ids: Tensor, index: Tensor, vocab_size: int | None
) -> Tensor:
    """[N] log-probability of the token after each of the flattened positions `index`."""
    if isinstance(teacher, TeacherTopK):
        if teacher.token_log_probs is None:
            raise ValueError(
                "the stored top-k lacks token_log_probs, the teacher's log-probability of each "
                "next token; make it with TeacherTopK.from_logits(logits, k, ids=teacher_ids)"
            )
        return upcast(teacher.token_log_probs.flatten()[index])
    flat = teacher.detach().flatten(0, 1)[:, :vocab_size]
    targets = teacher_ids.flatten()[index + 1]
    check_token_ids(targets, flat.shape[1], "teacher")
    step = block_rows(flat.shape[1], flat.device)
    parts = [torch.zeros(0, dtype=upcast(flat[:0]).dtype, device=flat.device)]
    for start in range(0, len(index), step):
        rows = upcast(flat.index_select(0, index[start : start + step]))
        parts.append(_token_log_probs(rows, targets[start : start + step]))
    return torch.cat(parts)


def _token_log_probs(rows: Tensor, targets: Tensor) -> Tensor:
    return rows.gather(1, targets[:, None]).squeeze(1) - torch.logsumexp(rows, 1)


@dataclass(eq=False, kw_only=True)
class AlmBlocks(BlockLoss):
    """The binarised divergence of a block of chunks.

    `targets` [N] are the tokens that the student's rows predict, `teacher` [C] the teacher's
    log-likelihood of each chunk.
    """

    student: ChunkRows
    targets: Tensor
    teacher: Tensor
    temperature: float
    direction: Direction
    beta: float
    metric_names = ("kl", "student_log_prob", "teacher_log_prob")

    def forward(
        self, rows: Tensor, block: Block, params: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        assert self.student.ptr is not None
        assert block.segments is not None
        first = self.student.ptr[block.start]
        tokens = _token_log_probs(rows, self.targets[first : first + len(rows)])
        student = tokens.new_zeros(len(block)).index_add(0, block.segments, tokens)
        teacher = self.teacher[block.start : block.stop].to(student.dtype)
        loss = divergence(
            _toss(teacher / self.temperature), _toss(student / self.temperature),
            self.direction, self.beta,
        )  # fmt: skip
        sums = (loss.detach().sum(), student.detach().sum(), teacher.sum())
        return loss, torch.stack(sums)


def _toss(log_prob: Tensor) -> Tensor:
    """[R] log p to [R, 2] log (p, 1 - p).

    Rounding can put a certain chunk's log p at 0 or above, and 1 - p at no mass at all, where a
    divergence is infinite; 1 - p is not known below one rounding, which is its floor.
    """
    log_prob = log_prob.clamp(max=-torch.finfo(log_prob.dtype).eps)
    return torch.stack([log_prob, torch.log(-torch.expm1(log_prob))], -1)


class ALM(LossModule):
    """`alm` with its options held; call it with `student_ids` and `teacher_ids`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(alm, options)
