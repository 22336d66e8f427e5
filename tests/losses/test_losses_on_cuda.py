"""Every loss on a CUDA device: what the CPU computes in float64, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from exact_kl_cases import chunks_of, laid_out, loss_of, pair, random_targets, student
from loss_cases import Case
from losses.kernels.kernel_cases import close
from losses.test_losses_without_waiting import CASES, made, moved_inputs, moved_pair, prepared, run
from torch import Tensor

from xtoken.losses import (
    LOSSES,
    LossInputs,
    LossOptions,
    SharedLogits,
    balance,
    cross_entropy,
)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    # Each process tells once that it may not see all.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def on_card(tensor: Tensor) -> Tensor:
    """There with the strides that it has here."""
    size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if not tensor.numel():
        return tensor.to("cuda")
    return tensor.as_strided((size,), (1,)).cuda().as_strided(tensor.shape, tensor.stride())


def without_waiting(call: Callable[[], Any]) -> Any:
    """The second call: at the first a kernel is compared with torch, and what lasts is made."""
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def in_float64(case: Case) -> Case:
    teacher = case.teacher_logits
    return replace(
        case,
        student_logits=case.student_logits.detach().double().requires_grad_(),
        teacher_logits=teacher.double() if isinstance(teacher, Tensor) else teacher,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_each_loss(name: str, dtype: torch.dtype) -> None:
    loss, case, options, head = made(name, dtype=dtype)
    ready = prepared(loss, case, options)
    wanted, leaf = run(loss, in_float64(case), ready, options, lambda tensor: tensor, head)
    (gradient,) = torch.autograd.grad(wanted.loss, leaf)
    inputs, leaf = moved_inputs(case, ready, on_card, head)
    there = moved_pair(case.pair, on_card)

    def call() -> tuple[Any, Tensor]:
        output = LOSSES[loss].function(inputs, there, options)
        return output, torch.autograd.grad(output.loss, leaf)[0]

    found, given = without_waiting(call)
    # A head multiplies in its own dtype.
    precise = torch.float32 if not head or dtype == torch.float64 else dtype
    close(1 + found.loss.cpu(), 1 + wanted.loss, precise)
    close(given.cpu(), gradient, dtype, writes=3)
    # The CPU leaves a metric out where it reads some columns alone.
    assert found.metrics.keys() >= wanted.metrics.keys()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chain_rule", [True, False])
def test_exact_kl(chain_rule: bool, dtype: torch.dtype) -> None:
    targets, tokens = random_targets(1)
    batch, logits = laid_out(targets, tokens), student(1).detach()
    doubles = logits.to(dtype).double().requires_grad_()
    wanted = loss_of(doubles, targets, batch, chain_rule=chain_rule).loss
    leaf = on_card(logits.to(dtype)).requires_grad_()
    ids = torch.zeros(leaf.shape[:2], dtype=torch.int64, device=leaf.device)
    inputs = LossInputs(
        leaf, leaf.detach(), chunks_of(targets).to(leaf.device), ids, ids,
        targets=batch.to(leaf.device),
    )  # fmt: skip
    options = LossOptions(chain_rule=chain_rule)

    def call() -> tuple[Tensor, Tensor]:
        loss = LOSSES["exact-kl"].function(inputs, pair(), options).loss
        return loss, torch.autograd.grad(loss, leaf)[0]

    found, given = without_waiting(call)
    close(found.cpu(), wanted, torch.float32)
    close(given.cpu(), torch.autograd.grad(wanted, doubles)[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["p_kl", "p_kl chunk, tail", "p_kl stored, tail", "prefix_kl"])
def test_with_cross_entropy_in_one_gradient(name: str, dtype: torch.dtype) -> None:
    loss, case, options, head = made(name, dtype=dtype)
    ready = prepared(loss, case, options)
    results = []
    for move, of in ((lambda tensor: tensor, in_float64(case)), (on_card, case)):
        inputs, leaf = moved_inputs(of, ready, move, head)
        there, ids, mask = moved_pair(of.pair, move), move(of.student_ids), move(of.student_mask)

        def call() -> tuple[Tensor, Tensor]:
            shared = SharedLogits.of(leaf)  # noqa: B023
            ce = cross_entropy(shared, ids, mask).loss  # noqa: B023
            kd = LOSSES[loss].function(replace(inputs, student=shared), there, options).loss  # noqa: B023
            total = balance(kd, ce) * kd + ce
            return total, torch.autograd.grad(total, leaf)[0]  # noqa: B023

        results.append(call() if of is not case else without_waiting(call))
    (wanted, gradient), (found, given) = results
    close(found.cpu(), wanted, torch.float32)
    close(given.cpu(), gradient, dtype, writes=3)
