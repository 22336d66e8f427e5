"""BPM against a loop over bytes, and what its definition says in small."""

from __future__ import annotations

import pytest
import torch
from byte_cases import ByteCase, hand_made, make_byte_case, ranges
from gradients import gradcheck
from loss_cases import loss_of

from xtoken import ChunkKind
from xtoken.errors import ArgumentTypeError, OptionError, ShapeError, TokenIdError
from xtoken.losses import LOSSES, LossInputs, LossOptions, LossOutput, PairParts, TeacherTopK

import reference_byte_losses as reference


def bpm(case: ByteCase, **given: object) -> LossOutput:
    return case.batch.loss("bpm", **case.ids(), **given)


def slow(case: ByteCase, **given: object) -> torch.Tensor:
    batch = case.batch
    return reference.bpm(
        batch.student_logits, batch.teacher_logits, batch.student_ids, batch.teacher_ids,
        batch.usable, case.student, case.teacher,
        specials={len(case.teacher) - 1: len(case.student) - 1}, **given,
    )  # fmt: skip


def shapes(case: ByteCase) -> set[tuple[bool, bool]]:
    chunks = case.batch.usable
    several = [
        (getattr(chunks, f"{side}_end") - getattr(chunks, f"{side}_start") > 1).tolist()
        for side in ("student", "teacher")
    ]
    return set(zip(*several, strict=True))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("direction", ["forward", "jsd"])
def test_value_and_gradient_are_those_of_the_loop(seed: int, direction: str) -> None:
    case = make_byte_case(seed)
    options = {
        "direction": direction, "beta": 0.3, "temperature": 1.0 + seed % 2,
        "mask_spaces": seed % 3 > 0,
    }  # fmt: skip
    found = bpm(case, normalizer=1.0, block_size=1 + seed % 5, **options).loss
    wanted = slow(case, **options)
    assert torch.allclose(found, wanted, rtol=1e-9)
    gradients = [torch.autograd.grad(x, case.batch.student_logits)[0] for x in (found, wanted)]
    assert torch.allclose(*gradients, atol=1e-11)


def test_the_cases_have_chunks_of_every_shape() -> None:
    found = set().union(*(shapes(make_byte_case(seed)) for seed in range(12)))
    assert found == {(False, False), (False, True), (True, False), (True, True)}


def test_mass_goes_to_the_longest_prefix_and_then_to_what_is_left() -> None:
    """`Bread` is `Br`, `ead`; the teacher's `Break` and `Br` are alternatives."""
    student = [b"Br", b"ead", b"eak", b"x"]
    teacher = [b"Bread", b"Break", b"Br", b"y"]
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    teacher_logits = torch.log(probs).expand(1, 3, 4)
    own = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    pair = PairParts((4, 4), byte_prefixes=hand_made(student, teacher))
    ids = {"student_ids": torch.tensor([[3, 0, 1, 3]]), "teacher_ids": torch.tensor([[3, 0, 3]])}
    loss = loss_of("bpm", own, teacher_logits, ranges((0, 1, 3, 1, 2)), pair, **ids).loss
    p = torch.softmax(own.detach()[0], -1)
    # At the root `y` has no student token, and `x`, `ead`, `eak` are outside.
    first = 0.9 * torch.log(0.9 / p[0, 0]) + 0.1 * torch.log(0.1 / (1 - p[0, 0]))
    # After `Br` the teacher's own `Br` says nothing more.
    q = torch.tensor([0.4, 0.3, 0.2], dtype=torch.float64) / 0.9
    inside = torch.stack([p[1, 1], p[1, 2], 1 - p[1, 1] - p[1, 2]])
    second = (q * torch.log(q / inside)).sum()
    torch.testing.assert_close(loss.detach(), first + second)


def test_a_longer_token_of_the_text_takes_the_probability_along_the_text() -> None:
    student, teacher = [b"2", b"0", b"20", b"201", b"1"], [b"0", b"1", b"2", b"12"]
    pair = PairParts((5, 4), byte_prefixes=hand_made(student, teacher))
    generator = torch.Generator().manual_seed(0)
    teacher_logits = torch.randn(1, 4, 4, generator=generator, dtype=torch.float64)
    own = torch.zeros(1, 2, 5, dtype=torch.float64, requires_grad=True)
    ids = {"student_ids": torch.tensor([[0, 3]]), "teacher_ids": torch.tensor([[2, 2, 0, 1]])}
    loss = loss_of("bpm", own, teacher_logits, ranges((0, 1, 2, 1, 4)), pair, **ids).loss
    q = torch.softmax(teacher_logits[0], -1)
    twenty = q[0, 2] * q[1, 0]
    all_of_it = twenty * (q[2, 1] + q[2, 3])  # `1`, and `12` that begins with it
    target = torch.stack(
        [q[0, 2] - twenty, q[0, 0], twenty - all_of_it, all_of_it, q[0, 1] + q[0, 3]]
    )
    expected = (target * torch.log(target / 0.2)).sum()
    torch.testing.assert_close(loss.detach(), expected)


@pytest.mark.parametrize("masked", [True, False])
def test_indentation_is_left_out_unless_asked_for(masked: bool) -> None:
    student = [b"    ", b"\n", b"return", b" "]
    teacher = [b"    ", b"\n", b"return", b"  "]
    pair = PairParts((4, 4), byte_prefixes=hand_made(student, teacher))
    own = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    ids = {"student_ids": torch.tensor([[2, 1, 0, 2]]), "teacher_ids": torch.tensor([[2, 1, 0, 2]])}
    chunks = ranges((0, 1, 2, 1, 2), (0, 2, 3, 2, 3), (0, 3, 4, 3, 4))
    teacher_logits = torch.randn(1, 4, 4, dtype=torch.float64)
    output = loss_of("bpm", own, teacher_logits, chunks, pair, mask_spaces=masked, **ids)
    (grad,) = torch.autograd.grad(output.loss, own)
    assert output.metrics["spaces"].item() == pytest.approx(1 / 3)
    assert output.metrics["positions"].item() == pytest.approx(2 / 3 if masked else 1)
    assert bool(grad[0, 1].any()) == (not masked)
    assert grad[0, 0].any()
    assert grad[0, 2].any()


