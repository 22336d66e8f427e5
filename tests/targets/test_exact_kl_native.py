"""Exact KL by the core is exact KL by torch: values, metrics and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from exact_kl_cases import LENGTH, V, laid_out, loss_of, pair, random_targets, student
from torch import Tensor

from xtoken import _core
from xtoken.errors import FormatError, NonFiniteError, ShapeError
from xtoken.losses import SharedLogits, cross_entropy
from xtoken.losses.exact_kl import block, native
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.target_batch import TargetBatch

OPTIONS: dict[str, dict[str, Any]] = {
    "chain rule": {"chain_rule": True},
    "plain sum": {},
    "depth weights": {"chain_rule": False, "depth_weights": (1.0, 0.5, 2.0)},
    "no weight at the root": {"chain_rule": False, "depth_weights": (0.0, 1.0)},
}


@pytest.fixture
def by_core(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each call of the core: positions, and those that it left to torch."""
    seen: list[tuple[int, int]] = []
    whole = _core.exact_kl

    def spy(*given: Any, **named: Any) -> Any:
        answer = whole(*given, **named)
        seen.append((len(answer[0]), int((~answer[0]).sum())))
        return answer

    monkeypatch.setattr(native._core, "exact_kl", spy)
    return seen


def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "native_pass", lambda *_: None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("seed", range(4))
def test_value_metrics_and_gradient_are_those_of_torch(
    seed: int,
    name: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    by_core: list[tuple[int, int]],
) -> None:
    targets, tokens = random_targets(seed)
    batch = laid_out(targets, tokens)
    given = {**OPTIONS[name], "chunk_weights": torch.linspace(0.1, 2.0, len(batch))}
    leaf = student(seed).detach().to(dtype)
    if seed == 3:  # positions that the core leaves to torch
        leaf[0, ::2, ::3] -= 1500.0
    leaf.requires_grad_()

    def found() -> tuple[Tensor, ...]:
        output = loss_of(leaf, targets, batch, **given)
        (gradient,) = torch.autograd.grad(3 * output.loss, leaf)
        return output.loss.detach(), gradient, *output.metrics.values()

    mine = found()
    assert by_core[0][0] == len(targets.positions)
    assert (by_core[0][1] > 0) == (seed == 3)
    torch_alone(monkeypatch)
    tolerance = 1e-10 if dtype == torch.float64 else 3e-5
    torch.testing.assert_close(mine, found(), rtol=tolerance, atol=tolerance)
    assert len(by_core) == 1


def test_it_adds_to_a_shared_gradient(
    monkeypatch: pytest.MonkeyPatch, by_core: list[tuple[int, int]]
) -> None:
    targets, tokens = random_targets(5)
    batch = laid_out(targets, tokens)
    ids = torch.randint(0, V, (2, LENGTH), generator=torch.Generator().manual_seed(0))

    def both() -> Tensor:
        leaf = student(5).detach().requires_grad_()
        shared = SharedLogits.of(leaf)
        kd = loss_of(shared, targets, batch, chain_rule=False).loss
        ce = cross_entropy(shared, ids, torch.ones_like(ids, dtype=torch.bool), vocab_size=V).loss
        (2 * kd + ce).backward()
        assert leaf.grad is not None
        return leaf.grad

    mine = both()
    assert by_core
    torch_alone(monkeypatch)
    torch.testing.assert_close(mine, both(), rtol=1e-10, atol=1e-12)


def test_rows_that_hold_no_number_are_refused_as_by_torch(by_core: list[tuple[int, int]]) -> None:
    targets, tokens = random_targets(6)
    batch = laid_out(targets, tokens)
    leaf = student(6).detach()
    leaf[1, int(targets.positions[-1]) - 1, 2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"student_logits\[1, 7, 2\] = nan"):
        loss_of(leaf.requires_grad_(), targets, batch)


def test_threads_change_no_bit() -> None:
    targets, tokens = random_targets(7, examples=5)
    batch = laid_out(targets, tokens)
    leaf = student(7, samples=5)
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss = loss_of(leaf, targets, batch).loss
            answers.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    finally:
        torch.set_num_threads(before)
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=0, atol=0)


def test_what_the_core_has_no_form_of_is_torch(by_core: list[tuple[int, int]]) -> None:
    targets, tokens = random_targets(1)
    batch = laid_out(targets, tokens)
    loss_of(student(1), targets, batch, direction="reverse")
    loss_of(student(1).detach().bfloat16(), targets, batch)
    loss_of(student(1).transpose(0, 1).contiguous().transpose(0, 1), targets, batch)
    none = ChunkBatch.empty()
    nothing = TargetBatch.from_targets(targets, tokens, none, LENGTH)
    loss_of(student(1), targets, nothing, chunks=none)
    assert not by_core
    assert pair().targets is not None


def test_arrays_that_do_not_fit_are_refused() -> None:
    def run(**changed: Any) -> None:
        given = {
            "tails": np.zeros(1), "open": np.zeros(1, np.bool_), "group_ptr": np.array([0, 2]),
            "probs": np.array([0.5, 0.5]), "depths": np.zeros(2, np.int64),
            "range_ptr": np.array([0, 1, 2]), "starts": np.array([0, 2]), "ends": np.array([1, 3]),
            "order": np.array([0, 3, 2]), **changed,
        }  # fmt: skip
        _core.exact_kl(
            np.zeros((1, 3)), np.zeros(1, np.int64), tuple(given.values()), np.ones(1), size=3,
            factor=1.0, depths=None, gradient=None, adds=False, threads=1,
        )  # fmt: skip

    run()
    with pytest.raises(ShapeError, match="token 3, of a vocabulary"):
        run(order=np.array([0, 1, 3]))
    with pytest.raises(ShapeError, match="tails"):
        run(tails=np.zeros(2))
    with pytest.raises(ShapeError):
        run(group_ptr=np.array([0, 3]))
    with pytest.raises(FormatError, match="do not rise"):
        run(range_ptr=np.array([0, 2, 1]))
    with pytest.raises(ShapeError):
        run(range_ptr=np.array([0, 1, 3]))
    with pytest.raises(ShapeError, match="ends"):
        run(ends=np.array([1]))
    for changed in ({"starts": np.array([-1, 2])}, {"starts": np.array([2, 2])}):
        with pytest.raises(FormatError, match="none of the order's"):
            run(**changed)
    with pytest.raises(FormatError, match="none of the order's"):
        run(ends=np.array([1, 4]))
