"""The counted bytes are those that the kernels touch: every address that the interpreter sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from xtoken.losses import (
    LossInputs,
    LossOptions,
    PairParts,
    SharedLogits,
    TeacherTopK,
    cross_entropy,
)
from xtoken.losses.engine.row_blocks import run_blocks
from xtoken.losses.engine.student_rows import LogitRows
from xtoken.losses.exact_kl.block import ExactKLBlocks
from xtoken.losses.kernels import self_check, traffic
from xtoken.losses.kernels.choice import forced
from xtoken.losses.p_kl.loss import p_kl
from xtoken.losses.same_vocab_kl import same_vocab_kl
from xtoken.tensors.chunks import ChunkBatch

SIZE, WIDTH, ROWS = 1531, 1537, 5


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Bytes by kernel, each address once a launch; a row that `largest` reads, each time."""
    found: dict[str, float] = {}
    seen: dict[tuple[bool, int], int] = {}
    current = [""]

    def note(pointers: Any, mask: Any, stores: bool) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data[mask.data.astype(bool)].ravel()
        if current[0] == "largest" and size == 2:
            found["largest"] = found.get("largest", 0) + size * len(addresses)
            return
        for address in np.unique(addresses).tolist():
            seen[stores, address] = size

    builder = interpreter.InterpreterBuilder
    for name, at in (("create_masked_load", False), ("create_masked_store", True)):
        before = getattr(builder, name)

        def call(self: Any, pointers: Any, *given: Any, _do: Any = before, _at: bool = at) -> Any:
            note(pointers, given[1] if _at else given[0], _at)
            return _do(self, pointers, *given)

        monkeypatch.setattr(builder, name, call)
    add = builder.create_atomic_rmw

    def atomic(self: Any, kind: Any, pointers: Any, value: Any, mask: Any, *given: Any) -> Any:
        for stores in (False, True):
            note(pointers, mask, stores)
        return add(self, kind, pointers, value, mask, *given)

    monkeypatch.setattr(builder, "create_atomic_rmw", atomic)
    run = interpreter.InterpretedFunction.run

    def launch(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        current[0] = self.fn.__name__
        seen.clear()
        answer = run(self, *arguments, grid=grid, warmup=warmup, **named)
        found[current[0]] = found.get(current[0], 0) + sum(seen.values())
        return answer

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", launch)
    return found


def chunks() -> ChunkBatch:
    return ChunkBatch.from_mask(torch.arange(ROWS + 1)[None] > 0)


def compare(found: dict[str, float], counted: dict[str, float], names: dict[str, str]) -> None:
    """But for the parts and offsets of rows, which are not counted and much of so short rows."""
    for name, expected in counted.items():
        touched = found[names.get(name, name)] / ROWS
        assert touched == pytest.approx(expected, rel=0.08, abs=150), name


SIZES = traffic.Sizes(SIZE, SIZE, WIDTH, rows=ROWS)


def test_same_vocab_kl(touched: dict[str, float]) -> None:
    logits = self_check.some_logits(torch.bfloat16, torch.device("cpu"), 0).requires_grad_()
    with forced("triton"):
        inputs = LossInputs(logits, logits.detach().clone(), chunks())
        same_vocab_kl(inputs, PairParts((SIZE, SIZE))).loss.backward()
    compare(touched, traffic.same_vocab_bytes(SIZES), {})


@pytest.mark.parametrize(
    ("kept", "scope", "options"),
    [
        (None, "chunk", {}),
        (100, "chunk", {"top_k": 100}),
        (100, "chunk", {"top_k": 100, "tail_bucket": True}),
        (100, "microbatch", {"top_k": 100, "top_k_scope": "microbatch"}),
        (100, "stored", {"tail_bucket": True}),
    ],
    ids=str,
)
def test_p_kl(
    kept: int | None, scope: traffic.Scope, options: dict[str, Any], touched: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    device = torch.device("cpu")
    projection = self_check._some_w()
    logits = self_check.some_logits(torch.bfloat16, device, 0).requires_grad_()
    signal: Any = self_check.some_logits(torch.bfloat16, device, 2)
    if scope == "stored":
        best = signal[..., projection.supported_ids].topk(100)
        ids = projection.supported_ids[best.indices]
        signal = TeacherTopK(ids, best.values.float() - 20.0, vocab_size=SIZE)
    with forced("triton"):
        inputs = LossInputs(logits, signal, chunks())
        p_kl(
            inputs, PairParts((SIZE, SIZE), projection=projection), LossOptions(**options)
        ).loss.backward()
    w = traffic.Nonzeros.of(projection)
    counted = traffic.p_kl_bytes(SIZES, w, kept, scope, tail="tail_bucket" in options)
    counted.pop("column_mass", None)  # of 64 rows together, more than there are here
    counted.pop("zeros", None)  # by torch
    columns = "columns_of_list" if scope == "stored" else "columns_of_logits"
    compare(touched, counted, {"columns": columns})


def test_a_row_that_cross_entropy_has_too(touched: dict[str, float]) -> None:
    projection = self_check._some_w()
    logits = self_check.some_logits(torch.bfloat16, torch.device("cpu"), 0).requires_grad_()
    signal = self_check.some_logits(torch.bfloat16, torch.device("cpu"), 2)
    ids = torch.zeros(1, ROWS + 1, dtype=torch.int64)
    with forced("triton"):
        student = SharedLogits.of(logits)
        ce = cross_entropy(student, ids, ids == 0, vocab_size=SIZE).loss
        inputs = LossInputs(student, signal, chunks())
        kd = p_kl(inputs, PairParts((SIZE, SIZE), projection=projection)).loss
        (0.5 * kd + ce).backward()
    counted = traffic.p_kl_bytes(SIZES, traffic.Nonzeros.of(projection))
    # Both have kernels of the name `gradient`; that of cross-entropy finds nothing to do.
    compare(touched, counted, {"columns": "columns_of_logits"})
    compare(touched, traffic.cross_entropy_bytes(SIZES, "joined"), {})
    assert touched["scale_unless_one"] < 8


@pytest.mark.parametrize("weights", [None, (1.0,)])
def test_exact_kl(weights: tuple[float, ...] | None, touched: dict[str, float]) -> None:
    targets = self_check.some_targets()
    logits = self_check.some_logits(torch.bfloat16, torch.device("cpu"), 0)
    loss = ExactKLBlocks(targets=targets, depth_weights=weights)
    with forced("triton"), torch.no_grad():
        run_blocks(loss, LogitRows(logits, SIZE), 1.0, 64, (True,))
    a_position = len(targets.probs) / ROWS, len(targets.tokens) / ROWS
    counted = traffic.exact_bytes(SIZES, *a_position, by_depth=weights is not None)
    compare(touched, counted, {})


@pytest.mark.parametrize("way", ["alone", "added"])
def test_cross_entropy(way: traffic.Way, touched: dict[str, float]) -> None:
    logits = self_check.some_logits(torch.bfloat16, torch.device("cpu"), 0).requires_grad_()
    ids = torch.zeros(1, ROWS + 1, dtype=torch.int64)
    with forced("triton"):
        student = logits if way == "alone" else SharedLogits.of(logits)
        cross_entropy(student, ids, ids == 0, vocab_size=SIZE).loss.backward()
    compare(touched, traffic.cross_entropy_bytes(SIZES, way), {})


def test_the_figures() -> None:
    """Llama-3 128,256 wide and Qwen 151,936 wide, bfloat16, W of the pair as it was built; what
    docs and OPTIMIZATIONS.md say of kernels."""
    sizes = traffic.Sizes(128_000, 151_643, 128_256)
    w = traffic.Nonzeros(25_450, 104_251, 5_576, 49_199, 104_251, 23_945)
    first = traffic.Nonzeros(0, 106_192, 3_507, 21_808, 106_192, 21_808)
    prefixes = traffic.Prefixes(slots=7.1, tokens=10.5, first_tokens=10.5, mirrored=0.0)

    def ratio(counted: dict[str, float]) -> float:
        return round(sum(counted.values()) / sizes.floor, 2)

    assert round(sizes.floor) == 815_798
    assert ratio(traffic.p_kl_bytes(sizes, w)) == 1.69
    assert ratio(traffic.p_kl_bytes(sizes, w, 8192)) == 2.06
    assert ratio(traffic.p_kl_bytes(sizes, w, 8192, tail=True)) == 2.43
    assert ratio(traffic.p_kl_bytes(sizes, w, 8192, "microbatch")) == 1.6

    def megabytes(counted: dict[str, float], way: traffic.Way) -> float:
        both = [*counted.values(), *traffic.cross_entropy_bytes(sizes, way).values()]
        return round(sum(both) / 1e6, 2)

    kds = traffic.p_kl_bytes(sizes, w), traffic.exact_bytes(sizes, 300, 1500)
    assert [megabytes(kd, "added") for kd in kds] == [2.41, 1.94]
    assert [megabytes(kd, "joined") for kd in kds] == [1.64, 1.17]
    root = traffic.p_kl_bytes(sizes, first)
    assert ratio(traffic.prefix_bytes(sizes, root, prefixes)) == 1.65
    mirrored = traffic.Prefixes(slots=7.1, tokens=10.5, first_tokens=10.5, mirrored=0.26)
    assert ratio(traffic.prefix_bytes(sizes, root, mirrored)) == 2.0
