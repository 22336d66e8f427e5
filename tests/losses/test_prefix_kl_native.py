"""Prefix KL by the core is prefix KL by torch: values, metrics and gradients."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loss_cases import loss_of
from prefix_cases import PrefixCase, make_prefix_case
from torch import Tensor

from xtoken import _core
from xtoken.losses import SharedLogits, TeacherTopK, cross_entropy
from xtoken.losses.prefix_kl import block as prefix_kl_block
from xtoken.losses.prefix_kl import native

OPTIONS: dict[str, dict[str, object]] = {
    "all": {},
    "a chunk's best": {"top_k": 3},
    "a batch's": {"top_k": 3, "top_k_scope": "microbatch"},
    "a batch's, no mirror": {"top_k": 3, "top_k_scope": "microbatch", "mirror": False},
    "temperature and depths": {"temperature": 1.7, "depth_weights": (0.5, 2.0, 0.25)},
    "no mirror": {"mirror": False},
    "the root has no weight": {"depth_weights": (0.0, 1.0)},
    "no END": {"end": False},
    "no END, some mass": {"end": False, "min_mass": 0.05},
    "one depth": {"max_depth": 1},
    "stored": {"stored": 7},
    "stored, a tail": {"stored": 7, "tail_bucket": True},
    "stored, no END": {"stored": 4, "end": False, "min_mass": 0.02},
    "stored by temperature": {"stored": 7, "temperature": 1.3, "tail_bucket": True},
    "stored in half precision": {"stored": 7, "half": True},
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the core took each pass."""
    taken: list[bool] = []

    def spy(*given: Any) -> Any:
        found = native.native_prefix_pass(*given)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(prefix_kl_block, "native_prefix_pass", spy)
    return taken


@pytest.fixture
def below(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each call for what is below the roots: items, and those that it left to torch."""
    seen: list[tuple[int, int]] = []

    def spy(*given: Any, **named: Any) -> Any:
        answer = _core.prefix_kl_below(*given, **named)
        seen.append((len(answer[0]), int((~answer[0]).sum())))
        return answer

    monkeypatch.setattr(native, "_core", SimpleNamespace(prefix_kl_below=spy))
    return seen


def found(
    case: PrefixCase,
    student: Any,
    leaf: Tensor,
    *,
    stored: int | None = None,
    half: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    teacher: Tensor | TeacherTopK = case.batch.teacher_logits.to(leaf.dtype)
    if stored is not None:
        tau = options.get("temperature", 1.0)
        teacher = TeacherTopK.from_logits(teacher, stored, temperature=tau)
        if half:
            teacher = replace(teacher, log_probs=teacher.log_probs.to(torch.float16))
    output = loss_of(
        "prefix-kl", student, teacher, case.batch.usable, case.pair, **case.ids(), **options
    )
    (gradient,) = torch.autograd.grad(3 * output.loss, leaf)
    return output.loss.detach(), gradient, *output.metrics.values()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_value_metrics_and_gradient_are_those_of_torch(
    seed: int,
    name: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    counted: list[bool],
    below: list[tuple[int, int]],
) -> None:
    if OPTIONS[name].get("half") and dtype == torch.float64:
        pytest.skip("halves are read as float32")
    case = make_prefix_case(seed, batch=3, chunks=60)
    if seed == 2:  # rows that the core leaves to torch
        with torch.no_grad():
            case.batch.student_logits[:, :, ::3] -= 1500.0
    given = {"chunk_weights": torch.linspace(0.1, 2.0, len(case.batch.usable)), **OPTIONS[name]}
    leaf = case.batch.student_logits.detach().to(dtype).requires_grad_()
    mine = found(case, leaf, leaf, **given)
    assert counted == [True]
    items, left = (sum(numbers) for numbers in zip(*below, strict=True))
    assert len(below) == 1 + (OPTIONS[name].get("mirror", True) is True)
    assert items > 20
    assert (left > 0) == (seed == 2)
    monkeypatch.setattr(prefix_kl_block, "native_prefix_pass", lambda *_: None)
    wanted = found(case, leaf, leaf, **given)
    tolerance = 1e-9 if dtype == torch.float64 else 3e-5
    torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance / 10)


def test_it_adds_to_a_shared_gradient(monkeypatch: pytest.MonkeyPatch, counted: list[bool]) -> None:
    case = make_prefix_case(4, batch=3, chunks=12)

    def both() -> Tensor:
        leaf = case.batch.student_logits.detach().clone().requires_grad_()
        student = SharedLogits.of(leaf)
        kd = loss_of(
            "prefix-kl", student, case.batch.teacher_logits, case.batch.usable, case.pair,
            **case.ids(),
        ).loss  # fmt: skip
        ce = cross_entropy(
            student, case.batch.student_ids, case.batch.student_mask, vocab_size=case.batch.v_s
        ).loss
        (2 * kd + ce).backward()
        assert leaf.grad is not None
        return leaf.grad

    mine = both()
    assert any(counted)
    monkeypatch.setattr(prefix_kl_block, "native_prefix_pass", lambda *_: None)
    torch.testing.assert_close(mine, both(), rtol=1e-9, atol=1e-12)


def test_what_the_core_has_no_form_of_is_torch(counted: list[bool]) -> None:
    case = make_prefix_case(1)
    leaf = case.batch.student_logits
    for given in (
        {"direction": "reverse"}, {"top_k": 3, "tail_bucket": True}, {"full_metrics": True},
    ):  # fmt: skip
        found(case, leaf, leaf, **given)
    assert counted
    assert not any(counted)
