"""GOLD: partial KL on the strict common set, sorted L1 on the rest (the baseline of X-Token)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xtoken.losses.engine.divergence import Direction
from xtoken.losses.engine.merge import Merge
from xtoken.losses.engine.module import CommonSetModule
from xtoken.losses.engine.student_input import Student
from xtoken.losses.hybrid.hybrid import hybrid
from xtoken.losses.output import LossOutput
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.teacher_signal import Teacher


def gold(
    student_logits: Student,
    teacher: Teacher,
    chunks: ChunkBatch,
    *,
    student_ids_common: Tensor,
    teacher_ids_common: Tensor,
    student_ids: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    common_weight: float = 1.0,
    uld_weight: float = 1.0,
    merge: Merge = "chain",
    temperature: float = 1.0,
    direction: Direction = "forward",
    beta: float = 0.5,
    normalizer: float | Tensor | None = None,
    chunk_weights: Tensor | None = None,
    block_size: int | None = None,
) -> LossOutput:
    """Mean over chunks of `common_weight` * partial KL + `uld_weight` * sorted L1.

    Args:
        student_logits: [B, T_s, V_s'] float, raw; or an `LmHead` or `VocabShard`.
        teacher: [B, T_t, V_t'] float raw logits, or a `TeacherTopK`, whose unstored tokens are
            taken to have no probability.
        chunks: the chunks to count, from `ChunkBatch.usable`.
        student_ids_common, teacher_ids_common: [n] int64, pair i is one token on both sides; for
            GOLD the tokens of equal bytes.
        student_ids, teacher_ids: [B, T_s], [B, T_t] int64; only checked against the batch here.
        student_vocab_size, teacher_vocab_size: V_s and V_t where an lm_head is padded.
        merge, temperature, direction, beta, normalizer, chunk_weights, block_size: as in `p_kl`.

    Returns: loss in nats per chunk. The KL runs over part of two full softmaxes, so it can be below
        0; it is 0 for a student equal to its teacher. Metrics: `kl`, `uld`, `teacher_mass` and
        `student_mass` on the common set, `top1_agreement` within it.

    Raises:
        ValueError: as `p_kl`; a common set that is not one-to-one.

    Source: baseline as defined in X-Token, arXiv 2605.21699; the partial KL's gradient pushes every
        uncommon token down (its Proposition 1).
    """
    return hybrid(
        student_logits,
        teacher,
        chunks,
        student_ids_common=student_ids_common,
        teacher_ids_common=teacher_ids_common,
        student_ids=student_ids,
        teacher_ids=teacher_ids,
        student_vocab_size=student_vocab_size,
        teacher_vocab_size=teacher_vocab_size,
        common_weight=common_weight,
        uld_weight=uld_weight,
        merge=merge,
        temperature=temperature,
        direction=direction,
        beta=beta,
        normalizer=normalizer,
        chunk_weights=chunk_weights,
        block_size=block_size,
    )


class Gold(CommonSetModule):
    """`gold` with its common set and options held."""

    def __init__(
        self, student_ids_common: Tensor, teacher_ids_common: Tensor, **options: Any
    ) -> None:
        super().__init__(gold, student_ids_common, teacher_ids_common, options)
