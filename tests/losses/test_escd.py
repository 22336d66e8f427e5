"""ESCD against a loop over bytes, and its definition in small."""

from __future__ import annotations

import pytest
import torch
from byte_cases import ByteCase, hand_made, make_byte_case, ranges
from gradients import gradcheck
from loss_cases import loss_of

from xtoken.errors import OptionError, ShapeError
from xtoken.losses import LossOutput, PairParts, TeacherTopK
from xtoken.tensors.completions import Completions

import reference_byte_losses as reference


def escd(case: ByteCase, **given: object) -> LossOutput:
    return case.batch.loss("escd", **case.ids(), **given)


def pair_of(student: list[bytes], teacher: list[bytes]) -> PairParts:
    tables = hand_made(student, teacher)
    return PairParts(tables.sizes, byte_prefixes=tables, completions=Completions(tables))


@pytest.mark.parametrize("seed", range(14))
def test_value_and_gradient_are_those_of_the_loop(seed: int) -> None:
    case = make_byte_case(seed, letters=30)
    batch = case.batch
    temperature = 1.0 + seed % 2
    chunks = batch.usable
    if seed % 3 == 0:  # some chunks before others do not count
        chunks = chunks.select(torch.rand(len(chunks)) < 0.7)
    found = escd(
        case, chunks=chunks, normalizer=1.0, block_size=1 + seed % 5, temperature=temperature
    )
    wanted = reference.escd(
        batch.student_logits, batch.teacher_logits, batch.student_ids, batch.teacher_ids, chunks,
        case.student, case.teacher, temperature=temperature,
        specials={len(case.teacher) - 1: len(case.student) - 1},
    )  # fmt: skip
    assert torch.allclose(found.loss, wanted, rtol=1e-9)
    gradients = [torch.autograd.grad(x, batch.student_logits)[0] for x in (found.loss, wanted)]
    assert torch.allclose(*gradients, atol=1e-11)


def test_the_cases_have_events() -> None:
    outputs = [escd(make_byte_case(seed, letters=30)) for seed in range(14)]
    assert sum(float(output.metrics["events"]) > 0 for output in outputs) > 7
    assert any(float(output.metrics["completion"]) > 0.1 for output in outputs)


def test_the_example_of_the_paper() -> None:
    """Its B.5: `Bread` 0.4, `Breads` 0.2, `Break` 0.3, `Cat` 0.1; the student goes by `Br`."""
    student = [b"Br", b"Cat", b"ead", b"eads", b"eak", b"x"]
    teacher = [b"Bread", b"Breads", b"Break", b"Cat"]
    q = torch.tensor([0.4, 0.2, 0.3, 0.1], dtype=torch.float64)
    root = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.05], dtype=torch.float64)
    child = torch.tensor([0.1, 0.1, 0.2, 0.3, 0.1, 0.2], dtype=torch.float64)
    own = torch.log(torch.stack([root, child, root, root]))[None].requires_grad_()
    ids = {"student_ids": torch.tensor([[5, 0, 2, 5]]), "teacher_ids": torch.tensor([[3, 0, 3]])}
    output = loss_of(
        "escd", own, torch.log(q).expand(1, 3, 4), ranges((0, 1, 3, 1, 2)),
        pair_of(student, teacher), **ids,
    )  # fmt: skip
    kl = 0.9 * torch.log(torch.tensor(0.9 / 0.5)) + 0.1 * torch.log(torch.tensor(0.1 / 0.2))
    completion = -0.6 * torch.log(torch.tensor(0.5)) - 0.3 * torch.log(torch.tensor(0.1))
    assert output.metrics["kl"].item() == pytest.approx(kl.item())
    assert output.metrics["completion"].item() == pytest.approx(completion.item())
    assert output.metrics["events"].item() == 2
    assert output.metrics["event_mass"].item() == pytest.approx(0.9)
    assert output.loss.item() == pytest.approx((kl + completion).item())


def test_what_a_token_begins_is_completed_in_the_next_chunk_if_that_counts() -> None:
    student, teacher = [b"Br", b"ead", b"x"], [b"Br", b"Bread", b"ead", b"x"]
    pair = pair_of(student, teacher)
    own = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    other = torch.randn(1, 4, 4, dtype=torch.float64)
    ids = {
        "student_ids": torch.tensor([[2, 0, 1, 2]]), "teacher_ids": torch.tensor([[3, 0, 2, 3]])
    }  # fmt: skip
    alone = loss_of("escd", own, other, ranges((0, 1, 2, 1, 2)), pair, normalizer=1.0, **ids)
    both = loss_of(
        "escd", own, other, ranges((0, 2, 3, 2, 3), (0, 1, 2, 1, 2)), pair, normalizer=1.0, **ids
    )
    assert alone.metrics["events"].item() == 0
    assert both.metrics["completion"].item() > 0
    (grad,) = torch.autograd.grad(alone.loss, own)
    assert not grad[0, 1:].any()


def test_weights_are_those_of_the_chunks_that_are_predicted() -> None:
    case = make_byte_case(5, letters=30)
    count = len(case.batch.usable)
    each = [
        escd(case, chunk_weights=torch.eye(count)[c], normalizer=1.0).loss for c in range(count)
    ]
    weights = torch.linspace(0.0, 2.0, count)
    found = escd(case, chunk_weights=weights, normalizer=1.0).loss
    assert torch.allclose(found, sum(w * x for w, x in zip(weights.double(), each, strict=True)))


def test_a_stored_top_k_of_all_tokens_says_what_the_logits_say() -> None:
    for seed in range(6):
        case = make_byte_case(seed)
        size = case.batch.v_t
        stored = TeacherTopK.from_logits(case.batch.teacher_logits, size, vocab_size=size)
        found, wanted = (escd(case, teacher=t).loss for t in (stored, case.batch.teacher_logits))
        assert torch.allclose(found, wanted)


def test_groups_are_named_after_their_shortest_member() -> None:
    student = [b"B", b"Br", b"ead", b"eads", b"r", b"Brea"]
    teacher = [b"Bread", b"Breads", b"Br", b"Breakfast", b"Break"]
    tables = Completions(hand_made(student, teacher))
    assert tables.group_count == 2
    assert dict(zip(tables.members.tolist(), tables.groups.tolist(), strict=True)) == {
        0: 0, 1: 0, 3: 1, 4: 1
    }  # fmt: skip
    ranges_of = {
        student[token]: [
            (int(tables.group[e]), [student[int(u)] for u in tables.order[
                tables.lo[e] : tables.lo[e] + tables.size[e]
            ]])
            for e in range(int(tables.ptr[token]), int(tables.ptr[token + 1]))
        ]
        for token in range(len(student))
    }  # fmt: skip
    assert ranges_of[b"Br"] == [(0, [b"ead", b"eads"])]  # nothing goes on with `eak`
    assert ranges_of[b"B"] == []  # nothing goes on with `read`, nor `reak`


def test_what_does_not_fit_is_refused() -> None:
    case = make_byte_case(1)
    with pytest.raises(OptionError, match="direction = 'jsd' is not an option of escd"):
        escd(case, direction="jsd")
    with pytest.raises(ShapeError, match="completions are of 1 student and 1 teacher tokens"):
        PairParts((3, 1), completions=Completions(hand_made([b"a"], [b"b"])))


def test_gradcheck() -> None:
    case = make_byte_case(3, batch=1, letters=12)

    def value(logits: torch.Tensor) -> torch.Tensor:
        return escd(case, student=logits).loss

    assert gradcheck(value, (case.batch.student_logits,))
