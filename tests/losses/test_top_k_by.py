"""A top-k that the student chooses, for reverse KL: against a float64 loop, on every path."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from gradients import gradcheck
from loss_cases import make_case, p_kl

from xtoken.errors import OptionError
from xtoken.losses import TeacherTopK

import reference_losses as reference

DIRECTIONS = ("forward", "reverse", "jsd")


def agree(found: torch.Tensor, wanted: torch.Tensor, logits: torch.Tensor) -> None:
    assert torch.allclose(found, wanted, rtol=1e-9)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (found, wanted)]
    assert torch.allclose(*gradients, atol=1e-11)


@pytest.mark.parametrize(("direction", "tail"), [*product(DIRECTIONS, (False, True))])
def test_p_kl_on_the_students_columns_is_the_loop(direction: str, tail: bool) -> None:
    case = make_case(2, chunks=10)
    w = case.projection
    options = {
        "top_k": 4, "top_k_by": "student", "tail_bucket": tail, "direction": direction,
        "beta": 0.3, "temperature": 1.5,
    }  # fmt: skip
    args = (case.student_logits, case.teacher_logits)
    found = p_kl(*args, w, case.usable, normalizer=1.0, block_size=3, **options).loss
    dense = reference.dense(w.indptr, w.indices, w.weights, w.shape)
    agree(found, reference.p_kl(*args, dense, case.usable, **options), case.student_logits)
    teacher = p_kl(*args, w, case.usable, normalizer=1.0, **{**options, "top_k_by": "teacher"})
    assert not torch.allclose(found, teacher.loss)


@pytest.mark.parametrize(("direction", "tail"), [*product(DIRECTIONS, (False, True))])
@pytest.mark.parametrize("by", ["student", "teacher"])
def test_same_vocab_kl_on_chosen_columns_is_the_loop(direction: str, tail: bool, by: str) -> None:
    case = make_case(3, v_s=12, v_t=12)
    options = {
        "top_k": 4, "top_k_by": by, "tail_bucket": tail, "direction": direction, "beta": 0.3,
        "temperature": 1.5,
    }  # fmt: skip
    found = case.loss("same-vocab-kl", pair=case.shared, normalizer=1.0, block_size=3, **options)
    wanted = reference.same_vocab_kl(
        case.student_logits, case.teacher_logits, case.usable, 12, **options
    )
    agree(found.loss, wanted, case.student_logits)


@pytest.mark.parametrize("name", ["p-kl", "same-vocab-kl"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_of_a_stored_top_k_of_all_tokens_the_student_chooses_as_of_logits(
    name: str, direction: str
) -> None:
    case = make_case(4, v_s=12, v_t=12)
    stored = TeacherTopK.from_logits(case.teacher_logits, 12, vocab_size=12)
    pair = case.shared if name == "same-vocab-kl" else case.pair
    options = {"top_k": 3, "top_k_by": "student", "direction": direction, "pair": pair}
    found, wanted = (
        case.loss(name, teacher=teacher, **options).loss
        for teacher in (stored, case.teacher_logits)
    )
    assert torch.allclose(found, wanted)
    few = TeacherTopK.from_logits(case.teacher_logits, 5, vocab_size=12)
    loss = case.loss(name, teacher=few, **options).loss
    assert torch.isfinite(torch.autograd.grad(loss, case.student_logits)[0]).all()
    assert not torch.allclose(loss, wanted)


@pytest.mark.parametrize("name", ["p-kl", "same-vocab-kl"])
def test_a_choice_of_nothing_or_for_the_batch_is_refused(name: str) -> None:
    case = make_case(5, v_s=12, v_t=12)
    pair = case.shared if name == "same-vocab-kl" else case.pair
    with pytest.raises(OptionError, match="top_k_by = 'student' with top_k = None"):
        case.loss(name, pair=pair, top_k_by="student")
    with pytest.raises(OptionError, match="top_k_by = 'batch', expected"):
        case.loss(name, pair=pair, top_k=3, top_k_by="batch")
    if name == "p-kl":
        with pytest.raises(OptionError, match="the student chooses for each chunk"):
            case.loss(name, top_k=3, top_k_by="student", top_k_scope="microbatch")


def test_gradcheck_of_the_reverse_kl() -> None:
    case = make_case(6, batch=1, chunks=8, v_s=12, v_t=12)
    for name, pair in (("p-kl", case.pair), ("same-vocab-kl", case.shared)):

        def value(logits: torch.Tensor, name: str = name, pair=pair) -> torch.Tensor:
            return case.loss(
                name, pair=pair, student=logits, top_k=4, top_k_by="student", direction="reverse"
            ).loss

        assert gradcheck(value, (case.student_logits,))
