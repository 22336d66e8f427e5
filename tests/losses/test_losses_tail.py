"""The tail bucket: finite in every direction, and there only where something is not kept."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from loss_cases import Case, loss_of, make_case, p_kl
from prefix_cases import make_prefix_case

from xtoken.errors import OptionError
from xtoken.losses import LossOutput, PairParts, TeacherTopK
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.projection import SparseProjection

DIRECTIONS = ["forward", "reverse", "jsd"]
SCOPES = ["chunk", "microbatch"]


def one_chunk() -> ChunkBatch:
    one = torch.tensor([1])
    return ChunkBatch.from_ranges(one * 0, one, one + 1, one, one + 1)


def finite_gradient(result: LossOutput, student: torch.Tensor) -> torch.Tensor:
    (grad,) = torch.autograd.grad(result.loss, student)
    assert torch.isfinite(result.loss)
    assert torch.isfinite(grad).all()
    return grad


@pytest.mark.parametrize(("direction", "scope"), [*product(DIRECTIONS, SCOPES)])
def test_a_tail_whose_mass_rounds_to_nothing_in_float32_is_that_of_float64(
    direction: str, scope: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 2, 2000, generator=generator) for _ in range(2))
    teacher = teacher * 6
    w = SparseProjection.identity(2000)
    options = {
        "top_k": 512, "top_k_scope": scope, "tail_bucket": True, "direction": direction
    }  # fmt: skip
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = student.to(dtype).requires_grad_()
        result = p_kl(leaf, teacher.to(dtype), w, one_chunk(), **options)
        grad = finite_gradient(result, leaf)
        results.append((result.loss.double(), grad.double()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_stored_tail_below_one_rounding_keeps_the_loss_finite(direction: str) -> None:
    teacher = torch.tensor([[[30.0, 20.0, -5.0, -6.0, -7.0], [0.0] * 5]])
    student = torch.zeros(1, 2, 5, requires_grad=True)
    stored = TeacherTopK.from_logits(teacher, 2)
    assert float(torch.exp(stored.log_probs[0, 0]).sum()) == 1.0
    pair = PairParts((5, 5), projection=SparseProjection.identity(5))
    for name in ("p-kl", "same-vocab-kl"):
        result = loss_of(
            name, student, stored, one_chunk(), pair, tail_bucket=True, direction=direction
        )
        finite_gradient(result, student)


def covered(case: Case) -> SparseProjection:
    """A W without empty rows, which reaches every teacher column."""
    ids = [i % case.v_t for i in range(case.v_s)]
    return SparseProjection.from_csr(
        range(case.v_s + 1), ids, [1.0] * case.v_s, (case.v_s, case.v_t)
    )


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("top_k", [11, 12, 99])
def test_a_tail_of_nothing_is_refused_on_every_path_and_absent_under_auto(
    top_k: int, stored: bool, scope: str
) -> None:
    case = make_case(1)
    teacher = case.teacher_logits
    if stored:
        teacher = TeacherTopK.from_logits(teacher, 11, vocab_size=11)
    args = (case.student_logits, teacher, covered(case), case.usable)
    options = {"top_k": top_k, "top_k_scope": scope}
    for direction in DIRECTIONS:
        with pytest.raises(OptionError, match="no student token outside the kept columns"):
            p_kl(*args, **options, tail_bucket=True, direction=direction)
        found = p_kl(*args, **options, tail_bucket="auto", direction=direction)
        wanted = p_kl(*args, **options, direction=direction)
        finite_gradient(found, case.student_logits)
        torch.testing.assert_close(found.loss, wanted.loss)


@pytest.mark.parametrize("scope", SCOPES)
def test_auto_is_the_tail_where_w_reaches_columns_that_are_not_kept(scope: str) -> None:
    case = make_case(2)
    for stored, top_k in ((None, 4), (4, None), (6, 4)):
        if scope == "microbatch" and top_k is None:
            continue
        teacher = case.teacher_logits
        if stored is not None:
            teacher = TeacherTopK.from_logits(teacher, stored, vocab_size=case.v_t)
        auto, tail = (
            p_kl(
                case.student_logits, teacher, covered(case), case.usable, top_k=top_k,
                top_k_scope=scope, tail_bucket=wanted,
            ).loss
            for wanted in ("auto", True)
        )  # fmt: skip
        assert torch.equal(auto, tail)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_chunk_that_keeps_every_column_has_no_tail_beside_one_that_has(direction: str) -> None:
    """Row 1 of the stored top-k holds a token that no student token maps to."""
    w = SparseProjection.from_csr([0, 1, 2], [0, 1], [1.0, 1.0], (2, 3))
    stored = TeacherTopK(
        torch.tensor([[[0, 1], [0, 2], [0, 1]]]),
        torch.log(torch.tensor([[[0.5, 0.4], [0.5, 0.3], [0.5, 0.5]]], dtype=torch.float64)),
    )
    sample, start = torch.zeros(2, dtype=torch.int64), torch.tensor([1, 2])
    chunks = ChunkBatch.from_ranges(sample, start, start + 1, start, start + 1)
    student = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    result = p_kl(student, stored, w, chunks, tail_bucket=True, direction=direction)
    finite_gradient(result, student)
    alone = [
        p_kl(
            student, stored, w, chunks.select(torch.tensor([c])),
            tail_bucket="auto", direction=direction,
        ).loss
        for c in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(result.loss, sum(alone) / 2)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_root_of_prefix_kl_follows_the_same_rule(direction: str) -> None:
    for seed in range(3):
        case = make_prefix_case(seed, batch=2, chunks=8)
        batch = case.batch
        args = (batch.student_logits, batch.teacher_logits, batch.usable, case.pair)
        for top_k in (3, 13, 99):
            result = loss_of(
                "prefix-kl", *args, **case.ids(), top_k=top_k, tail_bucket="auto",
                direction=direction,
            )  # fmt: skip
            finite_gradient(result, batch.student_logits)


def test_a_stored_top_k_of_a_whole_vocabulary_has_no_tail() -> None:
    case = make_case(5, v_s=12, v_t=12)
    stored = TeacherTopK.from_logits(case.teacher_logits, 12, vocab_size=12)
    args = (case.student_logits, stored, case.usable, case.shared)
    for direction in DIRECTIONS:
        tail, plain = (
            loss_of("same-vocab-kl", *args, direction=direction, tail_bucket=wanted)
            for wanted in (True, False)
        )
        finite_gradient(tail, case.student_logits)
        torch.testing.assert_close(tail.loss, plain.loss)


def test_learnable_weights_get_a_finite_gradient_beside_a_tail() -> None:
    case = make_case(6)
    plain = case.projection
    learnable = SparseProjection.from_csr(
        plain.indptr, plain.indices, plain.weights, plain.shape, learnable=True
    )
    for direction in DIRECTIONS:
        loss = p_kl(
            case.student_logits, case.teacher_logits, learnable, case.usable, top_k=4,
            tail_bucket=True, direction=direction,
        ).loss  # fmt: skip
        (grad,) = torch.autograd.grad(loss, learnable.free)
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("scope", SCOPES)
def test_a_reverse_kl_with_a_tail_in_which_the_teacher_has_nothing_is_refused(scope: str) -> None:
    # W reaches all teacher columns, and a row of it is empty: mass of the student alone.
    w = SparseProjection.from_csr([0, 1, 2, 3, 3], [0, 1, 2], [1.0, 1.0, 1.0], (4, 3))
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(1, 5, 4, generator=generator, dtype=torch.float64)
    teacher = torch.randn(1, 5, 3, generator=generator, dtype=torch.float64)
    chunks = ChunkBatch.from_mask(torch.arange(5)[None] > 0)
    for options in ({}, {"top_k": 3}):
        given = {"tail_bucket": True, "top_k_scope": scope, **options}
        for direction in ("forward", "jsd"):
            found = p_kl(student, teacher, w, chunks, direction=direction, **given).loss
            assert torch.isfinite(found)
        with pytest.raises(OptionError, match="'reverse' with tail_bucket = True is infinite"):
            p_kl(student, teacher, w, chunks, direction="reverse", **given)
    given = {"direction": "reverse", "top_k": 2, "top_k_scope": scope}
    assert torch.isfinite(p_kl(student, teacher, w, chunks, tail_bucket=True, **given).loss)
    narrow = SparseProjection.from_csr([0, 1, 2, 2, 2], [0, 1], [1.0, 1.0], (4, 3))
    given.pop("top_k")
    assert torch.isfinite(p_kl(student, teacher, narrow, chunks, tail_bucket=True, **given).loss)
