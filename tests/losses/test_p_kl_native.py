"""P-KL by the core on the CPU is P-KL by torch: values, metrics and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from loss_cases import Case, make_case, pair_of, real_case
from torch import Tensor

from xtoken import _core
from xtoken.errors import XTokenError
from xtoken.losses import LossOutput, SharedLogits, balance, cross_entropy
from xtoken.losses.engine import teacher_rows
from xtoken.losses.engine.teacher_rows import TeacherRows, top_columns
from xtoken.losses.p_kl import block as p_kl_block
from xtoken.losses.p_kl import native
from xtoken.tensors.stop_fold import StopFold

Pass = Callable[..., Any]

OPTIONS: dict[str, dict[str, object]] = {
    "all": {},
    "temperature": {"temperature": 2.5},
    "last": {"merge": "last"},
    "top 3": {"top_k": 3},
    "top 1": {"top_k": 1, "temperature": 0.5},
    "more than there are": {"top_k": 10_000},
    "a batch's 3": {"top_k": 3, "top_k_scope": "microbatch"},
    "a batch's 5, warm": {"top_k": 5, "top_k_scope": "microbatch", "temperature": 1.5},
    "all that a batch has": {"top_k": 10_000, "top_k_scope": "microbatch"},
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the core took each pass."""
    taken: list[bool] = []

    def spy(*given: Any) -> Any:
        found = native.native_pass(*given)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(p_kl_block, "native_pass", spy)
    return taken


def by_torch(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(p_kl_block, "native_pass", lambda *_: None)
        return run()


def found(case: Case, leaf: Tensor, **options: object) -> tuple[Tensor, ...]:
    output: LossOutput = case.loss("p-kl", student=leaf, **options)
    (gradient,) = torch.autograd.grad(3 * output.loss, leaf)
    return output.loss.detach(), gradient, *output.metrics.values()


def compare(
    case: Case, monkeypatch: pytest.MonkeyPatch, counted: list[bool], **options: object
) -> None:
    double = case.student_logits.detach().double().requires_grad_()
    whole = replace(case, teacher_logits=case.teacher_logits.double())
    wanted = by_torch(monkeypatch, lambda: found(whole, double, **options))
    taken = len(counted)
    torch.testing.assert_close(found(whole, double, **options), wanted, rtol=1e-9, atol=1e-12)
    half = replace(case, teacher_logits=case.teacher_logits.float())
    single = found(half, case.student_logits.detach().float().requires_grad_(), **options)
    assert counted[taken:] == [True, True]
    for mine, theirs in zip(single, wanted, strict=True):
        assert mine.dtype == torch.float32
        scale = float(theirs.abs().max())
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=2e-6 * scale + 1e-7)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("seed", range(4))
def test_value_metrics_and_gradient_are_those_of_torch(
    seed: int, name: str, monkeypatch: pytest.MonkeyPatch, counted: list[bool]
) -> None:
    compare(make_case(seed), monkeypatch, counted, **OPTIONS[name])


@pytest.mark.parametrize("name", ["all", "top 3", "a batch's 3"])
def test_of_real_text_and_weighted(
    name: str, monkeypatch: pytest.MonkeyPatch, counted: list[bool]
) -> None:
    case = real_case(1)
    weights = torch.linspace(0.1, 3.0, len(case.usable), dtype=torch.float64)
    given = {"chunk_weights": weights, "normalizer": 7.0, **OPTIONS[name]}
    compare(case, monkeypatch, counted, **given)


@pytest.mark.parametrize("name", ["all", "top 3", "a batch's 3"])
def test_with_stops_folded(name: str, monkeypatch: pytest.MonkeyPatch, counted: list[bool]) -> None:
    case = make_case(2)
    supported = case.projection.supported
    sources = (~supported).nonzero().flatten().tolist()
    target = int(supported.nonzero()[1])
    pair = pair_of(case.projection)
    pair.stop_fold = StopFold(sources, [target] * len(sources))
    compare(replace(case, pair=pair), monkeypatch, counted, **OPTIONS[name])


def test_a_folded_stop_that_is_a_column_of_w_is_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, counted: list[bool]
) -> None:
    case = make_case(2)
    supported = case.projection.supported.nonzero().flatten().tolist()
    pair = pair_of(case.projection)
    pair.stop_fold = StopFold(supported[:1], supported[1:2])
    case = replace(case, pair=pair)
    leaf = case.student_logits
    mine = found(case, leaf)
    assert counted == [False]
    torch.testing.assert_close(mine, by_torch(monkeypatch, lambda: found(case, leaf)))


