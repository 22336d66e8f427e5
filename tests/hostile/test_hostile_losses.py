"""Losses on batches of any shape, dtype, stride and width: the float64 reference, or refused."""

from __future__ import annotations

import collections
import math
import random

import torch
from drawing import count, generator
from loss_cases import Case, make_case

from xtoken import XTokenError
from xtoken.errors import PairError
from xtoken.losses import LOSSES, LossOutput
from xtoken.tensors.chunks import ChunkBatch

import reference_losses as reference

# Of a loss and of its gradient, relative to the largest entry, by the dtype of the logits: the
# losses compute in float32 at least, so what is left is the rounding of the gradient itself.
TOLERANCE = {
    torch.float64: (1e-9, 1e-8),
    torch.float32: (2e-4, 1e-3),
    torch.bfloat16: (2e-3, 2e-2),
    torch.float16: (2e-3, 4e-3),
}


def strided(rng: random.Random, logits: torch.Tensor) -> torch.Tensor:
    """The same values in memory that is laid out otherwise."""
    kind = rng.randrange(5)
    if kind == 0:
        return logits.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == 1:
        return logits.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == 2:
        return torch.cat([logits, logits], -1)[..., : logits.shape[-1]]
    if kind == 3:
        return torch.stack([logits, logits], 1)[:, 0]
    return logits


def with_empty_and_odd_chunks(rng: random.Random, chunks: ChunkBatch) -> ChunkBatch:
    kept = [c for c in range(len(chunks)) if rng.random() < 0.8]
    if rng.random() < 0.1:
        kept = []
    if rng.random() < 0.3:
        rng.shuffle(kept)
    index = torch.tensor(kept, dtype=torch.int64)
    return ChunkBatch.from_ranges(
        chunks.sample[index], chunks.student_start[index], chunks.student_end[index],
        chunks.teacher_start[index], chunks.teacher_end[index], chunks.kind[index],
    )  # fmt: skip


def draw(rng: random.Random) -> tuple[str, dict[str, object], Case, ChunkBatch]:
    v_s, v_t = rng.choice(((13, 11), (4, 30), (30, 3), (7, 7)))
    case = make_case(
        rng.randrange(10**6),
        batch=rng.choice((1, 2, 3)),
        chunks=rng.choice((1, 4, 7)),
        v_s=v_s,
        v_t=v_t,
        # Below 0 the head is narrower than the tokenizer, which only the door allows.
        padded=rng.choice((0, 0, 1, 9, -1)),
        dtype=rng.choice(tuple(TOLERANCE)),
        left=rng.random() < 0.3,
        scale=rng.choice((0.0, 0.1, 2.0, 6.0)),
    )
    name = rng.choice(("p-kl", "h-kl", "gold", "uld", "same-vocab-kl", "alm"))
    options: dict[str, object] = {
        "direction": rng.choice(("forward", "reverse", "jsd")),
        "beta": rng.choice((0.1, 0.5, 0.9)),
        "temperature": rng.choice((0.5, 1.0, 3.0)),
    }
    if name == "p-kl":
        options["top_k"] = rng.choice((None, 1, 4, 1000))
        options["top_k_scope"] = rng.choice(("chunk", "microbatch"))
        options["tail_bucket"] = rng.random() < 0.3
    if name in ("p-kl", "h-kl", "gold", "uld"):
        options["merge"] = rng.choice(("chain", "last", "mean"))
    options = {key: value for key, value in options.items() if key in LOSSES[name].options}
    return name, options, case, with_empty_and_odd_chunks(rng, case.usable)


def expected(name: str, options: dict[str, object], case: Case, chunks: ChunkBatch, student):
    teacher, sizes = case.teacher_logits, (case.v_s, case.v_t)
    if name == "p-kl":
        w = case.projection
        dense = reference.dense(w.indptr, w.indices, w.weights, w.shape)
        return reference.p_kl(student, teacher, dense, chunks, **options)
    if name in ("h-kl", "gold", "uld"):
        common = [] if name == "uld" else [(i, i) for i in (1, 4, 6, 9) if i < min(sizes)]
        return reference.hybrid(student, teacher, chunks, common, *sizes, **options)
    if name == "same-vocab-kl":
        return reference.same_vocab_kl(student, teacher, chunks, min(sizes), **options)
    ids = case.student_ids, case.teacher_ids
    return reference.alm(student, teacher, *ids, chunks, *sizes, **options)


def has_ties(logits: torch.Tensor) -> bool:
    rows = logits.detach().sort(-1).values
    return bool((rows[..., 1:] == rows[..., :-1]).any())


def test_losses_are_the_reference_or_refused() -> None:
    rng = generator("losses")
    outcomes: collections.Counter[str] = collections.Counter()
    for number in range(count(120, 6000)):
        name, options, case, chunks = draw(rng)
        what = f"draw {number}: {name} {options} {case.student_logits.dtype}"
        student = strided(rng, case.student_logits.detach()).requires_grad_()
        given: dict[str, object] = {
            "student": student, "teacher": strided(rng, case.teacher_logits), "chunks": chunks,
            "normalizer": 1.0,
        }  # fmt: skip
        if name == "alm":
            given |= {"student_ids": case.student_ids, "teacher_ids": case.teacher_ids}
        if name == "same-vocab-kl":
            given["pair"] = case.shared
        try:
            found: LossOutput = case.loss(name, **given, **options)  # type: ignore[arg-type]
        except XTokenError as error:
            outcomes[type(error).__name__] += 1
            # Nothing else is to be refused here.
            narrow = case.student_logits.shape[-1] < case.v_s
            tail = bool(options.get("tail_bucket"))
            if not (narrow or tail or name == "same-vocab-kl" or isinstance(error, PairError)):
                raise AssertionError(f"{what}: {error}") from error
            continue
        if options.get("top_k") is not None and has_ties(case.teacher_logits):
            outcomes["of equal columns any is in the top k"] += 1
            assert torch.isfinite(found.loss), what
            continue
        exact = case.student_logits.detach().double().requires_grad_()
        wanted = expected(name, options, case, chunks, exact)
        values, gradients = TOLERANCE[student.dtype]
        assert math.isclose(
            float(found.loss.detach()), float(wanted.detach()), rel_tol=values, abs_tol=values
        ), f"{what}: {float(found.loss.detach())} for {float(wanted.detach())}"
        (gradient,) = torch.autograd.grad(found.loss, student)
        assert torch.isfinite(gradient).all(), what
        # Sorting has no gradient of its own where two values are equal.
        sorts = name in ("h-kl", "gold", "uld")
        if len(chunks) and not (sorts and has_ties(case.student_logits)):
            (truth,) = torch.autograd.grad(wanted, exact)
            difference = float((gradient.double() - truth).abs().max())
            assert difference <= gradients * max(1.0, float(truth.abs().max())), what
        outcomes["equal"] += 1
    assert outcomes["equal"] > sum(outcomes.values()) // 2, outcomes
    print(dict(outcomes))
