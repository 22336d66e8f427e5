"""What holds for every loss: self-distillation, cutting, padding, masks, lm_heads, bad input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from loss_cases import Case, every_loss, make_case, real_case, relayout, same_model
from torch import Tensor

from xtoken.errors import NonFiniteError, ShapeError
from xtoken.losses import LossOutput, cross_entropy
from xtoken.losses.engine.row_blocks import BlockLoss
from xtoken.losses.p_kl import block as p_kl_block
from xtoken.losses.p_kl.loss import PKLBlocks
from xtoken.losses.same_vocab_kl import SameVocabBlocks
from xtoken.tensors.chunks import ChunkBatch

LOSSES = every_loss()
# They read the rows of a chunk one by one.
NOT_MERGING = ("alm", "bpm", "escd", "partition_kl", "strict_top_k", "strict_top_k all")
MERGING = [name for name in LOSSES if name not in NOT_MERGING]
# One set of columns a micro-batch depends, by its name, on what is in the micro-batch.
CUTTABLE = {name: loss for name, loss in LOSSES.items() if "microbatch" not in name}
all_losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())

# What ESCD compares at a chunk depends on whether the one before it counts.
ALONE = {name: loss for name, loss in CUTTABLE.items() if name != "escd"}
cuttable_losses = pytest.mark.parametrize("loss", CUTTABLE.values(), ids=CUTTABLE.keys())

# Every law on random chunks of all kinds, and on the alignments and the W of real tokenizers.
real_and_random = pytest.mark.parametrize("make", [make_case, real_case], ids=["random", "real"])

Loss = Callable[..., LossOutput]
Make = Callable[..., Case]


def grad_of(loss: Loss, case: Case, **options: object) -> tuple[Tensor, Tensor]:
    result = loss(case, **options)
    (grad,) = torch.autograd.grad(result.loss, case.student_logits)
    return result.loss.detach(), grad


@pytest.mark.parametrize("merge", ["chain", "last", "mean"])
@pytest.mark.parametrize("name", MERGING)
def test_a_student_equal_to_its_teacher_has_no_loss(name: str, merge: str) -> None:
    for seed in range(3):
        case = same_model(seed)
        for temperature in (1.0, 3.0):
            loss = LOSSES[name](case, merge=merge, temperature=temperature).loss
            assert abs(loss.item()) < 1e-12


@pytest.mark.parametrize("name", NOT_MERGING)
def test_a_student_equal_to_its_teacher_has_no_loss_row_by_row(name: str) -> None:
    for seed in range(3):
        assert abs(LOSSES[name](same_model(seed)).loss.item()) < 1e-12


@real_and_random
@cuttable_losses
def test_cutting_the_batch_changes_neither_loss_nor_gradient(make: Make, loss: Loss) -> None:
    case = make(1, batch=3)
    whole, grad = grad_of(loss, case, normalizer=7.0)
    total = torch.zeros_like(whole)
    for row in range(3):
        value, part = grad_of(loss, relayout(case, [row]), normalizer=7.0)
        total += value
        assert torch.allclose(part[0], grad[row, : part.shape[1]], atol=1e-12)
    assert torch.allclose(total, whole)


@real_and_random
@all_losses
@pytest.mark.parametrize("block_size", [1, 2, 1000])
def test_block_size_changes_nothing(make: Make, loss: Loss, block_size: int) -> None:
    case = make(2)
    whole, grad = grad_of(loss, case)
    value, other = grad_of(loss, case, block_size=block_size)
    assert torch.allclose(value, whole)
    assert torch.allclose(other, grad, atol=1e-12)


@real_and_random
@all_losses
def test_padding_side_padding_length_and_order_change_nothing(make: Make, loss: Loss) -> None:
    case = make(3, batch=3)
    whole, grad = grad_of(loss, case)
    order = [2, 0, 1]
    for left in (False, True):
        other = relayout(case, order, left=left, extra=4)
        value, moved = grad_of(loss, other)
        assert torch.allclose(value, whole)
        for row, sample in enumerate(order):
            here, there = other.student_mask[row], case.student_mask[sample]
            assert torch.allclose(moved[row][here], grad[sample][there], atol=1e-12)
            assert not moved[row][~here].any()


@real_and_random
@all_losses
def test_only_predictors_of_usable_chunks_get_a_gradient(make: Make, loss: Loss) -> None:
    case = make(4, chunks=20)
    prompt = case.student_mask.clone()
    prompt[:, :12] = False
    chunks = case.chunks.usable(prompt, case.teacher_mask)
    assert 0 < len(chunks) < len(case.usable)
    _, grad = grad_of(loss, replace(case, usable=chunks))
    allowed = torch.zeros_like(case.student_mask)
    for sample, start, end in zip(
        chunks.sample, chunks.student_start, chunks.student_end, strict=True
    ):
        allowed[sample, start - 1 : end - 1] = True
    assert not grad[~allowed].any()
    assert grad[allowed].any()


@real_and_random
@all_losses
def test_columns_beyond_the_tokenizers_have_no_mass_and_no_gradient(make: Make, loss: Loss) -> None:
    case = make(5, padded=0)
    whole, grad = grad_of(loss, case)
    wide = [
        torch.cat([x.detach(), torch.full((*x.shape[:2], 5), fill)], -1)
        for x, fill in ((case.student_logits, 30.0), (case.teacher_logits, float("nan")))
    ]
    other = replace(case, student_logits=wide[0].requires_grad_(), teacher_logits=wide[1])
    value, padded = grad_of(loss, other)
    assert torch.equal(value, whole)
    assert torch.equal(padded[..., : case.v_s], grad)
    assert not padded[..., case.v_s :].any()


@real_and_random
@all_losses
def test_no_usable_chunk_gives_zero_with_a_graph(make: Make, loss: Loss) -> None:
    case = replace(make(6), usable=ChunkBatch.empty())
    result = loss(case)
    (grad,) = torch.autograd.grad(result.loss, case.student_logits)
    assert result.loss.item() == 0.0
    assert int(result.num_chunks) == 0
    assert not grad.any()


@real_and_random
@all_losses
def test_the_teacher_never_holds_a_graph(make: Make, loss: Loss) -> None:
    case = make(7)
    case.teacher_logits.requires_grad_()
    loss(case).loss.backward()
    assert case.teacher_logits.grad is None


@all_losses
def test_the_dtype_of_a_loss_without_chunks_is_that_of_one_with_them(loss: Loss) -> None:
    case = make_case(6)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        sides = (x.detach().to(dtype) for x in (case.student_logits, case.teacher_logits))
        own = replace(case, **dict(zip(("student_logits", "teacher_logits"), sides, strict=True)))
        empty = loss(replace(own, usable=ChunkBatch.empty()))
        full = loss(own)
        assert empty.loss.dtype == full.loss.dtype
        for name, value in full.metrics.items():
            assert empty.metrics[name].dtype == value.dtype


def test_the_dtype_of_a_cross_entropy_without_tokens_is_that_of_one_with_them() -> None:
    ids = torch.tensor([[0, 1, 2]])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits = torch.zeros(1, 3, 4, dtype=dtype)
        found = [cross_entropy(logits, ids, mask).loss.dtype for mask in (ids < 0, ids >= 0)]
        assert found[0] == found[1]


@real_and_random
@all_losses
def test_an_upstream_factor_scales_the_gradient_and_backward_can_be_repeated(
    make: Make, loss: Loss
) -> None:
    case = make(8)
    value = loss(case).loss
    first, second = (
        torch.autograd.grad(value * factor, case.student_logits, retain_graph=True)[0]
        for factor in (1.0, -2.5)
    )
    assert torch.allclose(first * -2.5, second, atol=1e-13)


@real_and_random
@pytest.mark.parametrize("loss", ALONE.values(), ids=ALONE.keys())
def test_chunk_weights_weigh_chunks_and_nothing_else(make: Make, loss: Loss) -> None:
    case = make(9)
    count = len(case.usable)
    alone = [
        loss(replace(case, usable=case.usable.select(torch.tensor([c]))), normalizer=1.0).loss
        for c in range(count)
    ]
    weights = torch.linspace(0.0, 2.0, count)
    found = loss(case, chunk_weights=weights, normalizer=1.0).loss
    wanted = sum(w.double() * x for w, x in zip(weights, alone, strict=True))
    assert torch.allclose(found, wanted)
    with pytest.raises(ShapeError, match="chunk_weights has shape"):
        loss(case, chunk_weights=weights[1:])


@real_and_random
@all_losses
def test_without_a_gradient_the_value_is_the_same(make: Make, loss: Loss) -> None:
    case = make(10)
    with torch.no_grad():
        bare = loss(case).loss
    assert not bare.requires_grad
    assert torch.equal(bare, loss(case).loss.detach())


@real_and_random
@all_losses
def test_nan_and_infinite_logits_are_refused_by_place(make: Make, loss: Loss) -> None:
    for side, bad in (("student", float("nan")), ("student", torch.inf), ("teacher", torch.nan)):
        case = make(11)
        row = int(getattr(case.usable, f"{side}_start")[0]) - 1
        sample = int(case.usable.sample[0])
        getattr(case, f"{side}_logits").data[sample, row, : case.v_t] = bad
        name = "student_logits" if side == "student" else "teacher"
        with pytest.raises(NonFiniteError, match=rf"{name}\[{sample}, {row}, \d+\] = "):
            loss(case)


class _NoSlope(torch.autograd.Function):
    """A value, or what it is with `more`, whose gradient is NaN."""

    @staticmethod
    def forward(ctx, value: Tensor, more: float) -> Tensor:
        return value + more

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * torch.nan, None


@pytest.mark.parametrize(("more", "told"), [(0.0, "but"), (torch.inf, "is inf and")])
@all_losses
def test_a_loss_whose_gradient_is_nan_is_refused(
    loss: Loss, more: float, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(11, chunks=20)
    plain = BlockLoss.total

    def planted(self, *args) -> tuple[Tensor, Tensor]:
        total, metrics = plain(self, *args)
        return _NoSlope.apply(total, more), metrics

    monkeypatch.setattr(BlockLoss, "total", planted)
    monkeypatch.setattr(p_kl_block, "native_pass", lambda *_: None)
    monkeypatch.setattr(PKLBlocks, "_closed_form", lambda *_: None)
    monkeypatch.setattr(SameVocabBlocks, "value_and_grad", BlockLoss.value_and_grad)
    with pytest.raises(NonFiniteError, match=f"{told} its gradient is not finite"):
        loss(case)


@all_losses
def test_the_alignment_of_another_batch_is_refused(loss: Loss) -> None:
    case = make_case(12)
    longer = make_case(13, chunks=30)
    with pytest.raises(ShapeError, match="pass the alignments of this batch"):
        loss(replace(case, usable=longer.usable))


def sides(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both sides' log-probabilities of the chunks, in plain torch and `dtype`."""
    rows = case.usable.sample, case.usable.student_start - 1
    others = case.usable.sample, case.usable.teacher_start - 1
    return (
        torch.log_softmax(case.student_logits[rows][:, : case.v_s].to(dtype), -1),
        torch.log_softmax(case.teacher_logits[others][:, : case.v_t].to(dtype), -1),
    )


