"""The forward KL of one vocabulary by kernels in Triton's interpreter, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import DTYPES, close, gradient_of, kernels, small_blocks, strided
from loss_cases import Case, loss_of, make_case
from torch import Tensor

from xtoken.errors import NonFiniteError
from xtoken.losses import PairParts, SharedLogits, cross_entropy
from xtoken.losses.kernels.choice import forced
from xtoken.tensors.host import blind
from xtoken.tensors.stop_fold import StopFold

import reference_losses as reference

__all__ = ["small_blocks"]
NAME = "same-vocab-kl"


def case_of(size: int, dtype: torch.dtype = torch.float32, **given: object) -> Case:
    return make_case(3, v_s=size, v_t=size, dtype=dtype, **given)  # type: ignore[arg-type]


def found(case: Case, **given: object) -> tuple[Tensor, Tensor]:
    with kernels(NAME):
        output = case.loss(NAME, **{"pair": case.shared, **given})
        return output.loss, gradient_of(output.loss, case.student_logits)


def expected(case: Case, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    doubles = case.student_logits.detach().double().requires_grad_()
    total = reference.same_vocab_kl(
        doubles, case.teacher_logits.double(), case.usable, case.v_s, temperature=temperature
    )
    loss = total / len(case.usable)
    return loss, gradient_of(loss, doubles)


def same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    close(one[0], other[0], torch.float32)
    close(one[1], other[1], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 12, 53])
@pytest.mark.usefixtures("small_blocks")
def test_values_and_gradients(dtype: torch.dtype, size: int) -> None:
    case = case_of(size, dtype)
    same(found(case, temperature=2.0), expected(case, 2.0), dtype)


@pytest.mark.usefixtures("small_blocks")
def test_rows_and_columns_that_lie_apart_are_read_where_they_are() -> None:
    case = case_of(20)
    apart = replace(
        case,
        student_logits=strided(case.student_logits).requires_grad_(),
        teacher_logits=strided(case.teacher_logits),
    )
    same(found(apart), expected(case), torch.float32)


@pytest.mark.usefixtures("small_blocks")
def test_columns_without_mass_and_a_common_offset() -> None:
    case = case_of(20)
    teacher = case.teacher_logits.clone()
    teacher[..., :9] = -torch.inf  # a whole block
    teacher[..., 12] = -torch.inf
    case.teacher_logits.copy_(teacher + 3000.0)
    with torch.no_grad():
        case.student_logits[..., 3] = -torch.inf
        case.student_logits.sub_(5000.0)
    loss, grad = found(case)
    want, want_grad = expected(case)
    torch.testing.assert_close(loss.double(), want, rtol=3e-4, atol=3e-4)
    torch.testing.assert_close(grad.double(), want_grad, rtol=2e-3, atol=1e-4)


def test_a_logit_that_is_no_number_is_told() -> None:
    for value in (torch.nan, torch.inf):
        case = case_of(20)
        with torch.no_grad():
            case.student_logits[int(case.usable.sample[0]), :, 7] = value
        with kernels(NAME), pytest.raises(NonFiniteError, match="student_logits"):
            case.loss(NAME, pair=case.shared)


def test_weights_normalizer_and_metrics_are_those_of_torch() -> None:
    case = case_of(20)
    given = {
        "chunk_weights": torch.linspace(0.0, 2.0, len(case.usable)),
        "normalizer": torch.tensor(5.0),
    }
    with forced("torch"):
        output = case.loss(NAME, pair=case.shared, **given)
        plain = output.loss, gradient_of(output.loss, case.student_logits)
    same(found(case, **given), plain, torch.float32)
    with kernels(NAME), torch.no_grad():
        value = case.loss(NAME, pair=case.shared, **given)
    close(value.loss, output.loss, torch.float32)
    for name, metric in output.metrics.items():
        close(value.metrics[name], metric, torch.float32)


def test_stop_tokens_are_added() -> None:
    case = case_of(20)
    pair = PairParts((20, 20), stop_fold=StopFold([3, 4, 9], [5, 5, 2]))
    with forced("torch"):
        output = case.loss(NAME, pair=pair, temperature=1.5)
        plain = output.loss, gradient_of(output.loss, case.student_logits)
    same(found(case, pair=pair, temperature=1.5), plain, torch.float32)


def test_what_a_kernel_cannot_do_torch_does() -> None:
    case = case_of(20)
    for given in ({"direction": "reverse"}, {"top_k": 4}, {"merge": "mean"}):
        with kernels():
            found = case.loss(NAME, pair=case.shared, **given)
        with forced("torch"):
            assert torch.equal(found.loss, case.loss(NAME, pair=case.shared, **given).loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_shared_gradient_and_no_chunk(dtype: torch.dtype) -> None:
    case = case_of(20, dtype)
    grads = []
    for mode in ("torch", "triton"):
        with forced(mode):
            shared = SharedLogits.of(case.student_logits)
            ce = cross_entropy(shared, case.student_ids, case.student_mask, vocab_size=20).loss
            kd = loss_of(NAME, shared, case.teacher_logits, case.usable, case.shared).loss
            grads.append(gradient_of(3.0 * kd + ce, case.student_logits))
            none = case.loss(NAME, pair=case.shared, chunks=case.usable.select(torch.arange(0)))
            assert float(none.loss.detach()) == 0
    close(grads[1], grads[0], dtype)


def test_a_factor_known_in_backward_alone() -> None:
    """On a device nobody looks at it: the kernel does."""
    for factor in (1.0, 0.75):
        case = case_of(20)
        with kernels(NAME, "the gradient's factor"), blind():
            loss = case.loss(NAME, pair=case.shared).loss
            grad = gradient_of(factor * loss, case.student_logits)
        close(grad, factor * expected(case)[1], torch.float32)
