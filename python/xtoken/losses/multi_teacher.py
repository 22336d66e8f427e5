"""Several teachers at once, each with its own loss, weighted by hand or by its confidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from xtoken.losses.alm import teacher_token_log_probs
from xtoken.losses.engine.merge import chunk_rows
from xtoken.losses.engine.student_input import Student
from xtoken.losses.output import LossOutput
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.rows import block_rows, upcast
from xtoken.tensors.teacher_signal import Teacher, TeacherTopK, teacher_positions

Confidence = Literal["ce", "entropy", "max_prob"]


@dataclass(frozen=True, eq=False)
class TeacherTerm:
    """One teacher of many.

    Attributes:
        loss: a loss of this package, or a module of one.
        teacher: what it says, as the loss takes it.
        chunks: the usable chunks of the student with this teacher.
        options: further arguments of the loss, such as `projection`, `top_k`, `normalizer`.
        teacher_ids: [B, T_t] int64, needed to weight by `ce`.
        vocab_size: V_t where the lm_head is padded; for confidences.
    """

    loss: Callable[..., LossOutput]
    teacher: Teacher
    chunks: ChunkBatch
    options: dict[str, Any] = field(default_factory=dict)
    teacher_ids: Tensor | None = None
    vocab_size: int | None = None


def multi_teacher(
    student_logits: Student,
    terms: Sequence[TeacherTerm],
    *,
    weights: Sequence[float] | Confidence | None = None,
    sharpness: float = 1.0,
) -> LossOutput:
    """The weighted sum of each teacher's loss.

    Args:
        student_logits: as the losses take it.
        terms: one a teacher, any mix of losses.
        weights: one number >= 0 a teacher; None for equal ones that sum to 1; or a confidence, by
            which each *sample* weights the teachers, so that the loss does not depend on how a
            batch is cut: weights proportional to exp(sharpness * score), summing to 1 over the
            teachers with a chunk in the sample. The score is minus the teacher's cross-entropy
            (`ce`) or entropy (`entropy`), summed over its positions and divided by the *student's*
            tokens there, so that teachers of finer tokenizers are not favoured; or the log of its
            mean largest probability (`max_prob`).
        sharpness: >= 0; 0 is equal weights.

    Returns: the loss, the chunks of all teachers together, and each term's metrics under
        `teacher{i}/`, with the mean `weight` over its chunks.

    Raises:
        ValueError: no terms, wrong weights, or what a confidence needs is missing.
    """
    if not terms:
        raise ValueError("terms is empty; pass one TeacherTerm a teacher")
    factors: list[Tensor | None] = [None] * len(terms)
    static = [1.0 / len(terms)] * len(terms)
    if isinstance(weights, str):
        if weights not in get_args(Confidence):
            raise ValueError(
                f"weights = {weights!r}, expected numbers or {', '.join(get_args(Confidence))}"
            )
        scores = torch.stack([sample_scores(term, weights) for term in terms])  # [K, B]
        shares = torch.softmax(sharpness * scores, 0).nan_to_num(nan=0.0)
        static = [1.0] * len(terms)
        factors = [share[term.chunks.sample] for share, term in zip(shares, terms, strict=True)]
    elif weights is not None:
        static = [float(weight) for weight in weights]
        if len(static) != len(terms) or min(static) < 0:
            raise ValueError(f"weights = {static}, expected {len(terms)} numbers >= 0")
    losses, metrics = [], {}
    for i, (term, weight, factor) in enumerate(zip(terms, static, factors, strict=True)):
        more: dict[str, Any] = {} if factor is None else {"chunk_weights": factor}
        result = term.loss(
            student_logits=student_logits, teacher=term.teacher, chunks=term.chunks,
            **term.options, **more,
        )  # fmt: skip
        losses.append((weight * result.loss, result.num_chunks))
        metrics.update({f"teacher{i}/{name}": x for name, x in result.metrics.items()})
        mean = factor.mean() if factor is not None and len(factor) else torch.tensor(weight)
        metrics[f"teacher{i}/weight"] = mean
    total = torch.stack([loss for loss, _ in losses]).sum()
    return LossOutput(total, torch.stack([count for _, count in losses]).sum(), metrics)


@torch.no_grad()
def sample_scores(term: TeacherTerm, confidence: Confidence) -> Tensor:
    """[B] how sure a teacher is of each sample, -inf where it has no chunk there."""
    teacher, chunks = term.teacher, term.chunks
    batch, length = teacher_positions(teacher)
    where = chunk_rows(chunks, "teacher", length, None)
    sample = where.index // length
    if confidence == "ce":
        if term.teacher_ids is None:
            raise ValueError("weights='ce' needs TeacherTerm.teacher_ids")
        values = -teacher_token_log_probs(teacher, term.teacher_ids, where.index, term.vocab_size)
    else:
        values = _row_statistic(teacher, where.index, term.vocab_size, confidence)
    sums = values.new_zeros(batch).index_add_(0, sample, values)
    if confidence == "max_prob":
        counts = torch.bincount(sample, minlength=batch)
        return torch.log(sums / counts).masked_fill(counts == 0, -torch.inf)
    tokens = torch.zeros(batch, dtype=torch.int64, device=sums.device)
    tokens.index_add_(0, chunks.sample, chunks.student_end - chunks.student_start)
    return (-sums / tokens).masked_fill(tokens == 0, -torch.inf)


def _row_statistic(
    teacher: Teacher, index: Tensor, vocab_size: int | None, confidence: Confidence
) -> Tensor:
    """[N] entropy in nats, or largest probability, at flattened positions; a stored top-k's tail
    counts as one entry, which bounds the entropy from below."""
    stored = isinstance(teacher, TeacherTopK)
    flat = (teacher.log_probs if isinstance(teacher, TeacherTopK) else teacher).flatten(0, 1)
    step = block_rows(flat.shape[1], flat.device)
    parts = [torch.zeros(0, dtype=upcast(flat[:0]).dtype, device=flat.device)]
    for start in range(0, len(index), step):
        rows = upcast(flat.index_select(0, index[start : start + step]))
        if stored:
            tail = torch.log1p(-torch.exp(rows).sum(1).clamp(max=1.0))
            rows = torch.cat([rows, tail[:, None]], 1) if confidence == "entropy" else rows
        else:
            rows = torch.log_softmax(rows[:, :vocab_size], 1)
        if confidence == "entropy":
            parts.append(torch.special.entr(torch.exp(rows)).sum(1))
        else:
            parts.append(torch.exp(rows.amax(1)))
    return torch.cat(parts)