def test_a_stored_top_k_of_all_tokens_says_what_the_logits_say() -> None:
    for seed in range(6):
        case = make_byte_case(seed)
        size = case.batch.v_t
        stored = TeacherTopK.from_logits(case.batch.teacher_logits, size, vocab_size=size)
        found, wanted = (bpm(case, teacher=t).loss for t in (stored, case.batch.teacher_logits))
        assert torch.allclose(found, wanted)


def test_what_is_not_stored_is_in_the_complement() -> None:
    student = teacher = [b"a", b"b", b"c"]
    pair = PairParts((3, 3), byte_prefixes=hand_made(student, teacher))
    logits = torch.log(torch.tensor([[[0.6, 0.3, 0.1], [1.0, 1.0, 1.0]]], dtype=torch.float64))
    stored = TeacherTopK.from_logits(logits, 1)
    own = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    ids = {"student_ids": torch.tensor([[0, 1]]), "teacher_ids": torch.tensor([[0, 1]])}
    output = loss_of("bpm", own, stored, ranges((0, 1, 2, 1, 2)), pair, **ids)
    p = torch.softmax(own.detach()[0, 0], -1)
    expected = 0.6 * torch.log(0.6 / p[0]) + 0.4 * torch.log(0.4 / (p[1] + p[2]))
    torch.testing.assert_close(output.loss.detach(), expected)
    assert output.metrics["complement"].item() == pytest.approx(0.4)


def test_inside_a_token_one_stored_way_on_is_enough() -> None:
    """Of two teacher tokens that go on with the same student token, the later is not stored."""
    student, teacher = [b"a", b"b", b"c"], [b"ab", b"abb", b"c"]
    pair = PairParts((3, 3), byte_prefixes=hand_made(student, teacher))
    logits = torch.log(torch.tensor([[[0.6, 0.3, 0.1], [1.0, 1.0, 1.0]]], dtype=torch.float64))
    stored = TeacherTopK.from_logits(logits, 1)
    own = torch.randn(1, 3, 3, dtype=torch.float64, requires_grad=True)
    ids = {"student_ids": torch.tensor([[2, 0, 1]]), "teacher_ids": torch.tensor([[2, 0]])}
    output = loss_of("bpm", own, stored, ranges((0, 1, 3, 1, 2)), pair, **ids)
    p = torch.softmax(own.detach()[0], -1)
    at_first = 0.6 * torch.log(0.6 / p[0, 0]) + 0.4 * torch.log(0.4 / (p[0, 1] + p[0, 2]))
    torch.testing.assert_close(output.loss.detach(), at_first - torch.log(p[1, 1]))


def test_a_chunk_of_other_bytes_is_compared_at_its_first_position_alone() -> None:
    student, teacher = [b"a", b"b"], [b"a", b"c"]
    pair = PairParts((2, 2), byte_prefixes=hand_made(student, teacher))
    own = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    ids = {"student_ids": torch.tensor([[0, 0, 1]]), "teacher_ids": torch.tensor([[0, 1, 1]])}
    chunks = ranges((0, 1, 3, 1, 3))
    loss = loss_of("bpm", own, torch.randn(1, 3, 2).double(), chunks, pair, **ids).loss
    (grad,) = torch.autograd.grad(loss, own)
    assert grad[0, 0].any()
    assert not grad[0, 1:].any()


def test_gradcheck() -> None:
    case = make_byte_case(3, batch=1, letters=12)
    for direction in ("forward", "jsd"):

        def value(logits: torch.Tensor, direction: str = direction) -> torch.Tensor:
            return bpm(case, student=logits, direction=direction, mask_spaces=False).loss

        assert gradcheck(value, (case.batch.student_logits,))


def test_what_does_not_fit_is_refused() -> None:
    case = make_byte_case(1)
    with pytest.raises(OptionError, match="'reverse' is infinite under bpm"):
        bpm(case, direction="reverse")
    with pytest.raises(OptionError, match="bpm needs student_ids"):
        case.batch.loss("bpm")
    with pytest.raises(TokenIdError, match="student_ids holds 99, outside the student vocabulary"):
        case.batch.loss("bpm", **{**case.ids(), "student_ids": case.batch.student_ids * 0 + 99})
    with pytest.raises(ShapeError, match="byte_prefixes are of 2 student and 1 teacher tokens"):
        PairParts((3, 1), byte_prefixes=hand_made([b"a", b"b"], [b"a"]))
    batch = case.batch
    spec = LOSSES["bpm"]
    ids = (batch.student_ids, batch.teacher_ids)
    made = spec.prepare(batch.pair, batch.usable, *ids)
    inputs = {"student_ids": ids[0], "teacher_ids": ids[1], "prepared": made}
    other = batch.usable.select(batch.usable.kind == int(ChunkKind.EXACT))
    with pytest.raises(ShapeError, match="other chunks than the"):
        spec.function(
            LossInputs(batch.student_logits, batch.teacher_logits, other, **inputs), batch.pair
        )
    with pytest.raises(ArgumentTypeError, match="prepared is int"):
        LossInputs(
            batch.student_logits, batch.teacher_logits, batch.usable, **{**inputs, "prepared": 3}
        )
    assert LossOptions().mask_spaces
