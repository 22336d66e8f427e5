"""The fused losses: from hidden states and an lm_head, the logits never made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from loss_cases import Case, every_loss, make_case, p_kl, same_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xtoken.errors import OptionError, ShapeError
from xtoken.losses import LmHead, LossOutput, PairParts, TeacherTopK, cross_entropy

LOSSES = every_loss()
all_losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
HEADS = [(1.0, None, False), (0.25, None, True), (1.0, 3.0, False), (2.0, 5.0, True)]


def hidden_case(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Case, list[Tensor]]:
    """A case whose logits come from hidden states [B, T, 8], a weight and a bias."""
    case = make_case(seed, dtype=dtype)
    batch, length, width = case.student_logits.shape
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((batch, length, 8), (width, 8), (width,))
    ]
    return case, tensors


def logits_of(tensors: list[Tensor], scale: float, softcap: float | None) -> Tensor:
    raw = scale * torch.nn.functional.linear(*tensors)
    return raw if softcap is None else softcap * torch.tanh(raw / softcap)


@all_losses
@pytest.mark.parametrize(("scale", "softcap", "with_bias"), HEADS)
def test_fused_is_the_loss_of_the_logits_with_the_gradients_of_the_lm_head(
    loss: Callable[..., LossOutput], scale: float, softcap: float | None, with_bias: bool
) -> None:
    case, tensors = hidden_case(1)
    tensors = tensors if with_bias else tensors[:2]
    head = LmHead(*tensors, scale=scale, softcap=softcap)
    fused = loss(replace(case, student_logits=head), block_size=2).loss
    plain = loss(replace(case, student_logits=logits_of(tensors, scale, softcap))).loss
    assert torch.allclose(fused, plain)
    for found, wanted in zip(
        torch.autograd.grad(fused, tensors), torch.autograd.grad(plain, tensors), strict=True
    ):
        assert torch.allclose(found, wanted, atol=1e-12)


def test_fused_cross_entropy_is_that_of_the_logits() -> None:
    case, tensors = hidden_case(2)
    args = (case.student_ids, case.student_mask)
    fused = cross_entropy(LmHead(*tensors), *args, vocab_size=13).loss
    plain = cross_entropy(logits_of(tensors, 1.0, None), *args, vocab_size=13).loss
    assert torch.allclose(fused, plain)
    for found, wanted in zip(
        torch.autograd.grad(fused, tensors), torch.autograd.grad(plain, tensors), strict=True
    ):
        assert torch.allclose(found, wanted, atol=1e-12)


def test_a_frozen_weight_gets_no_gradient_and_hidden_states_keep_theirs() -> None:
    case, tensors = hidden_case(3)
    hidden, weight = tensors[0], tensors[1].detach()
    loss = LOSSES["p_kl"](replace(case, student_logits=LmHead(hidden, weight))).loss
    plain = LOSSES["p_kl"](replace(case, student_logits=hidden @ weight.T)).loss
    (found,), (wanted,) = (torch.autograd.grad(x, [hidden]) for x in (loss, plain))
    assert torch.allclose(found, wanted, atol=1e-12)


def test_bfloat16_states_give_gradients_of_their_dtype() -> None:
    case, tensors = hidden_case(4, torch.bfloat16)
    loss = LOSSES["p_kl"](replace(case, student_logits=LmHead(*tensors))).loss
    for grad, tensor in zip(torch.autograd.grad(loss, tensors), tensors, strict=True):
        assert grad.dtype == tensor.dtype
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("distance", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bfloat16_states_give_the_loss_of_their_exact_product(
    distance: float, with_bias: bool
) -> None:
    """The logits are never rounded to 16 bits, which at a small KL changes the gradient by 20 %."""
    case, tensors = hidden_case(7, torch.bfloat16)
    tensors = tensors if with_bias else tensors[:2]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    if not with_bias:
        exact.append(torch.zeros(len(exact[1]), dtype=torch.float64))
    own = logits_of(exact, 1.0, None).detach()
    teacher = own + distance * torch.randn(own.shape, generator=torch.Generator().manual_seed(1))
    case = replace(
        case, teacher_logits=teacher, teacher_ids=case.student_ids, shared=PairParts((13, 13)),
        usable=same_model(case=replace(case, v_t=case.v_s)).usable,
    )  # fmt: skip
    logits = logits_of(exact, 1.0, None)
    wanted = LOSSES["same_vocab_kl"](replace(case, student_logits=logits)).loss
    found = LOSSES["same_vocab_kl"](replace(case, student_logits=LmHead(*tensors))).loss
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-7)
    for mine, slow in zip(
        torch.autograd.grad(found, tensors),
        torch.autograd.grad(wanted, exact[: len(tensors)]),
        strict=True,
    ):
        error = (mine.double() - slow).norm() / slow.norm()
        assert error < 0.005, float(error)  # the rounding of the gradient itself


def test_states_and_weights_that_do_not_fit_are_refused() -> None:
    hidden, weight = torch.randn(1, 4, 8), torch.randn(20, 8)
    with pytest.raises(ShapeError, match="expected \\[B, T, H\\]"):
        LmHead(hidden[0], weight)
    with pytest.raises(ShapeError, match="hidden has 7 features, weight 8"):
        LmHead(hidden[..., :7], weight)
    with pytest.raises(ShapeError, match=r"bias has shape \(19,\), expected \(20,\)"):
        LmHead(hidden, weight, torch.zeros(19))
    with pytest.raises(OptionError, match=r"softcap = 0\.0 must be above 0"):
        LmHead(hidden, weight, softcap=0.0)
    case = make_case(5)
    short = LmHead(torch.randn(*case.student_ids.shape, 8), torch.randn(12, 8))
    with pytest.raises(ShapeError, match="the lm_head's weight has 12 columns, fewer than the"):
        LOSSES["p_kl"](replace(case, student_logits=short))


def test_a_stored_top_k_reads_the_lm_head_at_the_columns_that_it_names() -> None:
    case, tensors = hidden_case(6)
    stored = TeacherTopK.from_logits(case.teacher_logits, 2, vocab_size=case.v_t)
    values = [
        p_kl(student, stored, case.projection, case.usable, full_metrics=whole)
        for student in (LmHead(*tensors), logits_of(tensors, 1.0, None))
        for whole in (False, True)
    ]
    assert ["empty_row_mass" in value.metrics for value in values] == [False, True] * 2
    gradients = [torch.autograd.grad(value.loss, tensors, retain_graph=True) for value in values]
    for value, grads in zip(values[1:], gradients[1:], strict=True):
        assert torch.allclose(value.loss, values[0].loss)
        for found, wanted in zip(grads, gradients[0], strict=True):
            assert torch.allclose(found, wanted, atol=1e-12)


def teacher_head(
    seed: int, scale: float = 1.0, softcap: float | None = None, bias: bool = True
) -> tuple[Case, LmHead, Tensor]:
    """A case, a teacher's head for it, and the logits that it stands for."""
    case = make_case(seed, dtype=torch.float64)
    batch, length, width = case.teacher_logits.shape
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((batch, length, 8), (width, 8), (width,))
    ]
    if not bias:
        tensors[2] = torch.zeros_like(tensors[2])
    head = LmHead(*tensors[: 3 if bias else 2], scale=scale, softcap=softcap)
    return case, head, logits_of(tensors, scale, softcap)


