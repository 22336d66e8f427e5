"""Prefix KL by kernels in Triton's interpreter, against the brute-force twin in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import close, gradient_of, kernels, small_blocks, strided
from losses.test_prefix_kl import loss_of, twin_of
from prefix_cases import make_prefix_case

from xtoken.losses import SharedLogits, cross_entropy
from xtoken.losses.kernels.choice import forced

__all__ = ["small_blocks"]
pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"temperature": 1.5}),
        (torch.float16, {"depth_weights": (0.5, 2.0, 0.25)}),
        (torch.float32, {"stored_k": 4}),
        (torch.bfloat16, {"end": False}),
        (torch.float32, {"stored_k": 4, "min_mass": 0.3}),
        (torch.float32, {"mirror": False, "max_depth": 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(2))
def test_values_and_gradients(dtype: torch.dtype, options: dict, seed: int) -> None:
    case = make_prefix_case(seed, batch=2, chunks=8, dtype=dtype)
    with kernels("prefix-kl", "p-kl"):
        loss = loss_of(case, normalizer=2.0, **options).loss
        grad = gradient_of(loss, case.batch.student_logits)
    doubles = case.batch.student_logits.detach().double().requires_grad_()
    case = replace(case, batch=replace(case.batch, student_logits=doubles))
    expected = twin_of(case, **options) / 2.0
    assert float(expected.detach()) > 0.1
    close(loss, expected, torch.float32)
    # The root and the prefixes are added in memory, rounded each time.
    close(grad, gradient_of(expected, doubles), dtype, writes=3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stored_k": 4, "top_k": 4, "tail_bucket": True},
        {"top_k": 5, "top_k_scope": "microbatch"},
    ],
    ids=str,
)
def test_metrics_weights_and_strides_are_those_of_torch(options: dict) -> None:
    case = make_prefix_case(9, batch=3, chunks=10, dtype=torch.float32)
    batch = case.batch
    batch = replace(batch, student_logits=strided(batch.student_logits).requires_grad_())
    case = replace(case, batch=batch)
    options = {**options, "chunk_weights": torch.linspace(0.0, 2.0, len(batch.usable))}
    results = []
    for mode in ("torch", "triton"):
        with forced(mode):
            output = loss_of(case, temperature=1.3, **options)
            with torch.no_grad():
                value = loss_of(case, temperature=1.3, **options).loss
            results.append((output, gradient_of(output.loss, batch.student_logits), value))
    (plain, grad, value), (found, kernel_grad, kernel_value) = results
    assert float(plain.metrics["prefixes"]) > 0.3
    close(found.loss, plain.loss, torch.float32)
    close(kernel_value, value, torch.float32)
    close(kernel_grad, grad, torch.float32)
    for name, metric in plain.metrics.items():
        close(found.metrics[name], metric, torch.float32)


def test_a_shared_gradient() -> None:
    case = make_prefix_case(9, batch=2, chunks=8, dtype=torch.float32)
    batch, grads = case.batch, []
    for mode in ("torch", "triton"):
        with forced(mode):
            shared = SharedLogits.of(batch.student_logits)
            ce = cross_entropy(shared, batch.student_ids, batch.student_mask, vocab_size=16).loss
            first, second = (loss_of(case, logits=shared).loss for _ in range(2))
            grads.append(gradient_of(first + 0.5 * second + ce, batch.student_logits))
    close(grads[1], grads[0], torch.float32)