def plain_p_kl(case: Case, dtype: torch.dtype) -> Tensor:
    student, teacher = sides(case, dtype)
    w = torch.zeros(case.v_s, case.v_t, dtype=dtype)
    w[case.projection.row_of, case.projection.indices] = case.projection.weights.to(dtype)
    keep = case.projection.supported
    p = torch.exp(student) @ w[:, keep]
    q = torch.softmax(teacher[:, keep], -1)
    p = p / p.sum(-1, keepdim=True)
    return (q * (torch.log(q) - torch.log(p))).sum(-1).mean()


def plain_gold(case: Case, dtype: torch.dtype) -> Tensor:
    student, teacher = sides(case, dtype)
    common = torch.tensor([1, 4, 6, 9])
    kl = (torch.exp(teacher) * (teacher - student[:, : case.v_t]))[:, common].sum(-1)
    rest = []
    for side in (student, teacher):
        keep = torch.ones(side.shape[1], dtype=torch.bool)
        keep[common] = False
        rest.append(torch.sort(torch.exp(side[:, keep]), descending=True).values)
    short = torch.nn.functional.pad(rest[1], (0, rest[0].shape[1] - rest[1].shape[1]))
    return (kl + (rest[0] - short).abs().sum(-1)).mean()


def plain_same_vocab_kl(case: Case, dtype: torch.dtype) -> Tensor:
    student, teacher = (torch.log_softmax(x[:, : case.v_t], -1) for x in sides(case, dtype))
    return (torch.exp(teacher) * (teacher - student)).sum(-1).mean()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "plain"),
    [("p_kl", plain_p_kl), ("gold", plain_gold), ("same_vocab_kl", plain_same_vocab_kl)],
)
def test_bfloat16_stays_within_twice_the_error_of_plain_torch(
    name: str, plain: Callable[[Case, torch.dtype], Tensor], seed: int
) -> None:
    exact = make_case(seed, v_s=40, v_t=30, chunks=20)
    half = replace(
        exact,
        student_logits=exact.student_logits.detach().bfloat16().requires_grad_(),
        teacher_logits=exact.teacher_logits.bfloat16(),
    )
    rounded = replace(
        exact,
        student_logits=half.student_logits.detach().double().requires_grad_(),
        teacher_logits=half.teacher_logits.double(),
    )
    wanted, grad = grad_of(LOSSES[name], rounded)
    assert torch.allclose(wanted, plain(rounded, torch.float64).detach())  # one loss, two ways
    found, ours = grad_of(LOSSES[name], half)
    theirs = plain(half, torch.bfloat16)
    (theirs_grad,) = torch.autograd.grad(theirs, half.student_logits)
    assert abs(found - wanted) <= 2 * abs(theirs.detach().double() - wanted) + 1e-6
    assert (ours - grad).abs().max() <= 2 * (theirs_grad - grad).abs().max()
    assert ours.dtype == torch.bfloat16


