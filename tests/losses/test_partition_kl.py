"""Partition KL against a float64 loop, and its definition in small."""

from __future__ import annotations

import pytest
import torch
from byte_cases import ByteCase, make_byte_case, random_pair, ranges
from gradients import gradcheck
from loss_cases import common_set, loss_of, make_case, some_pieces

from xtoken.errors import OptionError, ShapeError
from xtoken.losses import LossOutput, PairParts, TeacherTopK
from xtoken.tensors.piece_chains import PieceChains

import reference_losses as reference


def partition_kl(case: ByteCase, **given: object) -> LossOutput:
    return case.batch.loss("partition-kl", **case.ids(), **given)


def pieces_of(seed: int, case: ByteCase) -> tuple[list[list[int]], list[list[int]]]:
    projection = random_pair(seed % 7, len(case.student), len(case.teacher))[2]
    own = [projection.pieces[a:b].tolist() for a, b in _ranges(projection.pieces_indptr)]
    indptr, pieces = projection.teacher_pieces_indptr, projection.teacher_pieces
    assert indptr is not None
    assert pieces is not None
    return own, [pieces[a:b].tolist() for a, b in _ranges(indptr)]


def _ranges(indptr) -> list[tuple[int, int]]:
    return list(zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("direction", ["forward", "jsd"])
def test_value_and_gradient_are_those_of_the_loop(seed: int, direction: str) -> None:
    case = make_byte_case(seed)
    batch = case.batch
    options = {
        "direction": direction, "beta": 0.3, "temperature": 1.0 + seed % 2,
        "mismatch_weight": 1.0 + seed % 3,
    }  # fmt: skip
    found = partition_kl(case, normalizer=1.0, block_size=1 + seed % 5, **options).loss
    common = batch.pair.strict_common
    pairs = list(zip(common.student_ids.tolist(), common.teacher_ids.tolist(), strict=True))
    assert len(pairs) > 3
    wanted = reference.partition_kl(
        batch.student_logits, batch.teacher_logits, batch.student_ids, batch.teacher_ids,
        batch.usable, pairs, *pieces_of(seed, case), **options,
    )  # fmt: skip
    assert torch.allclose(found, wanted, rtol=1e-9)
    gradients = [torch.autograd.grad(x, batch.student_logits)[0] for x in (found, wanted)]
    assert torch.allclose(*gradients, atol=1e-11)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_on_random_chunks_and_pieces_too(direction: str) -> None:
    for seed in range(4):
        case = make_case(seed, chunks=20)
        ids = {"student_ids": case.student_ids, "teacher_ids": case.teacher_ids}
        found = case.loss("partition-kl", normalizer=1.0, block_size=3, direction=direction, **ids)
        wanted = reference.partition_kl(
            case.student_logits, case.teacher_logits, case.student_ids, case.teacher_ids,
            case.usable, [(i, i) for i in (1, 4, 6, 9)], *some_pieces(13, 11), direction=direction,
        )  # fmt: skip
        assert torch.allclose(found.loss, wanted, rtol=1e-9)
        gradients = [torch.autograd.grad(x, case.student_logits)[0] for x in (found.loss, wanted)]
        assert torch.allclose(*gradients, atol=1e-10)


def test_a_numeral_is_compared_with_those_that_differ_in_the_last_digit() -> None:
    """The student's 201 and 205 under the digits 2, 0, then 1 or 5; 31 is in the rest."""
    student_pieces = [[2, 0, 1], [2, 0, 5], [3, 1], [7]]
    pair = PairParts(
        (4, 8), strict_common=common_set([3], [7]),
        piece_chains=PieceChains(student_pieces, [[3]] * 8),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(1, 2, 4, generator=generator, dtype=torch.float64).requires_grad_()
    other = torch.randn(1, 4, 8, generator=generator, dtype=torch.float64)
    ids = {"student_ids": torch.tensor([[3, 0]]), "teacher_ids": torch.tensor([[7, 2, 0, 1]])}
    output = loss_of("partition-kl", own, other, ranges((0, 1, 2, 1, 4)), pair, **ids)
    q = torch.softmax(other[0], -1)
    before = q[0, 2] * q[1, 0]
    target = torch.stack([before * q[2, 1], before * q[2, 5]])
    target = torch.cat([target, (1 - target.sum())[None]])
    p = torch.softmax(own.detach()[0, 0], -1)
    student = torch.stack([p[0], p[1], p[2] + p[3]])
    torch.testing.assert_close(output.loss.detach(), (target * torch.log(target / student)).sum())
    assert output.metrics["single"].item() == 0
    assert output.metrics["teacher_rest"].item() == pytest.approx(float(target[2]))


def test_a_text_may_have_a_piece_by_another_id_with_its_bytes() -> None:
    """The student's 201 and 205 under the digits; the teacher's 4 is spelled as its 2 is."""
    student_pieces = [[2, 0, 1], [2, 0, 5], [3, 1], [7], [2]]
    teacher_pieces = [[3], [3], [4], [3], [4], [3], [3], [3]]
    pair = PairParts(
        (5, 8), strict_common=common_set([3], [7]),
        piece_chains=PieceChains(student_pieces, teacher_pieces),
    )  # fmt: skip
    own = torch.randn(1, 2, 5, dtype=torch.float64)
    other = torch.randn(1, 4, 8, dtype=torch.float64)
    other[..., 4] = other[..., 2]
    losses = [
        loss_of(
            "partition-kl", own, other, ranges((0, 1, 2, 1, 4)), pair,
            student_ids=torch.tensor([[3, 0]]), teacher_ids=torch.tensor([[7, two, 0, 1]]),
        ).loss
        for two in (2, 4)
    ]  # fmt: skip
    torch.testing.assert_close(*losses)


def test_the_students_tokens_before_the_last_have_their_gradient() -> None:
    pair = PairParts(
        (5, 4), strict_common=common_set([0], [0]),
        piece_chains=PieceChains([[0]] * 5, [[0], [1, 2], [1, 3], [4]]),
    )  # fmt: skip
    own = torch.randn(1, 3, 5, dtype=torch.float64, requires_grad=True)
    other = torch.randn(1, 2, 4, dtype=torch.float64)
    ids = {"student_ids": torch.tensor([[0, 1, 2]]), "teacher_ids": torch.tensor([[0, 1]])}
    loss = loss_of("partition-kl", own, other, ranges((0, 1, 3, 1, 2)), pair, **ids).loss
    (grad,) = torch.autograd.grad(loss, own)
    assert grad[0, 0].any()
    assert grad[0, 1].any()


def test_a_stored_top_k_of_all_tokens_says_what_the_logits_say() -> None:
    for seed in range(4):
        case = make_byte_case(seed)
        size, logits = case.batch.v_t, case.batch.teacher_logits
        stored = TeacherTopK.from_logits(logits, size, vocab_size=size, ids=case.batch.teacher_ids)
        found, wanted = (partition_kl(case, teacher=t).loss for t in (stored, logits))
        assert torch.allclose(found, wanted)


def test_what_is_not_stored_is_in_the_rest_of_both_sides_but_for_the_text() -> None:
    pair = PairParts(
        (3, 3), strict_common=common_set([0, 1, 2], [0, 1, 2]),
        piece_chains=PieceChains([[0], [1], [2]], [[0], [1], [2]]),
    )  # fmt: skip
    logits = torch.log(torch.tensor([[[0.6, 0.3, 0.1], [1.0, 1.0, 1.0]]], dtype=torch.float64))
    ids = torch.tensor([[0, 2]])
    stored = TeacherTopK.from_logits(logits, 1, ids=ids)
    own = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    both = {"student_ids": ids, "teacher_ids": ids}
    found = loss_of("partition-kl", own, stored, ranges((0, 1, 2, 1, 2)), pair, **both).loss
    p = torch.softmax(own.detach()[0, 0], -1)
    q = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    torch.testing.assert_close(found.detach(), (q * torch.log(q / p)).sum())
    with pytest.raises(OptionError, match="the stored top-k lacks token_log_probs"):
        loss_of(
            "partition-kl", own, TeacherTopK.from_logits(logits, 1), ranges((0, 1, 2, 1, 2)), pair,
            **both,
        )  # fmt: skip


def test_a_certain_student_keeps_the_loss_finite() -> None:
    case = make_case(7, dtype=torch.float32)
    with torch.no_grad():
        following = case.student_ids.roll(-1, 1)
        case.student_logits.scatter_(2, following[..., None], 200.0)
    loss = case.loss(
        "partition-kl", student_ids=case.student_ids, teacher_ids=case.teacher_ids
    ).loss
    (grad,) = torch.autograd.grad(loss, case.student_logits)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()


def test_gradcheck() -> None:
    case = make_byte_case(3, batch=1, letters=12)
    for direction in ("forward", "jsd"):

        def value(logits: torch.Tensor, direction: str = direction) -> torch.Tensor:
            return partition_kl(case, student=logits, direction=direction).loss

        assert gradcheck(value, (case.batch.student_logits,))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="piece_chains are of 1 student and 2 teacher tokens"):
        PairParts((3, 2), piece_chains=PieceChains([[0]], [[0], [0]]))
    case = make_byte_case(1)
    with pytest.raises(OptionError, match="mismatch_weight = -1 must not be negative"):
        partition_kl(case, mismatch_weight=-1)
