"""Each kernel is compared with torch where it is first used, and one that differs is not used."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

from xtoken.errors import KernelWarning, OptionError
from xtoken.losses.kernels import choice, scaling, self_check
from xtoken.losses.kernels.device import (
    common,
    cross_entropy,
    exact,
    p_kl,
    prefix,
    same_vocab,
    top_k,
)

CPU = torch.device("cpu")
LOGITS = torch.zeros(1, 2, 3, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_found", {})


@pytest.mark.parametrize(
    "check",
    [
        self_check.same_vocab,
        self_check.exact,
        self_check.p_kl,
        self_check.prefix_kl,
        self_check.cross_entropy,
        scaling.check,
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_kernels_pass(check: choice.Check, dtype: torch.dtype) -> None:
    assert check(CPU, dtype, torch.float32) is None


@pytest.mark.parametrize(
    ("check", "module", "kernel", "expected"),
    [
        (self_check.same_vocab, same_vocab, "gradient", "the gradient is off by"),
        (self_check.same_vocab, same_vocab, "together", "the loss is off by"),
        (self_check.exact, exact, "tail_gradient", "the gradient is off by"),
        (self_check.exact, exact, "group_gradient", "the gradient is off by"),
        (self_check.exact, exact, "mark", "the loss is off by"),
        (self_check.p_kl, p_kl, "shared_columns", "is off by"),
        (self_check.p_kl, p_kl, "student_sums", "is off by"),
        (self_check.p_kl, p_kl, "gradient", "is off by"),
        (self_check.p_kl, p_kl, "mark", "is off by"),
        (self_check.prefix_kl, prefix, "items", "is off by"),
        (self_check.prefix_kl, prefix, "gradient", "the gradient is off by"),
        (self_check.prefix_kl, exact, "tail_gradient", "the gradient is off by"),
        (self_check.cross_entropy, cross_entropy, "losses", "the loss is off by"),
        (self_check.cross_entropy, cross_entropy, "gradient", "the gradient is off by"),
        (self_check.p_kl, top_k, "largest", "is off by"),
        (self_check.p_kl, cross_entropy, "losses", "the gradient is off by"),
        (self_check.p_kl, cross_entropy, "gradient", "the gradient is off by"),
        (self_check.exact, cross_entropy, "gradient", "the gradient is off by"),
    ],
)
def test_a_kernel_that_computes_something_else_is_noticed(
    check: choice.Check, module: object, kernel: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its launch does nothing, and what it should have written is what memory held.
    monkeypatch.setattr(torch, "empty", torch.zeros)
    monkeypatch.setattr(module, kernel, Ignored())
    assert expected in str(check(CPU, torch.float32, torch.float32))


def test_a_factor_that_is_not_applied_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "scale_unless_one", Ignored())
    assert (
        scaling.check(CPU, torch.float32, torch.float32)
        == "values are not 0.25 times what they were"
    )


class Ignored:
    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **named: None


def test_the_first_use_warns_and_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def check(device: torch.device, student: torch.dtype, teacher: torch.dtype) -> str | None:
        calls.append((student, teacher))
        return "the gradient is off by 0.3 of its largest value"

    monkeypatch.setattr(choice, "_unusable", lambda device: None)
    monkeypatch.setenv(choice.VARIABLE, "triton")
    for _ in range(2):
        with pytest.raises(OptionError, match="failed its self-check on cpu: the gradient is off"):
            choice.takes("p-kl", check, LOGITS)
    assert calls == [(torch.bfloat16, torch.bfloat16)]
    assert choice.takes("p-kl", lambda *given: None, LOGITS.float())
    assert not choice.takes("p-kl", check, LOGITS.double())


def test_auto_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_runs_here", lambda device, wanted: True)
    monkeypatch.delenv(choice.VARIABLE, raising=False)

    def broken(device: torch.device, student: torch.dtype, teacher: torch.dtype) -> str | None:
        raise RuntimeError("ptxas fatal\nmore")

    told = "exact-kl failed its self-check on cpu with RuntimeError: ptxas fatal; torch computes"
    with pytest.warns(KernelWarning, match=told):
        assert not choice.takes("exact-kl", broken, LOGITS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not choice.takes("exact-kl", broken, LOGITS)


def test_an_unknown_release_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_runs_here", lambda device, wanted: True)
    monkeypatch.setattr(choice.importlib.metadata, "version", lambda name: "4.1.0")
    with pytest.warns(KernelWarning, match="Triton 4.1.0 is not among the releases known"):
        assert not choice.takes("p-kl", lambda *given: None, LOGITS)


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, "torch")
    assert not choice.takes("p-kl", self_check.same_vocab, LOGITS)
    monkeypatch.setenv(choice.VARIABLE, "auto")
    assert not choice.takes("p-kl", self_check.same_vocab, LOGITS)  # on a CPU
    monkeypatch.setenv(choice.VARIABLE, "cuda")
    with pytest.raises(OptionError, match="XTOKEN_KERNELS = 'cuda', expected one of auto, torch"):
        choice.takes("p-kl", self_check.same_vocab, LOGITS)
