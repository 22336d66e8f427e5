"""No loss waits for a device: nothing that it does depends on a value in a tensor.

Proved without a GPU: fake tensors have shapes and no values, so a look at one raises. And with real
tensors: what a loss computes without looking is what it computes when it may look.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from byte_cases import make_byte_case, random_pair
from fake_devices import FAKE_DEVICES
from loss_cases import Case, make_case
from prefix_cases import make_prefix_case
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from xtoken.losses import (
    LOSSES,
    LmHead,
    LossInputs,
    LossOptions,
    LossOutput,
    PairParts,
    TeacherTopK,
    cross_entropy,
)
from xtoken.losses.engine.prepared import Prepared
from xtoken.losses.engine.student_rows import LogitRows
from xtoken.losses.prefix_kl.compared_prefixes import PreparedPrefixes, prepare_prefixes
from xtoken.tensors.host import blind

Move = Callable[[Tensor], Tensor]


def stored(case: Case) -> Case:
    """The case with its teacher's 5 best in place of logits."""
    best = TeacherTopK.from_logits(
        case.teacher_logits, 5, vocab_size=case.v_t, ids=case.teacher_ids
    )
    return replace(case, teacher_logits=best)


def prepared(loss: str, case: Case, options: LossOptions) -> PreparedPrefixes | Prepared | None:
    """What collation makes of the batch on the CPU."""
    assert case.usable.host.predicted
    prepare = LOSSES[loss].prepare_for(options)
    if prepare is not None:
        return prepare(case.pair, case.usable, case.student_ids, case.teacher_ids)
    if loss != "prefix-kl":
        return None
    return prepare_prefixes(
        case.pair.student_trie.trie, case.pair.teacher_trie.trie, case.usable,
        case.student_ids, case.teacher_ids, max_depth=options.max_depth, last_depth=options.end,
    )  # fmt: skip


def run(
    loss: str,
    case: Case,
    made: PreparedPrefixes | Prepared | None,
    options: LossOptions,
    move: Move,
    head: bool,
) -> tuple[LossOutput, Tensor]:
    """A loss of tensors that `move` makes of the case's; and what carries the gradient."""
    inputs, leaf = moved_inputs(case, made, move, head)
    return LOSSES[loss].function(inputs, moved_pair(case.pair, move), options), leaf


def moved_inputs(
    case: Case, made: PreparedPrefixes | Prepared | None, move: Move, head: bool
) -> tuple[LossInputs, Tensor]:
    """What a loss takes, of tensors that `move` makes of the case's."""
    teacher = case.teacher_logits
    if isinstance(teacher, TeacherTopK):
        teacher = TeacherTopK(
            move(teacher.ids), move(teacher.log_probs), teacher.temperature,
            move(teacher.token_log_probs), teacher.vocab_size, validate=False,
        )  # fmt: skip
    else:
        teacher = move(teacher)
    leaf = move(case.student_logits.detach()).requires_grad_()
    student: Tensor | LmHead = leaf
    if head:
        eye = torch.eye(case.student_logits.shape[-1], dtype=case.student_logits.dtype)
        student = LmHead(leaf, move(eye), scale=0.5, softcap=9.0)
    inputs = LossInputs(
        student, teacher, case.usable.mapped(move), move(case.student_ids),
        move(case.teacher_ids),
        prefixes=made.mapped(move) if isinstance(made, PreparedPrefixes) else None,
        prepared=made.mapped(move) if isinstance(made, Prepared) else None,
    )  # fmt: skip
    return inputs, leaf


def moved_pair(pair: PairParts, move: Move) -> PairParts:
    """The pair with moved buffers."""
    return moved_module(pair, move)


def moved_module(module: torch.nn.Module, move: Move) -> Any:
    twin = copy.copy(module)
    twin._buffers = {key: move(value) for key, value in module._buffers.items()}
    twin._parameters = dict(module._parameters)
    twin._modules = {
        name: None if part is None else moved_module(part, move)
        for name, part in module._modules.items()
    }
    if hasattr(twin, "_full"):
        twin._full = None
    return twin


