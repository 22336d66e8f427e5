"""Strict top-k against a float64 loop, and its definition in small."""

from __future__ import annotations

import pytest
import torch
from byte_cases import ranges
from gradients import gradcheck
from loss_cases import common_set, loss_of, make_case

from xtoken.errors import OptionError
from xtoken.losses import CommonSet, PairParts, TeacherTopK

import reference_losses as reference

COMMON = [(0, 3), (2, 0), (5, 5), (7, 10), (12, 1)]
NONE = torch.zeros(0, dtype=torch.int64)


def pair_of(common=COMMON, sizes=(13, 11)) -> PairParts:
    return PairParts(sizes, strict_common=common_set(*map(list, zip(*common, strict=True))))


@pytest.mark.parametrize("student_top_k", [1, 2, 16, None])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_value_and_gradient_are_those_of_the_loop(
    student_top_k: int | None, temperature: float
) -> None:
    case = make_case(1, chunks=20)
    options = {"student_top_k": student_top_k, "temperature": temperature}
    args = (case.student_logits, case.teacher_logits, case.usable)
    fast = loss_of("strict-top-k", *args, pair_of(), normalizer=1.0, block_size=3, **options).loss
    slow = reference.strict_top_k(*args, COMMON, 13, 11, **options)
    assert torch.allclose(fast, slow, rtol=1e-9)
    gradients = [torch.autograd.grad(x, case.student_logits)[0] for x in (fast, slow)]
    assert torch.allclose(*gradients, atol=1e-11)
    assert student_top_k == 1 or gradients[0].any()


def test_only_chunks_of_one_token_on_both_sides_are_compared() -> None:
    own = torch.randn(1, 6, 13, dtype=torch.float64, requires_grad=True)
    other = torch.randn(1, 6, 11, dtype=torch.float64)
    chunks = ranges((0, 1, 2, 1, 2), (0, 2, 3, 2, 4), (0, 3, 5, 4, 5), (0, 5, 6, 5, 6))
    output = loss_of("strict-top-k", own, other, chunks, pair_of())
    (grad,) = torch.autograd.grad(output.loss, own)
    assert [bool(row.any()) for row in grad[0]] == [True, False, False, False, True, False]
    assert output.metrics["strict"].item() == 0.5
    assert int(output.num_chunks) == 4


def test_of_a_stored_top_k_the_student_chooses_among_the_stored() -> None:
    case = make_case(4, chunks=20)
    stored = TeacherTopK.from_logits(case.teacher_logits, 4, vocab_size=11)
    args = (case.student_logits, stored, case.usable, pair_of())
    found = loss_of("strict-top-k", *args, student_top_k=2, normalizer=1.0).loss
    total = torch.zeros((), dtype=torch.float64)
    both = reference.pairs(
        case.student_logits, case.teacher_logits, case.usable, "chain", 1.0, 13, 11
    )
    for c, (p, q) in enumerate(both):
        sizes = case.usable.student_end - case.usable.student_start
        others = case.usable.teacher_end - case.usable.teacher_start
        row = int(case.usable.sample[c]), int(case.usable.teacher_start[c]) - 1
        kept = [pair for pair in COMMON if pair[1] in stored.ids[row].tolist()]
        if int(sizes[c]) == int(others[c]) == 1 and kept:
            best = sorted(kept, key=lambda pair, p=p: -float(p[pair[0]].detach()))[:2]
            own, other = p[[s for s, _ in best]], q[[t for _, t in best]]
            total = total + reference.kl(own / own.sum(), other / other.sum())
    torch.testing.assert_close(found, total)
    assert torch.isfinite(torch.autograd.grad(found, case.student_logits)[0]).all()


def test_nothing_shared_is_no_loss() -> None:
    case = make_case(2)
    pair = PairParts((13, 11), strict_common=CommonSet(NONE, NONE))
    output = loss_of("strict-top-k", case.student_logits, case.teacher_logits, case.usable, pair)
    assert output.loss.item() == 0
    assert not torch.autograd.grad(output.loss, case.student_logits)[0].any()


def test_gradcheck() -> None:
    case = make_case(3, batch=1, chunks=60)

    def value(logits: torch.Tensor) -> torch.Tensor:
        return loss_of(
            "strict-top-k", logits, case.teacher_logits, case.usable, pair_of(), student_top_k=3
        ).loss

    assert gradcheck(value, (case.student_logits,))


def test_options_that_do_not_fit_are_refused() -> None:
    case = make_case(1)
    args = (case.student_logits, case.teacher_logits, case.usable, pair_of())
    with pytest.raises(OptionError, match="student_top_k = 0 must be a whole number of at least"):
        loss_of("strict-top-k", *args, student_top_k=0)
    with pytest.raises(OptionError, match="direction = 'jsd' is not an option of strict-top-k"):
        loss_of("strict-top-k", *args, direction="jsd")
