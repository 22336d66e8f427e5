"""The student's cross-entropy, and the balance that joins it with a distillation loss."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from gradients import gradcheck
from loss_cases import make_case

from xtoken.errors import OptionError, ShapeError, TokenIdError
from xtoken.losses import balance, combine, cross_entropy, global_normalizer
from xtoken.losses.engine.native_cross_entropy import native_pass
from xtoken.losses.output import MAX_BALANCE

import reference_losses as reference

# The module's name is that of the function in the package.
ce_module = sys.modules["xtoken.losses.cross_entropy"]


@pytest.mark.parametrize("by", ["core", "torch"])
def test_value_and_gradient_are_those_of_the_loop(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "torch":
        monkeypatch.setattr(ce_module, "native_pass", lambda *_: None)
    case = make_case(1)
    args = (case.student_ids, case.student_mask)
    found = cross_entropy(case.student_logits, *args, vocab_size=13, block_size=3)
    counted = int(case.student_mask[:, 1:].sum())
    slow = reference.cross_entropy(case.student_logits, *args, 13) / counted
    assert torch.allclose(found.loss, slow)
    gradients = [torch.autograd.grad(x, case.student_logits)[0] for x in (found.loss, slow)]
    assert torch.allclose(*gradients)
    assert int(found.num_chunks) == counted
    assert torch.allclose(found.metrics["ce"], slow)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bad", [None, torch.nan, torch.inf, -torch.inf])
def test_the_core_says_what_torch_says(
    bad: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(5, batch=3)
    leaf = case.student_logits.detach().to(dtype)
    sample, token = (int(at[0]) for at in case.student_mask[:, 1:].nonzero(as_tuple=True))
    if bad is not None:  # at a target, so that -inf tells
        leaf[sample, token, case.student_ids[sample, token + 1]] = bad
    leaf.requires_grad_()
    taken: list[bool] = []

    def spy(*given: Any) -> Any:
        found = native_pass(*given)
        taken.append(found is not None)
        return found

    def found() -> tuple[torch.Tensor, ...]:
        output = cross_entropy(leaf, case.student_ids, case.student_mask, 2.5, vocab_size=13)
        (gradient,) = torch.autograd.grad(2 * output.loss, leaf)
        broken = torch.isnan(output.loss)
        return output.loss.detach(), gradient.masked_fill(broken, 0.0), output.metrics["ce"]

    monkeypatch.setattr(ce_module, "native_pass", spy)
    mine = found()
    assert taken == [True]
    monkeypatch.setattr(ce_module, "native_pass", lambda *_: None)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(mine, found(), rtol=tolerance, atol=tolerance, equal_nan=True)


def test_gradcheck() -> None:
    case = make_case(2, batch=1, chunks=6)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits, case.student_ids, case.student_mask, 2.5).loss

    assert gradcheck(loss, (case.student_logits,))


def test_nothing_to_count_gives_zero_with_a_graph() -> None:
    case = make_case(3)
    result = cross_entropy(
        case.student_logits, case.student_ids, torch.zeros_like(case.student_mask)
    )
    (grad,) = torch.autograd.grad(result.loss, case.student_logits)
    assert result.loss.item() == 0.0
    assert not grad.any()


def test_what_does_not_fit_is_refused() -> None:
    case = make_case(4)
    with pytest.raises(ShapeError, match=r"mask has shape \(1, 1\)"):
        cross_entropy(case.student_logits, case.student_ids, torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"mask is torch\.int64"):
        cross_entropy(case.student_logits, case.student_ids, case.student_mask.long())
    ids = case.student_ids.clone()
    ids[case.student_mask] = 13
    with pytest.raises(TokenIdError, match=r"student_ids holds 13, outside the student vocabulary"):
        cross_entropy(case.student_logits, ids, case.student_mask, vocab_size=13)


def test_the_balance_gives_the_distillation_term_the_value_of_the_cross_entropy() -> None:
    kd, ce = (torch.tensor(x, requires_grad=True) for x in (0.5, 2.0))
    total, metrics = combine(kd, ce)
    assert total.item() == pytest.approx(4.0)
    assert [g.item() for g in torch.autograd.grad(total, (kd, ce))] == [4.0, 1.0]
    assert metrics["kd_scale"].item() == 4.0


def test_fixed_weights_and_absent_terms() -> None:
    kd, ce = (torch.tensor(x, requires_grad=True) for x in (0.5, 2.0))
    assert combine(kd, ce, kd_weight=3.0, ce_weight=0.5)[0].item() == pytest.approx(2.5)
    assert combine(kd)[0].item() == 0.5
    assert combine(kd * 0, ce)[0].item() == 2.0


def test_a_partial_kl_below_zero_is_not_turned_round() -> None:
    kd, ce = torch.tensor(-0.5), torch.tensor(2.0)
    assert balance(kd, ce).item() == 1.0
    assert combine(kd, ce)[0].item() == 1.5


def test_the_balance_is_bounded_and_says_so() -> None:
    kd, ce = torch.tensor(4.7e-5), torch.tensor(7.4)
    total, metrics = combine(kd, ce)
    assert metrics["kd_scale"].item() == MAX_BALANCE == 1000
    assert metrics["kd_scale_clipped"].item() == 1.0
    assert total.item() == pytest.approx(7.4 + 0.047)
    for clear in (combine(torch.tensor(0.5), ce), combine(kd, ce, kd_weight=5000.0)):
        assert clear[1]["kd_scale_clipped"].item() == 0.0


def test_wrong_weights_and_shapes_are_refused() -> None:
    for weight in (-1.0, float("nan"), float("inf"), True):
        with pytest.raises(OptionError, match=r"kd_weight = "):
            combine(torch.tensor(1.0), kd_weight=weight)
    with pytest.raises(ShapeError, match=r"ce has shape \(2,\)"):
        combine(torch.tensor(1.0), torch.ones(2))


def test_one_process_divides_by_its_own_count() -> None:
    assert global_normalizer(7).item() == 7.0
    assert global_normalizer(torch.tensor(0)).item() == 1.0