CASES: dict[str, tuple[str, dict[str, object]]] = {
    "p_kl": ("p-kl", {}),
    "p_kl full metrics": ("p-kl", {"full_metrics": True, "top_k": 5, "top_k_scope": "microbatch"}),
    "p_kl chunk": ("p-kl", {"top_k": 3}),
    "p_kl chunk, tail": ("p-kl", {"top_k": 3, "tail_bucket": True}),
    "p_kl chunk, reverse": ("p-kl", {"top_k": 3, "direction": "reverse"}),
    "p_kl by the student": (
        "p-kl", {"top_k": 3, "top_k_by": "student", "direction": "reverse"}
    ),
    "p_kl stored, by the student": (
        "p-kl", {"stored": True, "top_k": 3, "top_k_by": "student", "tail_bucket": "auto"}
    ),
    "p_kl microbatch": ("p-kl", {"top_k": 5, "top_k_scope": "microbatch"}),
    "p_kl microbatch, tail": (
        "p-kl", {"top_k": 5, "top_k_scope": "microbatch", "tail_bucket": "auto"}
    ),
    "p_kl last": ("p-kl", {"merge": "last"}),
    "p_kl mean": ("p-kl", {"merge": "mean"}),
    "p_kl mean, in blocks": ("p-kl", {"merge": "mean", "block_size": 3}),
    "p_kl jsd": ("p-kl", {"direction": "jsd", "temperature": 2.0}),
    "p_kl stored": ("p-kl", {"stored": True}),
    "p_kl stored, tail": ("p-kl", {"stored": True, "tail_bucket": "auto"}),
    "p_kl head": ("p-kl", {"head": True}),
    "h_kl": ("h-kl", {}),
    "h_kl mean": ("h-kl", {"merge": "mean"}),
    "gold": ("gold", {}),
    "uld": ("uld", {}),
    "uld stored": ("uld", {"stored": True}),
    "same_vocab_kl": ("same-vocab-kl", {}),
    "same_vocab_kl stored": ("same-vocab-kl", {"stored": True, "tail_bucket": True}),
    "same_vocab_kl by the student": (
        "same-vocab-kl", {"top_k": 3, "top_k_by": "student", "direction": "reverse"}
    ),
    "alm": ("alm", {}),
    "alm, in blocks": ("alm", {"block_size": 2}),
    "alm stored": ("alm", {"stored": True}),
    "bpm": ("bpm", {}),
    "bpm, in blocks": ("bpm", {"block_size": 2, "mask_spaces": False}),
    "bpm jsd": ("bpm", {"direction": "jsd", "temperature": 2.0}),
    "bpm stored": ("bpm", {"stored": True}),
    "bpm head": ("bpm", {"head": True}),
    "escd": ("escd", {}),
    "escd, in blocks": ("escd", {"block_size": 2, "temperature": 2.0}),
    "escd stored": ("escd", {"stored": True}),
    "escd head": ("escd", {"head": True}),
    "strict_top_k": ("strict-top-k", {"student_top_k": 3}),
    "strict_top_k stored": ("strict-top-k", {"stored": True, "student_top_k": 2}),
    "strict_top_k head": ("strict-top-k", {"head": True}),
    "partition_kl": ("partition-kl", {}),
    "partition_kl, in blocks": ("partition-kl", {"block_size": 2, "mismatch_weight": 2.0}),
    "partition_kl jsd": ("partition-kl", {"direction": "jsd", "temperature": 2.0}),
    "partition_kl stored": ("partition-kl", {"stored": True}),
    "partition_kl head": ("partition-kl", {"head": True}),
    "prefix_kl": ("prefix-kl", {}),
    "prefix_kl, in blocks": ("prefix-kl", {"block_size": 3}),
    "prefix_kl reverse": ("prefix-kl", {"direction": "reverse"}),
    "prefix_kl no mirror": ("prefix-kl", {"mirror": False, "end": False}),
    "prefix_kl weights": ("prefix-kl", {"depth_weights": (1.0, 0.5), "max_depth": 2}),
    "prefix_kl microbatch": ("prefix-kl", {"top_k": 9, "top_k_scope": "microbatch"}),
    "prefix_kl microbatch, no mirror": (
        "prefix-kl", {"top_k": 9, "top_k_scope": "microbatch", "mirror": False}
    ),
    "p_kl cells": ("p-kl", {"cells": True, "consistent": True, "top_k": 4}),
    "p_kl cells, stored": (
        "p-kl", {"cells": True, "consistent": True, "stored": True, "tail_bucket": "auto"}
    ),
    "p_kl cells, microbatch": (
        "p-kl", {"cells": True, "consistent": True, "top_k": 4, "top_k_scope": "microbatch"}
    ),
    "p_kl cells alone": ("p-kl", {"cells": True, "head": True}),
    "prefix_kl stored, tail": ("prefix-kl", {"stored": True, "tail_bucket": "auto"}),
}  # fmt: skip

IN_MANY_BLOCKS = ("bpm, in blocks", "escd, in blocks", "partition_kl, in blocks")


