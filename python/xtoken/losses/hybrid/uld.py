"""ULD: sorted L1 over the whole vocabularies, no token corresponding to any (arXiv 2402.12030)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xtoken.losses.engine.merge import Merge
from xtoken.losses.engine.module import LossModule
from xtoken.losses.engine.student_input import Student
from xtoken.losses.hybrid.hybrid import hybrid
from xtoken.losses.output import LossOutput
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.teacher_signal import Teacher


def uld(
    student_logits: Student,
    teacher: Teacher,
    chunks: ChunkBatch,
    *,
    student_ids: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    merge: Merge = "chain",
    temperature: float = 1.0,
    normalizer: float | Tensor | None = None,
    chunk_weights: Tensor | None = None,
    block_size: int | None = None,
) -> LossOutput:
    """Mean over chunks of the L1 distance between the two distributions, each sorted.

    Args: as `gold`, which is this loss on its uncommon tokens.

    Returns: loss in [0, 2] times temperature^2 a chunk; metric `uld`.

    Raises:
        ValueError: as `gold`.

    Source: Boizard et al. 2024, arXiv 2402.12030, at the chunks of an alignment instead of at equal
        positions.
    """
    none = torch.zeros(0, dtype=torch.int64)
    result = hybrid(
        student_logits,
        teacher,
        chunks,
        student_ids_common=none,
        teacher_ids_common=none,
        student_ids=student_ids,
        teacher_ids=teacher_ids,
        student_vocab_size=student_vocab_size,
        teacher_vocab_size=teacher_vocab_size,
        common_weight=0.0,
        uld_weight=1.0,
        merge=merge,
        temperature=temperature,
        direction="forward",
        beta=0.5,
        normalizer=normalizer,
        chunk_weights=chunk_weights,
        block_size=block_size,
    )
    return LossOutput(result.loss, result.num_chunks, {"uld": result.metrics["uld"]})


class ULD(LossModule):
    """`uld` with its options held."""

    def __init__(self, **options: Any) -> None:
        super().__init__(uld, options)