@real_and_random
@all_losses
def test_bfloat16_logits_give_the_float32_loss_of_the_same_numbers(
    make: Make, loss: Loss, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The core takes float32 alone, rounds otherwise, and keeps the first of equal logits.
    monkeypatch.setattr(p_kl_block, "native_pass", lambda *_: None)
    case = make(14, dtype=torch.bfloat16)
    same = replace(
        case,
        student_logits=case.student_logits.detach().float().requires_grad_(),
        teacher_logits=case.teacher_logits.float(),
    )
    value, grad = grad_of(loss, case)
    wanted, exact = grad_of(loss, same)
    assert value.dtype == torch.float32
    assert torch.equal(value, wanted)
    assert torch.equal(grad, exact.bfloat16())


@real_and_random
@all_losses
def test_autocast_does_not_lower_the_maths(make: Make, loss: Loss) -> None:
    case = make(15, dtype=torch.float32)
    wanted, exact = grad_of(loss, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, grad = grad_of(loss, case)
    assert torch.equal(value, wanted)
    assert torch.equal(grad, exact)


@all_losses
def test_a_float16_gradient_does_not_underflow_before_a_gradient_scaler(loss: Loss) -> None:
    case = make_case(16, dtype=torch.float16, chunks=40)
    same = replace(
        case,
        student_logits=case.student_logits.detach().float().requires_grad_(),
        teacher_logits=case.teacher_logits.float(),
    )
    # Unscaled, these gradients are below the smallest float16.
    normalizer, scale = 1e9, 2.0**28
    found, wanted = (
        torch.autograd.grad(loss(x, normalizer=normalizer).loss * scale, x.student_logits)[0]
        for x in (case, same)
    )
    assert found.any()
    assert torch.allclose(found.float(), wanted, rtol=1e-3, atol=1e-6)
