"""P-KL and prefix KL of a stored top-k by the core are those by torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from loss_cases import Case, loss_of, make_case, pair_of, random_csr, real_case, w_alone
from prefix_cases import PrefixCase, make_prefix_case
from torch import Tensor

from xtoken import _core
from xtoken.errors import XTokenError
from xtoken.losses import LossOutput, SharedLogits, TeacherTopK, cross_entropy
from xtoken.losses.p_kl import block as p_kl_block
from xtoken.losses.p_kl import native
from xtoken.losses.prefix_kl import block as prefix_kl_block
from xtoken.losses.prefix_kl import native as prefix_native
from xtoken.tensors.projection import SparseProjection
from xtoken.tensors.stop_fold import StopFold

OPTIONS: dict[str, dict[str, object]] = {
    "kept alone": {},
    "tail": {"tail_bucket": True},
    "tail where there is one": {"tail_bucket": "auto"},
    "fewer than stored": {"top_k": 2, "tail_bucket": True},
    "fewer, alone": {"top_k": 2},
    "last": {"merge": "last", "tail_bucket": True},
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the core took each pass."""
    taken: list[bool] = []

    def spy(run: Callable[..., Any]) -> Callable[..., Any]:
        def spied(*given: Any) -> Any:
            found = run(*given)
            taken.append(found is not None)
            return found

        return spied

    monkeypatch.setattr(p_kl_block, "native_pass", spy(native.native_pass))
    monkeypatch.setattr(
        prefix_kl_block, "native_prefix_pass", spy(prefix_native.native_prefix_pass)
    )
    return taken