@pytest.mark.parametrize("name", ["all", "top 3", "a batch's 3"])
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_that_need_log_space_are_left_to_torch(
    name: str, threads: int, monkeypatch: pytest.MonkeyPatch, counted: list[bool]
) -> None:
    case = make_case(5, scale=3.0, chunks=12)
    logits = case.student_logits.detach().clone()
    logits[0, ::2, ::3] -= 900.0  # underflows in float64 too
    logits[1, 1] = -torch.inf
    logits[1, 1, 2] = 0.5
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(replace(case, student_logits=logits), monkeypatch, counted, **OPTIONS[name])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_adds_to_a_shared_gradient(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, counted: list[bool]
) -> None:
    case = make_case(3, dtype=dtype)

    def both() -> Tensor:
        leaf = case.student_logits.detach().clone().requires_grad_()
        student = SharedLogits.of(leaf)
        first = case.loss("p-kl", student=student, top_k=3).loss
        kd = case.loss("p-kl", student=student).loss
        ce = cross_entropy(student, case.student_ids, case.student_mask, vocab_size=case.v_s).loss
        (first + balance(kd, ce) * kd + ce).backward()
        assert leaf.grad is not None
        return leaf.grad

    wanted = by_torch(monkeypatch, both)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(both(), wanted, rtol=tolerance, atol=tolerance / 10)
    assert counted == [True] * 3  # the second twice: its value, then its gradient


def test_what_the_core_has_no_form_of_is_torch(counted: list[bool]) -> None:
    case = make_case(1)
    for given in (
        {"full_metrics": True}, {"tail_bucket": True, "top_k": 3}, {"direction": "reverse"},
        {"merge": "mean"}, {"top_k": 3, "top_k_scope": "microbatch", "tail_bucket": True},
        {"teacher": case.teacher_logits.float()},
    ):  # fmt: skip
        case.loss("p-kl", **given).loss.backward()
    assert counted
    assert not any(counted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fold", [None, StopFold([3, 5], [1, 1])])
def test_the_columns_of_a_batch_are_those_of_torch(
    fold: StopFold | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(6, batch=3, chunks=30, dtype=dtype)
    rows = TeacherRows.build(case.teacher_logits, case.usable, case.v_t, 1.7, "chain", fold=fold)
    given = rows, case.projection.supported, 4, 3
    columns, mine = top_columns(*given)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again, same = top_columns(*given)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(teacher_rows, "_masses_by_core", lambda _: None)
    wanted, theirs = top_columns(*given)
    assert torch.equal(columns, wanted)
    assert torch.equal(columns, again)
    assert mine.log_totals is not None
    assert same.log_totals is not None
    assert torch.equal(mine.log_totals, same.log_totals)
    torch.testing.assert_close(mine.log_totals, theirs.log_totals)


def test_without_a_gradient_the_logits_stay_as_they_are(counted: list[bool]) -> None:
    case = make_case(1)
    before = case.student_logits.detach().clone()
    with torch.no_grad():
        value = case.loss("p-kl").loss
    torch.testing.assert_close(value, case.loss("p-kl").loss.detach())
    assert torch.equal(before, case.student_logits)
    assert counted == [True, True]


def test_arrays_that_do_not_fit_are_refused() -> None:
    one = np.array([0, 1]), np.array([0, 1, 2]), np.array([1.0, 1.0])
    given = {"rows": None, "folds": [], "empty": np.zeros(0, np.int64), "single": False}
    columns = np.array([0, 1])
    w = _core.ForwardKL(*one, columns=columns, sizes=(2, 2), **given)
    logits, rows = np.zeros((3, 2)), np.array([0, 1])
    more = {"temperature": 1.0, "top_k": None, "gradient": None, "adds": False, "threads": 1}
    assert w.run(logits, logits, rows, rows, np.ones(2), **more)[0].all()
    alone = _core.ForwardKL(*one, columns=columns, sizes=(2, 2), **given, alone=True)
    wrong = (
        lambda: w.run(logits, logits, rows + 2, rows, np.ones(2), **more),
        lambda: w.run(logits, logits, rows, rows - 1, np.ones(2), **more),
        lambda: w.run(logits, logits, rows, rows, np.ones(3), **more),
        lambda: w.run(logits[:, :1].copy(), logits, rows, rows, np.ones(2), **more),
        lambda: w.run(logits, logits, rows * 0, rows, np.ones(2), **more | {"gradient": +logits}),
        lambda: w.run(logits, logits, rows, rows, np.ones(2), **more | {"gradient": +logits[:1]}),
        lambda: w.run(logits[:, ::-1], logits, rows, rows, np.ones(2), **more),
        lambda: w.run(logits, logits, rows, rows, np.ones(2), **more, log_totals=np.ones(2)),
        lambda: alone.run(logits, logits, rows, rows, np.ones(2), **more),
        lambda: _core.column_masses(logits, rows + 2, size=2, temperature=1.0, threads=1),
        lambda: _core.column_masses(logits, rows, size=3, temperature=1.0, threads=1),
        lambda: _core.ForwardKL(*one, columns=columns + 1, sizes=(2, 2), **given),
        lambda: _core.ForwardKL(*one, columns=columns, sizes=(1, 2), **given),
    )
    for call in wrong:
        with pytest.raises(XTokenError):
            call()
