"""What backward refuses: tensors overwritten since the loss, and a derivative of a gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from loss_cases import Case, every_loss, make_case, w_alone
from torch import Tensor

from xtoken.errors import BackwardError
from xtoken.losses import LmHead, LossInputs, TeacherTopK, cross_entropy
from xtoken.losses.engine.held import Held
from xtoken.losses.engine.shared_gradient import SharedLogits
from xtoken.losses.registry import LOSSES
from xtoken.tensors.projection import SparseProjection
from xtoken.tensors.segments import segment_logsumexp

every = every_loss()
all_losses = pytest.mark.parametrize("loss", every.values(), ids=every.keys())


@all_losses
def test_a_second_backward_of_an_overwritten_teacher_is_refused(loss: Callable) -> None:
    case = make_case(3)
    value = loss(case).loss
    torch.autograd.grad(value, case.student_logits, retain_graph=True)
    torch.autograd.grad(value, case.student_logits, retain_graph=True)
    case.teacher_logits.mul_(2.0)
    with pytest.raises(BackwardError, match=r"teacher was overwritten .* version 1, expected 0"):
        torch.autograd.grad(value, case.student_logits)


def float16(case: Case) -> Tensor:
    return case.student_logits.detach().half().requires_grad_()


def test_the_first_backward_of_float16_reads_the_teacher_too_and_of_float32_does_not() -> None:
    case = make_case(3)
    for leaf in (float16(case), case.student_logits.detach().float().requires_grad_()):
        case.teacher_logits = case.teacher_logits.clone()
        value = case.loss("p-kl", student=leaf).loss
        wanted = torch.autograd.grad(case.loss("p-kl", student=leaf).loss, leaf)[0]
        case.teacher_logits.zero_()
        if leaf.dtype == torch.float16:
            with pytest.raises(BackwardError, match="call backward before, or pass a clone"):
                value.backward()
        else:
            value.backward()
            assert torch.equal(leaf.grad, wanted)


@pytest.mark.parametrize("name", ["log_probs", "ids", "chunk_weights", "hidden", "weight"])
def test_whatever_backward_reads_again_is_watched(name: str) -> None:
    case = make_case(3)
    teacher = case.teacher_logits
    weights = torch.ones(len(case.usable))
    hidden = teacher.new_ones(*teacher.shape[:2], 4)
    head = LmHead(hidden, teacher.new_ones(teacher.shape[2], 4))
    stored = TeacherTopK.from_logits(teacher, 4, vocab_size=case.v_t)
    leaf = float16(case)
    value = case.loss(
        "p-kl",
        student=leaf,
        teacher=head if name in ("hidden", "weight") else stored,
        chunk_weights=weights,
    ).loss
    owner = {"chunk_weights": None, "hidden": head, "weight": head}.get(name, stored)
    written = weights if owner is None else getattr(owner, name)
    written.zero_()
    with pytest.raises(BackwardError, match=f"{name} was overwritten"):
        value.backward()


def test_a_shared_gradient_watches_the_teacher_and_the_positions() -> None:
    case = make_case(3)
    for watched in ("teacher", "positions"):
        leaf = float16(case)
        shared = SharedLogits.of(leaf)
        teacher = case.teacher_logits.clone()
        positions = (case.student_mask[:, 1:].nonzero() * torch.tensor([leaf.shape[1], 1])).sum(1)
        loss = case.loss("p-kl", student=shared, teacher=teacher).loss
        loss = loss + cross_entropy(
            shared, case.student_ids, case.student_mask, vocab_size=case.v_s, positions=positions
        ).loss  # fmt: skip
        (teacher if watched == "teacher" else positions).zero_()
        with pytest.raises(BackwardError, match=f"{watched} was overwritten"):
            loss.backward()


def test_a_teacher_of_inference_mode_serves_and_nobody_counts_its_writes() -> None:
    case = make_case(3)
    with torch.inference_mode():
        teacher = case.teacher_logits * 1.0
    leaf = float16(case)
    case.loss("p-kl", student=leaf, teacher=teacher).loss.backward()
    assert torch.isfinite(leaf.grad).all()
    assert not Held.of(teacher=teacher).tensors


@all_losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_derivative_of_a_gradient_is_refused_and_the_gradient_is_not(
    loss: Callable, dtype: torch.dtype
) -> None:
    case = make_case(4)
    leaf = case.student_logits = case.student_logits.detach().to(dtype).requires_grad_()
    (wanted,) = torch.autograd.grad(loss(case).loss, leaf)
    for factor in (1.0, torch.ones((), requires_grad=True)):
        value = loss(case).loss
        (found,) = torch.autograd.grad(value * factor, leaf, create_graph=True)
        assert torch.equal(found, wanted)
        with pytest.raises(BackwardError, match=r"create_graph=True\), and has no derivative"):
            (value + found.square().sum()).backward()
        with pytest.raises(BackwardError, match="no derivative"):
            torch.autograd.grad(found.sum(), leaf)


def test_nor_is_that_of_a_shared_gradient_or_of_a_learnable_w() -> None:
    case = make_case(4)
    leaf = case.student_logits
    shared = SharedLogits.of(leaf)
    ce = cross_entropy(shared, case.student_ids, case.student_mask, vocab_size=case.v_s).loss
    both = case.loss("p-kl", student=shared).loss + ce
    (found,) = torch.autograd.grad(both, leaf, create_graph=True)
    with pytest.raises(BackwardError):
        found.square().sum().backward()
    w = case.projection
    learnable = SparseProjection(w.indptr, w.indices, w.weights, w.shape, learnable=True)
    inputs = LossInputs(leaf, case.teacher_logits, case.usable)
    value = LOSSES["p-kl"].function(inputs, w_alone(learnable)).loss
    found = torch.autograd.grad(value, learnable.free, create_graph=True)[0]
    with pytest.raises(BackwardError):
        found.square().sum().backward()


def test_a_sum_by_segments_refuses_its_second_derivative_and_keeps_its_first() -> None:
    values = torch.randn(2, 5, dtype=torch.float64).requires_grad_()
    segment = torch.tensor([0, 0, 1, 1, 1])
    found = segment_logsumexp(values, segment, 2)[:, 0].sum()
    (gradient,) = torch.autograd.grad(found, values, create_graph=True)
    torch.testing.assert_close(gradient[:, :2], torch.softmax(values[:, :2], 1))
    with pytest.raises(BackwardError):
        gradient.square().sum().backward()