def made(name: str, **given: object) -> tuple[str, Case, LossOptions, bool]:
    """Of a name in CASES: the loss, a batch, the options, and whether the student is a head."""
    loss, options = CASES[name]
    options = dict(options)
    if loss == "prefix-kl":
        found = make_prefix_case(3, chunks=12, **given)
        case = replace(found.batch, pair=found.pair)
    elif "cells" in options:
        case = make_byte_case(3, letters=40, **given).batch
        needs = {"projection", "cells"}
        case = replace(case, pair=PairParts.from_projection(random_pair(3, 14, 12)[2], needs=needs))
    elif LOSSES[loss].prepare_for(LossOptions()) is not None:
        case = make_byte_case(3, **given).batch
    else:
        case = make_case(3, **given)
    if loss == "same-vocab-kl":
        case = replace(case, pair=case.shared, v_t=case.shared.sizes[1])
    if options.pop("stored", False):
        case = stored(case)
    head = bool(options.pop("head", False))
    return loss, case, LossOptions(**options), head


@pytest.mark.parametrize("scale", [2.0, 300.0])
@pytest.mark.parametrize("name", CASES)
def test_without_looking_the_value_and_the_gradient_are_the_same(name: str, scale: float) -> None:
    loss, case, options, head = made(name, scale=scale)
    prefixes = prepared(loss, case, options)
    same: Move = lambda tensor: tensor  # noqa: E731
    wanted, leaf = run(loss, case, prefixes, options, same, head)
    (gradient,) = torch.autograd.grad(wanted.loss, leaf)
    with blind():
        found, leaf = run(loss, case, prefixes, options, same, head)
        (given,) = torch.autograd.grad(found.loss, leaf)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(given, gradient, rtol=1e-7, atol=1e-10)
    for key, value in wanted.metrics.items():
        torch.testing.assert_close(found.metrics[key], value, rtol=1e-6, atol=1e-8, msg=key)
    assert loss != "prefix-kl" or float(wanted.metrics["prefixes"]) > 0


@pytest.mark.parametrize("device", FAKE_DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_no_value_is_looked_at(name: str, device: str) -> None:
    # Operations on fakes are slow: a few blocks, one of them of a chunk longer than a block.
    texts = {"letters": 14} if name in IN_MANY_BLOCKS else {}
    loss, case, options, head = made(name, dtype=torch.float32, **texts)
    prefixes = prepared(loss, case, options)
    # Torch's backward wants a real device, also where a loss calls it in its forward: those of P-KL
    # alone make their gradient without it, where the direction is forward and the teacher chooses.
    closed = loss == "p-kl" and options.direction == "forward" and options.top_k_by == "teacher"
    graph = device == "cpu" or closed
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.set_grad_enabled(graph):

        def fake(tensor: Tensor) -> Tensor:
            return mode.from_tensor(tensor).to(device)

        output, leaf = run(loss, case, prefixes, options, fake, head)
        assert output.loss.device.type == device
        if device == "cpu":
            output.loss.backward()
            assert leaf.grad is not None


@pytest.mark.parametrize("device", FAKE_DEVICES)
def test_cross_entropy_looks_at_no_value(device: str) -> None:
    case = make_case(1, dtype=torch.float32)
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        torch.set_grad_enabled(device == "cpu"),
    ):

        def fake(tensor: Tensor) -> Tensor:
            return mode.from_tensor(tensor).to(device)

        leaf = fake(case.student_logits.detach()).requires_grad_()
        loss = cross_entropy(leaf, fake(case.student_ids), fake(case.student_mask)).loss
        if device == "cpu":
            loss.backward()


def test_cross_entropy_without_looking_is_the_same_also_beside_padding_of_nan() -> None:
    case = make_case(1)
    logits = case.student_logits.detach().clone()
    logits[:, :-1][~case.student_mask[:, 1:]] = torch.nan
    found = []
    for way in (nullcontext(), blind()):
        leaf = logits.clone().requires_grad_()
        with way:
            output = cross_entropy(leaf, case.student_ids, case.student_mask)
            output.loss.backward()
        found.append((output.loss, output.num_chunks, leaf.grad, output.metrics))
    torch.testing.assert_close(*found)


def test_on_a_device_a_gradient_that_is_not_finite_makes_the_loss_nan() -> None:
    case = make_case(1)
    logits = case.student_logits.detach().clone()
    logits[0, 2:] = torch.inf
    with blind():
        output = case.loss("p-kl", student=logits.requires_grad_())
    assert torch.isnan(output.loss)


def test_on_a_device_a_token_outside_the_vocabulary_makes_the_loss_nan() -> None:
    case = make_case(1)
    ids = case.student_ids + 1000
    with blind():
        assert torch.isnan(cross_entropy(case.student_logits, ids, case.student_mask).loss)


def test_under_no_grad_no_gradient_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a gradient was asked for")

    monkeypatch.setattr(LogitRows, "new_grads", refuse)
    case = make_case(1)
    with torch.no_grad():
        assert case.loss("p-kl").loss > 0
