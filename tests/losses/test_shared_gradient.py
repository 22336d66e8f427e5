"""Losses of one student's logits write one gradient."""

from __future__ import annotations

import tracemalloc
from itertools import accumulate

import pytest
import torch
from loss_cases import Case, loss_of, make_case, pair_of, w_alone
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from xtoken.losses import TeacherTopK, balance, cross_entropy
from xtoken.losses.engine.shared_gradient import SharedLogits
from xtoken.losses.engine.student_rows import LogitRows
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.projection import SparseProjection

OPTIONS = [{}, {"top_k": 5, "top_k_scope": "microbatch"}, {"merge": "mean", "block_size": 2}]


def both(case: Case, student: Tensor | SharedLogits, options: dict) -> tuple[Tensor, Tensor]:
    ce = cross_entropy(student, case.student_ids, case.student_mask, vocab_size=case.v_s).loss
    return case.loss("p-kl", student=student, **options).loss, ce


def gradients(
    case: Case, options: dict, shared: bool, way: str, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    leaf = case.student_logits.detach().to(dtype).requires_grad_()
    kd, ce = both(case, SharedLogits.of(leaf) if shared else leaf, options)
    losses = {
        "sum": kd + ce,
        "weighted": 0.5 * ce + 3.0 * kd,
        "balanced": balance(kd, ce) * kd + ce,
        "kd alone": kd,
        "ce alone": 2.0 * ce,
    }
    first = torch.autograd.grad(losses[way], leaf, retain_graph=True)[0]
    return [first.clone(), torch.autograd.grad(losses[way], leaf)[0]]


@pytest.mark.parametrize("way", ["sum", "weighted", "balanced", "kd alone", "ce alone"])
@pytest.mark.parametrize("options", OPTIONS, ids=["all", "microbatch", "mean"])
def test_the_gradient_is_that_of_the_losses_apart_and_again(options: dict, way: str) -> None:
    case = make_case(2)
    wanted, found = (gradients(case, options, shared, way) for shared in (False, True))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_too(dtype: torch.dtype) -> None:
    case = make_case(2)
    wanted, found = (gradients(case, {}, s, "weighted", dtype) for s in (False, True))
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-3)


def test_learnable_weights_get_theirs() -> None:
    case = make_case(2)
    w = case.projection
    found = []
    for shared in (False, True):
        learnable = SparseProjection(w.indptr, w.indices, w.weights, w.shape, learnable=True)
        leaf = case.student_logits.detach().requires_grad_()
        student = SharedLogits.of(leaf) if shared else leaf
        ce = cross_entropy(student, case.student_ids, case.student_mask, vocab_size=case.v_s).loss
        kd = case.loss("p-kl", student=student, pair=pair_of(learnable)).loss
        found.append(torch.autograd.grad(ce + 2 * kd, [leaf, learnable.free]))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_one_buffer_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = LogitRows.new_grads
    monkeypatch.setattr(
        LogitRows, "new_grads", lambda self, needed: made.append(1) or real(self, needed)
    )
    case = make_case(2)
    leaf = case.student_logits.detach().requires_grad_()
    kd, ce = both(case, SharedLogits.of(leaf), {"merge": "mean"})
    (balance(kd, ce) * kd + ce).backward()
    assert len(made) == 1


@pytest.mark.parametrize("tokens", [64, 128])
@pytest.mark.parametrize("stored", [None, 64], ids=["all columns", "stored"])
def test_both_losses_hold_little_more_than_one_gradient(stored: int | None, tokens: int) -> None:
    pair = w_alone(SparseProjection.identity(30_000))
    logits = torch.randn(1, tokens, 30_000)
    leaf = logits.roll(1, 1).requires_grad_()
    teacher = TeacherTopK.from_logits(logits, stored) if stored else logits
    mask = torch.ones(1, tokens, dtype=torch.bool)
    chunks = ChunkBatch.from_mask(mask)
    assert chunks.usable(mask, mask).host.predicted

    def step() -> None:
        student = SharedLogits.of(leaf)
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        ce = cross_entropy(student, ids, mask, block_size=4).loss
        kd = loss_of("p-kl", student, teacher, chunks.usable(mask, mask), pair, block_size=4).loss
        (balance(kd, ce) * kd + ce).backward()

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True):  # its own imports
        step()
    leaf.grad = None
    tracemalloc.start()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
        by_numpy = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    by_torch = max(accumulate(event.nbytes() for event in events))
    gradients = (by_torch + by_numpy) / logits.nbytes  # at most: not at one time
    assert 1.0 <= gradients < (1.4 if tokens == 128 else 1.6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rows_of_a_wide_gradient_are_added_wherever_they_lie(dtype: torch.dtype) -> None:
    """Also a row named twice, where sums are not rounded; beside columns that do not count."""
    source = LogitRows(torch.zeros(2, 3, 2203, dtype=dtype), 2200)
    grads = [torch.ones(2, 3, 2203, dtype=dtype)]
    index = torch.tensor([4, 0, 4 if dtype == torch.float32 else 2])
    rows = torch.randn(3, 2200, generator=torch.Generator().manual_seed(0))
    source.add_grads(grads, index, None, rows)
    wanted = torch.ones(6, 2203, dtype=dtype)
    wanted[:, :2200].index_add_(0, index, rows.to(dtype))
    assert torch.equal(grads[0].flatten(0, 1), wanted)