def by_torch(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(p_kl_block, "native_pass", lambda *_: None)
        patch.setattr(prefix_kl_block, "native_prefix_pass", lambda *_: None)
        return run()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stored_of(logits: Tensor, k: int, *, padded: bool = True, temperature: float = 1.0) -> Any:
    """Stored predictions; every third row has pads that repeat its first id."""
    logits = logits.detach().clone()
    logits[..., -3:] -= 3.0  # the padding of an lm_head: some ids, and little mass
    found = TeacherTopK.from_logits(logits, k, temperature=temperature)
    ids, log_probs = found.ids.clone(), found.log_probs.clone()
    if padded and k > 2:
        log_probs[:, ::3, -1] = -torch.inf
        ids[:, ::3, -1] = ids[:, ::3, 0]
    return TeacherTopK(ids, log_probs, temperature)


def found(case: Case, leaf: Tensor, **options: object) -> tuple[Tensor, ...]:
    output: LossOutput = case.loss("p-kl", student=leaf, **options)
    (gradient,) = torch.autograd.grad(3 * output.loss, leaf)
    return output.loss.detach(), gradient, *output.metrics.values()


def compare(
    case: Case, teacher: TeacherTopK, monkeypatch: pytest.MonkeyPatch, counted: list[bool],
    rtol: float = 1e-9, **options: object,
) -> None:  # fmt: skip
    options["teacher"] = teacher
    double = case.student_logits.detach().double().requires_grad_()
    wanted = by_torch(monkeypatch, lambda: found(case, double, **options))
    taken = len(counted)
    mine = found(case, double, **options)
    torch.testing.assert_close(mine, wanted, rtol=rtol, atol=rtol / 1000)
    with threads(3):
        again = found(case, double, **options)
    for one, other in zip(mine, again, strict=True):
        assert torch.equal(one, other)
    single = TeacherTopK(teacher.ids, teacher.log_probs.float(), teacher.temperature)
    leaf = case.student_logits.detach().float().requires_grad_()
    less = found(case, leaf, **{**options, "teacher": single})
    assert counted[taken:] == [True] * 3
    for one, other in zip(less, wanted, strict=True):
        assert one.dtype == torch.float32
        scale = float(other.abs().max())
        torch.testing.assert_close(one.double(), other, rtol=5e-5, atol=5e-6 * scale + 1e-7)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("k", [1, 4, 14])
@pytest.mark.parametrize("seed", range(3))
def test_value_metrics_and_gradient_are_those_of_torch(
    seed: int, k: int, name: str, monkeypatch: pytest.MonkeyPatch, counted: list[bool]
) -> None:
    case = make_case(seed)
    compare(case, stored_of(case.teacher_logits, k), monkeypatch, counted, **OPTIONS[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_of_real_text_and_weighted(
    name: str, monkeypatch: pytest.MonkeyPatch, counted: list[bool]
) -> None:
    case = real_case(1)
    weights = torch.linspace(0.1, 3.0, len(case.usable), dtype=torch.float64)
    given = {"chunk_weights": weights, "normalizer": 7.0, **OPTIONS[name]}
    # What W, of float32, leaves of a row is 1 less a sum in torch, and a sum here.
    compare(case, stored_of(case.teacher_logits, 20), monkeypatch, counted, rtol=1e-6, **given)


@pytest.mark.parametrize("taken_at", [2.5, 1.0])
def test_at_another_temperature(
    taken_at: float, monkeypatch: pytest.MonkeyPatch, counted: list[bool]
) -> None:
    case = make_case(3)
    teacher = stored_of(case.teacher_logits, 5, temperature=taken_at)
    compare(case, teacher, monkeypatch, counted, temperature=2.5)
    tail = {"tail_bucket": True, "temperature": taken_at}
    compare(case, teacher, monkeypatch, counted, **tail)


@pytest.mark.parametrize("name", ["kept alone", "tail", "fewer than stored"])
@pytest.mark.parametrize("reached", [False, True])
def test_with_stops_folded(
    reached: bool, name: str, monkeypatch: pytest.MonkeyPatch, counted: list[bool]
) -> None:
    """Also where the stop that moves is itself a column of W: it counts once, and is not kept."""
    case = make_case(2)
    supported = case.projection.supported.nonzero().flatten().tolist()
    sources = supported[3:5] if reached else (~case.projection.supported).nonzero().flatten()
    pair = pair_of(case.projection)
    pair.stop_fold = StopFold(list(sources), [supported[1]] * len(sources))
    for k in (3, 9, 14):
        teacher = stored_of(case.teacher_logits, k)
        compare(replace(case, pair=pair), teacher, monkeypatch, counted, **OPTIONS[name])


@pytest.mark.parametrize("name", ["kept alone", "tail"])
def test_rows_that_need_log_space_are_left_to_torch(
    name: str, monkeypatch: pytest.MonkeyPatch, counted: list[bool]
) -> None:
    case = make_case(5, scale=3.0, chunks=12)
    logits = case.student_logits.detach().clone()
    logits[0, ::2, ::3] -= 900.0  # underflows in float64 too
    logits[1, 1] = -torch.inf
    logits[1, 1, 2] = 0.5
    teacher = stored_of(case.teacher_logits, 4)
    case = replace(case, student_logits=logits)
    compare(case, teacher, monkeypatch, counted, **OPTIONS[name])


def test_rows_that_say_nothing_and_rows_that_say_all(
    monkeypatch: pytest.MonkeyPatch, counted: list[bool]
) -> None:
    """Ids that W does not reach, ids beyond the vocabulary, and one entry with all mass."""
    case = make_case(4)
    teacher = stored_of(case.teacher_logits, 4, padded=False)
    ids, log_probs = teacher.ids.clone(), teacher.log_probs.clone()
    unreached = (~case.projection.supported).nonzero().flatten()
    ids[:, ::4] = torch.tensor([int(unreached[0]), case.v_t, case.v_t + 1, 10**9])
    log_probs[:, 1::4] = torch.tensor([0.0, -40.0, -50.0, -60.0], dtype=torch.float64)
    teacher = TeacherTopK(ids, log_probs, validate=False)
    monkeypatch.setattr("xtoken.losses.engine.teacher_rows._check_vocabulary", lambda *_: None)
    for name in ("kept alone", "tail"):
        compare(case, teacher, monkeypatch, counted, **OPTIONS[name])


def test_a_chunk_that_keeps_every_column_has_no_tail(
    monkeypatch: pytest.MonkeyPatch, counted: list[bool]
) -> None:
    case = make_case(1)
    ids = [i % case.v_t for i in range(case.v_s)]
    w = SparseProjection.from_csr(range(case.v_s + 1), ids, np.ones(case.v_s), (case.v_s, case.v_t))
    teacher = stored_of(case.teacher_logits[..., : case.v_t], case.v_t)
    case = replace(case, pair=w_alone(w))
    compare(case, teacher, monkeypatch, counted, tail_bucket="auto")


def test_half_precision_of_what_is_stored(counted: list[bool]) -> None:
    case = make_case(1, dtype=torch.float32)
    stored = stored_of(case.teacher_logits, 4)
    half = TeacherTopK(stored.ids, stored.log_probs.half(), validate=False)
    same = TeacherTopK(stored.ids, stored.log_probs.half().float(), validate=False)
    leaf = case.student_logits
    for one, other in zip(
        found(case, leaf, teacher=half), found(case, leaf, teacher=same), strict=True
    ):
        assert torch.equal(one, other)
    assert counted == [True, True]


def test_what_the_core_has_no_form_of_is_torch(counted: list[bool]) -> None:
    case = make_case(1)
    stored = stored_of(case.teacher_logits, 4)
    learnable = SparseProjection.from_csr(
        *random_csr(np.random.default_rng(0), case.v_s, case.v_t), learnable=True
    )
    single = TeacherTopK(stored.ids, stored.log_probs.float())
    leaf, wide = case.student_logits, case.student_logits.detach().clone()
    for given in (
        {"full_metrics": True}, {"direction": "reverse"}, {"top_k": 2, "top_k_by": "student"},
        {"top_k": 3, "top_k_scope": "microbatch"}, {"teacher": single},
        {"pair": w_alone(learnable)}, {"student": leaf.bfloat16()},
        {"student": wide.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()},
    ):  # fmt: skip
        case.loss("p-kl", **{"teacher": stored, **given}).loss.backward()
    with torch.no_grad():
        case.loss("p-kl", teacher=stored, pair=w_alone(learnable))
    assert counted
    assert not any(counted)


@pytest.mark.parametrize("stored", [False, True])
def test_a_w_that_changes_is_read_again(stored: bool, counted: list[bool]) -> None:
    case = make_case(2)
    teacher = stored_of(case.teacher_logits, 4) if stored else case.teacher_logits
    other = copy.deepcopy(case.projection)
    counts = other.indptr.diff()
    other.weights.copy_(1.0 / counts[other.row_of])
    wanted = case.loss("p-kl", teacher=teacher, pair=w_alone(other)).loss
    pair = w_alone(copy.deepcopy(case.projection))
    before = case.loss("p-kl", teacher=teacher, pair=pair).loss
    assert abs(float((before - wanted).detach())) > 1e-3
    pair.projection.load_state_dict(other.state_dict())
    torch.testing.assert_close(case.loss("p-kl", teacher=teacher, pair=pair).loss, wanted)
    copy.deepcopy(pair)  # what the core made does not go with it
    assert counted == [True] * 3


PREFIX = {
    "tail": {"tail_bucket": "auto"},
    "kept alone": {},
    "no mirror": {"mirror": False},
    "depths": {"tail_bucket": "auto", "depth_weights": (0.5, 2.0, 0.25)},
}


def of_prefixes(case: PrefixCase, student: Any, leaf: Tensor, **options: Any) -> Any:
    teacher = stored_of(case.batch.teacher_logits.to(leaf.dtype), 5)
    output = loss_of(
        "prefix-kl", student, teacher, case.batch.usable, case.pair, **case.ids(), **options
    )
    (gradient,) = torch.autograd.grad(3 * output.loss, leaf)
    return output.loss.detach(), gradient, *output.metrics.values()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", PREFIX)
@pytest.mark.parametrize("seed", range(3))
def test_prefix_kl_is_that_of_torch(
    seed: int, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, counted: list[bool]
) -> None:
    case = make_prefix_case(seed, batch=3, chunks=20)
    if seed == 2:  # rows that the core leaves to torch
        with torch.no_grad():
            case.batch.student_logits[0, ::2, ::3] -= 900.0
    given = {"chunk_weights": torch.linspace(0.1, 2.0, len(case.batch.usable)), **PREFIX[name]}
    leaf = case.batch.student_logits.detach().to(dtype).requires_grad_()
    mine = of_prefixes(case, leaf, leaf, **given)
    assert counted == [True]
    wanted = by_torch(monkeypatch, lambda: of_prefixes(case, leaf, leaf, **given))
    tolerance = 1e-6 if dtype == torch.float64 else 5e-5
    torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance / 10)


def test_both_losses_add_to_a_shared_gradient(
    monkeypatch: pytest.MonkeyPatch, counted: list[bool]
) -> None:
    case = make_prefix_case(4, batch=3, chunks=12)
    batch = case.batch
    teacher = stored_of(batch.teacher_logits, 5)

    def both() -> Tensor:
        leaf = batch.student_logits.detach().clone().requires_grad_()
        student = SharedLogits.of(leaf)
        given = (student, teacher, batch.usable, case.pair)
        first = loss_of("prefix-kl", *given, tail_bucket="auto", **case.ids()).loss
        later = loss_of("prefix-kl", *given, **case.ids()).loss
        ce = cross_entropy(
            student, batch.student_ids, batch.student_mask, vocab_size=batch.v_s
        ).loss
        (2 * first + later + ce).backward()
        assert leaf.grad is not None
        return leaf.grad

    mine = both()
    assert counted == [True] * 3
    torch.testing.assert_close(mine, by_torch(monkeypatch, both), rtol=1e-6, atol=1e-9)


def test_arrays_that_do_not_fit_are_refused() -> None:
    w = np.array([0, 1]), np.array([0, 1, 2]), np.array([1.0, 1.0])
    given = {"empty": np.zeros(0, np.int64), "size": 2, "single": False}
    core = _core.StoredForwardKL(*w, places=np.array([0, 1, -1]), **given)
    rows, logits, logs = np.array([0, 1]), np.zeros((3, 2)), np.full((3, 2), -1.0)
    ids = np.array([[0, 1], [2, -5], [7, 1]])
    more = {
        "temperature": 1.0, "factor": 1.0, "top_k": 2, "tail": (1e-9, None), "whole": True,
        "gradient": None, "adds": False, "threads": 1,
    }  # fmt: skip
    # The student has no mass beside both columns, and all of it beside none.
    assert core.run(logits, ids, logs, rows, rows, np.ones(2), **more)[0].tolist() == [False, True]
    seeds = np.ones(2)
    wrong = (
        lambda: core.run(logits, ids, logs, rows + 2, rows, seeds, **more),
        lambda: core.run(logits, ids, logs, rows, rows - 1, seeds, **more),
        lambda: core.run(logits, ids[:2], logs, rows, rows, seeds, **more),
        lambda: core.run(logits, ids, logs, rows, rows, np.ones(3), **more),
        lambda: core.run(logits[:, :1].copy(), ids, logs, rows, rows, seeds, **more),
        lambda: core.run(logits, ids, logs, rows * 0, rows, seeds, **more | {"gradient": +logits}),
        lambda: _core.StoredForwardKL(*w, places=np.array([2]), **given),
        lambda: _core.StoredForwardKL(*w, places=np.array([0]), **given | {"size": 1}),
    )
    for call in wrong:
        with pytest.raises(XTokenError):
            call()
