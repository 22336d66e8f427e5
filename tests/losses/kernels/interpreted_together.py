"""A loss and cross-entropy in one write, in Triton's interpreter: against float64, by writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from exact_kl_cases import V, laid_out, random_targets, student
from exact_kl_cases import loss_of as exact_loss
from fast_interpreter import nothing_remembered
from interpreted_p_kl import case_of, dense_of
from kernel_cases import DTYPES, close, gradient_of, kernels, small_blocks, strided
from losses.test_prefix_kl import loss_of as prefix_loss
from prefix_cases import make_prefix_case
from torch import Tensor
from triton.runtime import interpreter

from xtoken.losses import PairParts, SharedLogits, TeacherTopK, balance, cross_entropy
from xtoken.losses.kernels.choice import forced
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.host import blind

from reference_losses import cross_entropy as entropy_reference
from reference_losses import p_kl as p_kl_reference

__all__ = ["small_blocks"]
pytestmark = pytest.mark.usefixtures("small_blocks")

# A loss of the student's logits, those logits, V_s, the kernels taken.
Made = tuple[Callable[[Any], Tensor], Tensor, int, set[str]]

P_KL: dict[str, dict[str, Any]] = {
    "all": {},
    "all, tail": {"tail_bucket": True, "temperature": 1.5},
    "chunk, tail": {"top_k": 5, "tail_bucket": True},
    "micro-batch": {"top_k": 7, "top_k_scope": "microbatch", "temperature": 0.7},
    "stored, tail": {"tail_bucket": True},
}
NAMES = [*(f"p-kl, {name}" for name in P_KL), "exact-kl", "same-vocab-kl", "prefix-kl"]


def made(name: str, dtype: torch.dtype = torch.float32) -> Made:
    if name.startswith("p-kl"):
        case, options = case_of(dtype), P_KL[name[6:]]
        if "stored" in name:
            stored = TeacherTopK.from_logits(case.teacher_logits, 6, vocab_size=37)
            case = replace(case, teacher_logits=stored)
        return (
            lambda s: case.loss("p-kl", student=s, **options).loss, case.student_logits, 40,
            {"p-kl"},
        )  # fmt: skip
    if name == "exact-kl":
        targets, tokens = random_targets(1)
        batch = laid_out(targets, tokens)
        logits = student(1).detach().to(dtype).requires_grad_()
        return lambda s: exact_loss(s, targets, batch).loss, logits, V, {name}
    if name == "prefix-kl":
        prefixes = make_prefix_case(1, batch=2, chunks=8, dtype=dtype)
        logits = prefixes.batch.student_logits
        return lambda s: prefix_loss(prefixes, logits=s).loss, logits, 16, {name, "p-kl"}
    case = case_of(dtype)
    teacher = case.student_logits.detach().roll(1, 1)
    chunks = ChunkBatch.from_mask(torch.arange(teacher.shape[1])[None] % 3 > 0)

    def loss(s: Any) -> Tensor:
        return case.loss(
            name, student=s, teacher=teacher, pair=PairParts((40, 40)), chunks=chunks,
            temperature=1.5,
        ).loss  # fmt: skip

    return loss, case.student_logits, 40, {name}


def tokens(logits: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Ids that ignore what does not count, and the mask: rows of either loss, of both, of none."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, size, logits.shape[:2], generator=generator)
    mask = torch.rand(logits.shape[:2], generator=generator) < 0.6
    return ids.masked_fill(~mask, -100), mask


def weighed(way: str, kd: Tensor, ce: Tensor) -> Tensor:
    return {
        "weighted": lambda: 0.5 * ce + 3.0 * kd,
        "balanced": lambda: balance(kd, ce) * kd + ce,
        "kd alone": lambda: kd,
        "ce alone": lambda: 2.0 * ce,
    }[way]()


def together(name: str, way: str, dtype: torch.dtype, *, unseen: bool = False, again: bool = False):
    """Gradient by kernels, and that of torch in float64 of each loss apart."""
    loss, logits, size, names = made(name, dtype)
    ids, mask = tokens(logits, size)
    with torch.no_grad():
        if unseen and name == "same-vocab-kl":  # its padding may hold anything
            logits[0, -1] = torch.nan
    leaf = strided(logits).requires_grad_()
    taken = {*names, "cross-entropy", "the gradient's factor"}
    with kernels(*taken):
        shared = SharedLogits.of(leaf)
        with blind() if unseen else forced("triton"):
            ce = cross_entropy(shared, ids, mask, vocab_size=size).loss
        total = weighed(way, loss(shared), ce)
        (grad,) = torch.autograd.grad(total, leaf, retain_graph=again)
        if again:
            (grad,) = torch.autograd.grad(total, leaf)
    doubles = leaf.detach().double().nan_to_num().requires_grad_()
    with forced("torch"):
        ce = entropy_reference(doubles, ids, mask, size) / max(int(mask[:, 1:].sum()), 1)
        expected = gradient_of(weighed(way, loss(doubles), ce), doubles)
    assert grad.is_contiguous()
    return grad, expected


@pytest.mark.parametrize(
    ("dtype", "way"), list(zip(DTYPES, ["balanced", "weighted", "balanced"], strict=True))
)
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_both(name: str, dtype: torch.dtype, way: str) -> None:
    grad, expected = together(name, way, dtype)
    close(grad, expected, dtype, writes=3 if name == "prefix-kl" else 1)


def test_against_the_loop_over_columns() -> None:
    case = case_of(torch.bfloat16)
    ids, mask = tokens(case.student_logits, 40)
    with kernels("p-kl", "cross-entropy", "the gradient's factor"):
        shared = SharedLogits.of(case.student_logits)
        kd = case.loss("p-kl", student=shared).loss
        total = 3.0 * kd + 0.5 * cross_entropy(shared, ids, mask, vocab_size=40).loss
        grad = gradient_of(total, case.student_logits)
    doubles = case.student_logits.detach().double().requires_grad_()
    kd = p_kl_reference(
        doubles, case.teacher_logits.double(), dense_of(case.projection), case.usable
    )
    ce = entropy_reference(doubles, ids, mask, 40) / int(mask[:, 1:].sum())
    expected = 3.0 * kd / len(case.usable) + 0.5 * ce
    close(total, expected, torch.float32)
    close(grad, gradient_of(expected, doubles), torch.bfloat16)


@pytest.mark.parametrize("name", ["p-kl, chunk, tail", "prefix-kl"])
def test_the_faster_interpreter_is_that_of_triton(name: str) -> None:
    grad, _ = together(name, "weighted", torch.bfloat16)
    with nothing_remembered():
        expected, _ = together(name, "weighted", torch.bfloat16)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_cross_entropy_over_the_padding_too(name: str) -> None:
    """Without `vocab_size` it counts the columns past the vocabulary, which the loss leaves out."""
    loss, logits, size, _ = made(name)
    width = logits.shape[-1]
    assert width > size
    ids, mask = tokens(logits, width)
    grads = []
    for mode in ("torch", "triton"):
        with forced(mode):
            shared = SharedLogits.of(logits) if mode == "triton" else logits
            ce = cross_entropy(shared, ids, mask).loss
            grads.append(gradient_of(3.0 * loss(shared) + ce, logits))
    close(grads[1], grads[0], torch.float32, writes=3)


@pytest.mark.parametrize("way", ["kd alone", "ce alone"])
@pytest.mark.parametrize("name", ["p-kl, all", "exact-kl"])
def test_what_backward_does_not_reach_is_not_there(name: str, way: str) -> None:
    loss, logits, size, _ = made(name)
    ids, mask = tokens(logits, size)
    grads = []
    for mode in ("torch", "triton"):
        with forced(mode):
            shared = SharedLogits.of(logits) if mode == "triton" else logits
            ce = cross_entropy(shared, ids, mask, vocab_size=size).loss
            grads.append(gradient_of(weighed(way, loss(shared), ce), logits))
    close(grads[1], grads[0], torch.float32)


@pytest.mark.parametrize("name", ["p-kl, chunk, tail", "exact-kl", "prefix-kl"])
def test_a_second_backward(name: str) -> None:
    grad, expected = together(name, "weighted", torch.float32, again=True)
    close(grad, expected, torch.float32)


def test_rows_that_nobody_counted_and_that_are_no_numbers() -> None:
    """Where nobody looks at the mask all rows are computed, and padding may hold anything."""
    grad, expected = together("same-vocab-kl", "balanced", torch.bfloat16, unseen=True)
    assert torch.equal(grad[0, -1], torch.zeros_like(grad[0, -1]))
    close(grad, expected, torch.bfloat16)


def test_a_gradient_that_is_not_finite_is_told() -> None:
    """A token on an empty row of W, which P-KL's value does not read, in a row of P-KL alone."""
    case = case_of()
    token = int(case.projection.empty_ids[0])
    row = case.usable.range_of("student")[0][0] - 1
    with torch.no_grad():
        case.student_logits[0, row, token] = torch.nan
    ids = torch.zeros(case.student_logits.shape[:2], dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    with forced("triton"):
        shared = SharedLogits.of(case.student_logits)
        ce = cross_entropy(shared, ids, mask, vocab_size=40).loss
        grad = gradient_of(case.loss("p-kl", student=shared).loss + ce, case.student_logits)
    assert torch.isnan(grad).all()


@pytest.fixture
def accesses(monkeypatch: pytest.MonkeyPatch) -> dict[bool, list[np.ndarray]]:
    """Addresses that kernels load (False) and store (True)."""
    found: dict[bool, list[np.ndarray]] = {False: [], True: []}
    builder = interpreter.InterpreterBuilder
    for name, stores in (("create_masked_load", False), ("create_masked_store", True)):
        before = getattr(builder, name)

        def call(self: Any, pointers: Any, *given: Any, _do: Any = before, _at: bool = stores):
            mask = given[1] if _at else given[0]
            found[_at].append(pointers.data[mask.data.astype(bool)].ravel().copy())
            return _do(self, pointers, *given)

        monkeypatch.setattr(builder, name, call)
    return found


def times_touched(grad: Tensor, addresses: list[np.ndarray]) -> np.ndarray:
    """How often each number of a gradient."""
    at = np.concatenate(addresses).astype(np.int64) - grad.data_ptr()
    at = at[(at >= 0) & (at < grad.nbytes)] // grad.element_size()
    return np.bincount(at, minlength=grad.numel())


@pytest.mark.parametrize("name", NAMES)
def test_each_number_of_the_gradient_is_written_once_and_never_read(
    name: str, accesses: dict[bool, list[np.ndarray]]
) -> None:
    loss, logits, size, _ = made(name, torch.bfloat16)
    ids, mask = tokens(logits, size)
    with forced("triton"):
        shared = SharedLogits.of(logits)
        ce = cross_entropy(shared, ids, mask, vocab_size=size).loss
        kd = loss(shared)
        grad = gradient_of(balance(kd, ce) * kd + ce, logits)
    written, read = (times_touched(grad, accesses[stores]) for stores in (True, False))
    # Prefixes are added where the root and the cross-entropy are.
    assert ((written - read) == 1).all()
    assert (written == 1).all() or name == "prefix-kl"