@all_losses
@pytest.mark.parametrize(("scale", "softcap", "with_bias"), HEADS)
def test_a_teacher_by_hidden_states_and_head_is_the_teacher_of_the_logits(
    loss: Callable[..., LossOutput], scale: float, softcap: float | None, with_bias: bool
) -> None:
    case, head, logits = teacher_head(1, scale, softcap, with_bias)
    found = loss(replace(case, teacher_logits=head), block_size=2).loss
    wanted = loss(replace(case, teacher_logits=logits)).loss
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found, case.student_logits),
        torch.autograd.grad(wanted, case.student_logits),
    )


@pytest.mark.parametrize("options", [{}, {"tail_bucket": True, "top_k": 3}, {"temperature": 2.0}])
def test_options_read_a_teachers_head_as_its_logits(options: dict[str, object]) -> None:
    case, head, logits = teacher_head(2)
    found = LOSSES["p_kl"](replace(case, teacher_logits=head), **options)
    wanted = LOSSES["p_kl"](replace(case, teacher_logits=logits), **options)
    torch.testing.assert_close(found.loss, wanted.loss)
    for name, value in wanted.metrics.items():
        torch.testing.assert_close(found.metrics[name], value)


def test_the_best_of_a_teachers_head_are_those_of_its_logits() -> None:
    case, head, logits = teacher_head(3)
    found, wanted = (
        TeacherTopK.from_logits(given, 4, vocab_size=case.v_t, ids=case.teacher_ids)
        for given in (head, logits)
    )
    assert torch.equal(found.ids, wanted.ids)
    torch.testing.assert_close(found.log_probs, wanted.log_probs)
    torch.testing.assert_close(found.token_log_probs, wanted.token_log_probs)


class Rows(TorchDispatchMode):
    """Remembers the most rows of a width that any operation gave in one tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor) and each.dim() and each.shape[-1] == self.width:
                self.most = max(self.most, each.numel() // self.width)
        return out


@pytest.mark.parametrize("name", ["p_kl", "h_kl", "gold"])
def test_the_logits_of_a_teachers_head_are_never_whole(name: str) -> None:
    case, head, logits = teacher_head(4)
    assert len(case.usable) > 4
    assert case.v_t != case.v_s
    with Rows(case.v_t) as seen:
        LOSSES[name](replace(case, teacher_logits=head), block_size=2).loss.backward()
    # The head's weight, turned, has a row for each of 8 features.
    assert 0 < seen.most <= 8 < logits.shape[0] * logits.shape[1]


def test_a_teachers_head_with_too_few_columns_or_of_no_class_is_refused() -> None:
    case, head, _ = teacher_head(5)
    narrow = LmHead(head.hidden, head.weight[: case.v_t - 1])
    with pytest.raises(
        ShapeError, match=rf"teacher logits have {case.v_t - 1} columns, fewer than"
    ):
        LOSSES["p_kl"](replace(case, teacher_logits=narrow))
