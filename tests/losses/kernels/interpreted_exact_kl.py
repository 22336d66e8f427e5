"""Exact KL by kernels in Triton's interpreter, against a float64 loop over groups and tokens."""

from __future__ import annotations

import pytest
import torch
from exact_kl_cases import LENGTH, V, laid_out, loss_of, random_targets, student
from kernel_cases import DTYPES, close, gradient_of, kernels, small_blocks, strided
from targets.test_exact_kl import OPTIONS, slow_loss, slow_options
from torch import Tensor

from xtoken.errors import NonFiniteError
from xtoken.losses import SharedLogits, cross_entropy
from xtoken.losses.kernels.choice import forced

__all__ = ["small_blocks"]


FORWARD = ["chain rule", "plain sum", "depth weights"]


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        *(("chain rule", seed) for seed in range(3)),
        *(("plain sum", seed) for seed in (1, 2)),
        ("depth weights", 0),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small_blocks")
def test_values_and_gradients(dtype: torch.dtype, name: str, seed: int) -> None:
    targets, tokens = random_targets(seed)
    batch, logits = laid_out(targets, tokens), student(seed).detach().to(dtype).requires_grad_()
    with kernels("exact-kl"):
        found = loss_of(logits, targets, batch, normalizer=3.0, **OPTIONS[name])
        grad = gradient_of(found.loss, logits)
    doubles = logits.detach().double().requires_grad_()
    expected = slow_loss(doubles, targets, tokens, **slow_options(name)) / 3.0
    close(found.loss, expected, torch.float32)
    close(grad, gradient_of(expected, doubles), dtype)


def both(logits: Tensor, seed: int = 1, **given: object) -> list[tuple[Tensor, Tensor, dict]]:
    targets, tokens = random_targets(seed)
    batch, results = laid_out(targets, tokens), []
    for mode in ("torch", "triton"):
        with forced(mode):
            output = loss_of(logits, targets, batch, **given)
            results.append((output.loss, gradient_of(output.loss, logits), output.metrics))
    return results


@pytest.mark.parametrize(
    "options",
    [
        {"depth_weights": (0.7,), "chain_rule": False, "max_depth": 0},
        {"depth_weights": (0.0, 1.5), "chain_rule": False},
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_strided_logits_weights_and_metrics(options: dict[str, object]) -> None:
    logits = strided(student(4).float()).requires_grad_()
    weights = torch.linspace(0.5, 2.0, len(laid_out(*random_targets(1))))
    (plain, grad, metrics), (loss, kernel_grad, kernel_metrics) = both(
        logits, chunk_weights=weights, normalizer=torch.tensor(2.0), **options
    )
    close(loss, plain, torch.float32)
    close(kernel_grad, grad, torch.float32)
    for name, metric in metrics.items():
        close(kernel_metrics[name], metric, torch.float32)


@pytest.mark.parametrize("chain_rule", [True, False])
def test_masses_that_underflow(chain_rule: bool) -> None:
    logits = 60 * student(4).detach().float()
    logits.requires_grad_()
    (plain, grad, _), (loss, kernel_grad, _) = both(logits, chain_rule=chain_rule)
    close(loss, plain, torch.float32)
    close(kernel_grad, grad, torch.float32)


@pytest.mark.parametrize("name", FORWARD)
def test_a_logit_that_is_no_number_is_told(name: str) -> None:
    logits = student(4).detach().float()
    logits[0, 2, 5] = torch.nan
    targets, tokens = random_targets(1)
    with kernels("exact-kl"), pytest.raises(NonFiniteError, match=r"student_logits\[0, 2, 5\]"):
        loss_of(logits.requires_grad_(), targets, laid_out(targets, tokens), **OPTIONS[name])


@pytest.mark.parametrize("name", FORWARD)
def test_a_shared_gradient(name: str) -> None:
    logits = student(2).detach().float().requires_grad_()
    targets, tokens = random_targets(1)
    ids = torch.zeros(2, LENGTH, dtype=torch.int64)
    grads = []
    for mode in ("torch", "triton"):
        with forced(mode):
            shared = SharedLogits.of(logits)
            batch = laid_out(targets, tokens)
            first, second = (
                loss_of(shared, targets, batch, **OPTIONS[name]).loss for _ in range(2)
            )
            ce = cross_entropy(shared, ids, ids == 0, vocab_size=V).loss
            grads.append(gradient_of(first + 0.5 * second + ce, logits))
    close(grads[1], grads[0], torch.float32)
