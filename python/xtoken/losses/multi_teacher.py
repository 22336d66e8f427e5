"""Several teachers at once, each with its own loss, weighted by hand or by its confidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from xtoken._checks import check_number, expect
from xtoken.errors import ArgumentTypeError, OptionError, ShapeError
from xtoken.losses.alm import teacher_token_log_probs
from xtoken.losses.engine.merge import chunk_rows
from xtoken.losses.inputs import DEFAULT_OPTIONS, LossInputs, LossOptions
from xtoken.losses.output import LossOutput
from xtoken.losses.registry import LossName, find_loss
from xtoken.tensors.full_logits import FullLogits
from xtoken.tensors.pair_parts import PairParts
from xtoken.tensors.rows import block_rows
from xtoken.tensors.segments import counts_of
from xtoken.tensors.teacher_signal import Teacher, TeacherTopK, teacher_positions

Confidence = Literal["ce", "entropy", "max_prob"]


@dataclass(frozen=True, eq=False)
class TeacherTerm:
    """One teacher of many.

    Attributes:
        loss: its name, a key of `xtoken.losses.registry.LOSSES`.
        inputs: the student, which is the same in all terms, this teacher, and the usable chunks of
            the two; with `teacher_ids` to weight by `ce`.
        pair: the parts of the student with this teacher.
        options: of the loss.
    """

    loss: LossName
    inputs: LossInputs
    pair: PairParts
    options: LossOptions = DEFAULT_OPTIONS


def multi_teacher(
    terms: Sequence[TeacherTerm],
    *,
    weights: Sequence[float] | Confidence | None = None,
    sharpness: float = 1.0,
) -> LossOutput:
    """The weighted sum of each teacher's loss.

    Args:
        terms: one per teacher, any mix of losses.
        weights: one number >= 0 per teacher; None for equal ones that sum to 1; or a confidence, by
            which each *sample* weights the teachers, so that the loss does not depend on how a
            batch is cut: weights proportional to exp(sharpness * score), summing to 1 over the
            teachers with a chunk in the sample. The score is minus the teacher's cross-entropy
            (`ce`) or entropy (`entropy`), summed over its positions and divided by the *student's*
            tokens there, so that teachers of finer tokenizers are not favoured; or the log of its
            mean largest probability (`max_prob`). A teacher that gives a token of the text no
            probability has no weight by `ce` beside one that does; where all do so they weigh
            alike.
        sharpness: at least 0; 0 is equal weights.

    Returns: the loss, the chunks of all teachers together, and each term's metrics under
        `teacher{i}/`, with the mean `weight` over its chunks.

    Raises:
        OptionError: no terms, wrong weights, or what a confidence needs is missing.
        ShapeError: terms of several students.
    """
    if not terms:
        raise OptionError("terms is empty; pass one TeacherTerm per teacher")
    for i, term in enumerate(terms):
        expect(term, TeacherTerm, f"terms[{i}]", "pass TeacherTerm(loss, inputs, pair)")
        if term.inputs.student is not terms[0].inputs.student:
            raise ShapeError(
                f"terms[{i}] has another student than terms[0]; pass the same logits in all terms"
            )
    check_number("sharpness", sharpness, 0, rule="must be a finite number of at least 0")
    factors: list[Tensor | None] = [None] * len(terms)
    static = [1.0 / len(terms)] * len(terms)
    if isinstance(weights, str):
        check_confidence(weights)
        shares = sample_shares(terms, weights, sharpness)
        static = [1.0] * len(terms)
        factors = [
            share[term.inputs.chunks.sample] for share, term in zip(shares, terms, strict=True)
        ]
    elif weights is not None:
        static = _static_weights(weights, len(terms))
    losses, metrics = [], {}
    for i, (term, weight, factor) in enumerate(zip(terms, static, factors, strict=True)):
        inputs = term.inputs
        if factor is not None:
            own = inputs.chunk_weights
            inputs = replace(inputs, chunk_weights=factor if own is None else factor * own)
        result = find_loss(term.loss).function(inputs, term.pair, term.options)
        losses.append((weight * result.loss, result.num_chunks))
        metrics.update({f"teacher{i}/{name}": x for name, x in result.metrics.items()})
        fixed = torch.tensor(weight, device="cpu")
        mean = factor.mean() if factor is not None and len(factor) else fixed
        metrics[f"teacher{i}/weight"] = mean
    total = torch.stack([loss for loss, _ in losses]).sum()
    return LossOutput(total, torch.stack([count for _, count in losses]).sum(), metrics)


def check_confidence(weights: str) -> None:
    """Refuse a name that is no confidence."""
    if weights not in get_args(Confidence):
        raise OptionError(
            f"weights = {weights!r}, expected numbers or {', '.join(get_args(Confidence))}"
        )


def weight_numbers(weights: Sequence[float], count: int) -> list[float]:
    """The weights as floats; refuse what is no list of numbers."""
    try:
        return [float(weight) for weight in weights]
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(
            f"weights = {weights!r}, expected {count} numbers >= 0, one per teacher"
        ) from error


def _static_weights(weights: Sequence[float], count: int) -> list[float]:
    static = weight_numbers(weights, count)
    if len(static) != count or not all(0 <= weight < float("inf") for weight in static):
        raise OptionError(f"weights = {static}, expected {count} finite numbers >= 0")
    return static


@torch.no_grad()
def sample_shares(terms: Sequence[TeacherTerm], confidence: Confidence, sharpness: float) -> Tensor:
    """[K, B] the weights of the teachers in each sample: a sum of 1 over those with a chunk there,
    0 for the others."""
    scores = torch.stack([sample_scores(term, confidence) for term in terms])
    # A score of -inf may be a teacher's own: whether it has a chunk is asked apart.
    has_chunk = torch.stack(
        [
            counts_of(term.inputs.chunks.sample, scores.shape[1]).to(scores.device) > 0
            for term in terms
        ]
    )
    scores = torch.where(torch.isneginf(scores).all(0), torch.zeros_like(scores), scores)
    sharp = torch.zeros_like(scores) if sharpness == 0 else sharpness * scores
    # NaN stays with its teacher, whose loss names the logit.
    broken = torch.isnan(scores)
    shares = torch.softmax(sharp.masked_fill(broken | ~has_chunk, -torch.inf), 0)
    return shares.masked_fill(~has_chunk, 0.0).masked_fill(broken, torch.nan)


@torch.no_grad()
def sample_scores(term: TeacherTerm, confidence: Confidence) -> Tensor:
    """[B] how sure a teacher is of each sample, -inf where it has no chunk there."""
    teacher, chunks, size = term.inputs.teacher, term.inputs.chunks, term.pair.sizes[1]
    batch, length = teacher_positions(teacher)
    where = chunk_rows(chunks, "teacher", length, None)
    sample = where.index // length
    if confidence == "ce":
        ids = term.inputs.teacher_ids
        if ids is None:
            raise OptionError("weights='ce' needs teacher_ids in the inputs of each TeacherTerm")
        values = -teacher_token_log_probs(teacher, ids, where.index, size)
    else:
        values = _row_statistic(teacher, where.index, size, confidence)
    sums = values.new_zeros(batch).index_add_(0, sample, values)
    if confidence == "max_prob":
        counts = counts_of(sample, batch)
        return torch.log(sums / counts).masked_fill(counts == 0, -torch.inf)
    tokens = torch.zeros(batch, dtype=torch.int64, device=sums.device)
    tokens.index_add_(0, chunks.sample, chunks.student_end - chunks.student_start)
    return (-sums / tokens).masked_fill(tokens == 0, -torch.inf)


def _row_statistic(
    teacher: Teacher, index: Tensor, vocab_size: int, confidence: Confidence
) -> Tensor:
    """[N] entropy in nats, or largest probability, at flattened positions; a stored top-k's tail
    counts as one entry, which bounds the entropy from below."""
    stored = isinstance(teacher, TeacherTopK)
    if isinstance(teacher, TeacherTopK):
        teacher.require_temperature(1.0, f"the confidence {confidence!r} is at")
        full = FullLogits.of(teacher.log_probs, None)
    else:
        full = FullLogits.of(teacher, vocab_size)
    step = block_rows(full.width, full.device)
    parts = [torch.zeros(0, dtype=full.dtype, device=full.device)]
    for start in range(0, len(index), step):
        rows = full.rows(index[start : start + step])
        if stored:
            tail = torch.log1p(-torch.exp(rows).sum(1).clamp(max=1.0))
            rows = torch.cat([rows, tail[:, None]], 1) if confidence == "entropy" else rows
        else:
            rows = torch.log_softmax(rows, 1)
        if confidence == "entropy":
            parts.append(torch.special.entr(torch.exp(rows)).sum(1))
        else:
            parts.append(torch.exp(rows.amax(1)))
    return torch.cat(parts)
