"""ULD, same-vocabulary KL and ALM against float64 loops, and several teachers at once."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from loss_cases import make_case

from xtoken.losses import (
    ALM,
    HKL,
    ULD,
    SameVocabKL,
    TeacherTerm,
    TeacherTopK,
    alm,
    h_kl,
    multi_teacher,
    p_kl,
    same_vocab_kl,
    uld,
)
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.projection import SparseProjection

import reference_losses as reference

SIZES = {"student_vocab_size": 13, "teacher_vocab_size": 11}


def agree(found: torch.Tensor, wanted: torch.Tensor, logits: torch.Tensor) -> None:
    assert torch.allclose(found, wanted, rtol=1e-9)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (found, wanted)]
    assert torch.allclose(*gradients, atol=1e-11)


@pytest.mark.parametrize("merge", ["chain", "last", "mean"])
def test_uld_is_the_loop(merge: str) -> None:
    case = make_case(1)
    args = (case.student_logits, case.teacher_logits, case.usable)
    found = uld(*args, **SIZES, merge=merge, temperature=2.0, normalizer=1.0).loss
    wanted = reference.hybrid(*args, [], 13, 11, merge=merge, temperature=2.0)
    agree(found, wanted, case.student_logits)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_same_vocab_kl_is_the_loop(direction: str) -> None:
    case = make_case(2, v_s=12, v_t=12)
    args = (case.student_logits, case.teacher_logits, case.usable)
    options = {"direction": direction, "beta": 0.2, "temperature": 1.4}
    found = same_vocab_kl(*args, vocab_size=12, normalizer=1.0, block_size=2, **options).loss
    agree(found, reference.same_vocab_kl(*args, 12, **options), case.student_logits)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_alm_is_the_loop(direction: str, temperature: float) -> None:
    case = make_case(3)
    ids = (case.student_ids, case.teacher_ids)
    options = {"direction": direction, "beta": 0.7, "temperature": temperature}
    found = alm(
        case.student_logits, case.teacher_logits, case.usable, student_ids=ids[0],
        teacher_ids=ids[1], **SIZES, normalizer=1.0, block_size=2, **options,
    ).loss  # fmt: skip
    wanted = reference.alm(
        case.student_logits, case.teacher_logits, *ids, case.usable, 13, 11, **options
    )
    agree(found, wanted, case.student_logits)


def test_gradcheck_of_each_baseline() -> None:
    case = make_case(4, batch=1, chunks=10)
    ids = {"student_ids": case.student_ids, "teacher_ids": case.teacher_ids}
    merges, directions = ("chain", "last", "mean"), ("forward", "reverse", "jsd")
    for loss in (
        *(partial(uld, **SIZES, merge=merge) for merge in merges),
        *(
            partial(same_vocab_kl, vocab_size=11, merge=merge, direction=direction)
            for merge, direction in product(merges, directions)
        ),
        *(partial(alm, **SIZES, **ids, temperature=3.0, direction=x) for x in directions),
    ):

        def value(logits: torch.Tensor, loss: partial = loss) -> torch.Tensor:
            return loss(logits, case.teacher_logits, case.usable).loss

        assert torch.autograd.gradcheck(value, (case.student_logits,))


@pytest.mark.parametrize("tail", [False, True])
def test_same_vocab_kl_of_a_stored_top_k_is_p_kl_under_the_identity(tail: bool) -> None:
    case = make_case(5, v_s=12, v_t=12)
    stored = TeacherTopK.from_logits(case.teacher_logits, 4)  # some ids are beyond 12
    args = (case.student_logits, stored)
    found = same_vocab_kl(*args, case.usable, vocab_size=12, tail_bucket=tail)
    w = SparseProjection.identity(12)
    if not tail:
        wanted = p_kl(*args, w, case.usable)
    else:  # the identity has no empty row, and each chunk's own columns leave a tail
        wanted = p_kl(*args, w, case.usable, tail_bucket=True)
    agree(found.loss, wanted.loss, case.student_logits)
    assert torch.allclose(found.metrics["teacher_mass"], wanted.metrics["teacher_mass"])


def test_a_stored_top_k_with_token_log_probs_serves_alm() -> None:
    case = make_case(6)
    stored = TeacherTopK.from_logits(case.teacher_logits, 2, vocab_size=11, ids=case.teacher_ids)
    options = {"student_ids": case.student_ids, "teacher_ids": case.teacher_ids, **SIZES}
    found, wanted = (
        alm(case.student_logits, teacher, case.usable, **options).loss
        for teacher in (stored, case.teacher_logits)
    )
    assert torch.allclose(found, wanted)
    bare = TeacherTopK(stored.ids, stored.log_probs)
    with pytest.raises(ValueError, match="lacks token_log_probs"):
        alm(case.student_logits, bare, case.usable, **options)


def test_a_certain_student_keeps_alm_finite() -> None:
    case = make_case(7, dtype=torch.float32)
    with torch.no_grad():
        following = case.student_ids.roll(-1, 1)
        case.student_logits.scatter_(2, following[..., None], 200.0)
    loss = ALM(**SIZES)(
        case.student_logits, case.teacher_logits, case.usable, student_ids=case.student_ids,
        teacher_ids=case.teacher_ids,
    ).loss  # fmt: skip
    (grad,) = torch.autograd.grad(loss, case.student_logits)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()


def test_modules_call_their_functions_and_refuse_unknown_options() -> None:
    case = make_case(8, v_s=12, v_t=12)
    args = (case.student_logits, case.teacher_logits, case.usable)
    sizes = {"student_vocab_size": 12, "teacher_vocab_size": 12}
    ids = torch.arange(3)
    assert torch.equal(ULD(**sizes)(*args).loss, uld(*args, **sizes).loss)
    assert torch.equal(
        SameVocabKL(vocab_size=12)(*args).loss, same_vocab_kl(*args, vocab_size=12).loss
    )
    assert torch.equal(
        HKL(ids, ids, **sizes)(*args).loss,
        h_kl(*args, student_ids_common=ids, teacher_ids_common=ids, **sizes).loss,
    )
    with pytest.raises(TypeError, match="uld has no option 'top_k'"):
        ULD(top_k=3)


def test_what_does_not_fit_is_refused() -> None:
    case = make_case(9)
    args = (case.student_logits, case.teacher_logits, case.usable)
    with pytest.raises(ValueError, match=r"the student has 16 columns, the teacher 14"):
        same_vocab_kl(*args)
    with pytest.raises(ValueError, match="full logits leave no tail"):
        same_vocab_kl(*args, vocab_size=11, tail_bucket=True)
    with pytest.raises(ValueError, match=r"ids is torch\.int32"):
        TeacherTopK(torch.zeros(1, 2, 3, dtype=torch.int32), torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match=r"log_probs is torch\.float32 \(1, 2, 2\)"):
        TeacherTopK(torch.zeros(1, 2, 3, dtype=torch.int64), torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match=r"temperature = 0\.0"):
        TeacherTopK(torch.zeros(1, 2, 3, dtype=torch.int64), torch.zeros(1, 2, 3), 0.0)
    with pytest.raises(ValueError, match="k = 0 must be at least 1"):
        TeacherTopK.from_logits(case.teacher_logits, 0)
    with pytest.raises(ValueError, match=r"ids has shape \(1, 1\), expected"):
        TeacherTopK.from_logits(case.teacher_logits, 2, ids=torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ids span \[\d+, \d+\], outside the teacher vocabulary"):
        TeacherTopK.from_logits(case.teacher_logits, 2, vocab_size=11, ids=case.teacher_ids + 11)
    with pytest.raises(ValueError, match="there is no position"):
        TeacherTopK.from_logits(case.teacher_logits[:, :0], 2)
    wrong = case.teacher_ids.clone() + 11
    with pytest.raises(ValueError, match=r"teacher_ids holds \d+, outside the teacher vocabulary"):
        alm(*args, student_ids=case.student_ids, teacher_ids=wrong, **SIZES)
    with pytest.raises(ValueError, match=r"temperature = 0\.0 must be above 0"):
        alm(*args, student_ids=case.student_ids, teacher_ids=case.teacher_ids, temperature=0.0)
    negative = TeacherTopK(-torch.ones_like(case.teacher_ids)[..., None], torch.zeros(1).expand(
        *case.teacher_ids.shape, 1))  # fmt: skip
    with pytest.raises(ValueError, match="ids hold -1; pad a short row with log_probs"):
        uld(args[0], negative, args[2], **SIZES)


def terms_of(seed: int = 10, batch: int = 3) -> tuple[torch.Tensor, list[TeacherTerm]]:
    """One student with a teacher of another tokenizer and one of its own."""
    case = make_case(seed, batch=batch)
    generator = torch.Generator().manual_seed(seed)
    shape = case.student_logits.shape
    own = torch.randn(*shape, generator=generator, dtype=torch.float64) * 3
    own_chunks = ChunkBatch.from_mask(case.student_mask & (torch.arange(shape[1]) > 0))
    return case.student_logits, [
        TeacherTerm(
            p_kl, case.teacher_logits, case.usable, {"projection": case.projection},
            case.teacher_ids, 11,
        ),
        TeacherTerm(
            same_vocab_kl, own, own_chunks, {"vocab_size": 13}, case.student_ids, 13
        ),
    ]  # fmt: skip


def test_static_weights_add_the_losses_of_the_teachers() -> None:
    logits, terms = terms_of()
    alone = [multi_teacher(logits, [term]).loss for term in terms]
    both = multi_teacher(logits, terms, weights=[0.25, 2.0])
    assert torch.allclose(both.loss, 0.25 * alone[0] + 2.0 * alone[1])
    assert torch.allclose(multi_teacher(logits, terms).loss, (alone[0] + alone[1]) / 2)
    assert int(both.num_chunks) == sum(len(term.chunks) for term in terms)
    assert both.metrics["teacher1/weight"].item() == 2.0
    assert "teacher0/teacher_mass" in both.metrics


@pytest.mark.parametrize("confidence", ["ce", "entropy", "max_prob"])
def test_confident_teachers_weigh_more_sample_by_sample(confidence: str) -> None:
    logits, terms = terms_of()
    found = multi_teacher(logits, terms, weights=confidence, sharpness=2.0)
    scores = []
    for term, size in zip(terms, (11, 13), strict=True):
        row = []
        for sample in range(3):
            total, positions, tokens = 0.0, 0, 0
            for c in range(len(term.chunks)):
                if int(term.chunks.sample[c]) != sample:
                    continue
                tokens += int(term.chunks.student_end[c] - term.chunks.student_start[c])
                for t in range(int(term.chunks.teacher_start[c]), int(term.chunks.teacher_end[c])):
                    q = torch.softmax(term.teacher[sample, t - 1, :size], -1)
                    positions += 1
                    if confidence == "ce":
                        total -= float(torch.log(q[int(term.teacher_ids[sample, t])]))
                    elif confidence == "entropy":
                        total += reference.entropy(q)
                    else:
                        total += float(q.max())
            if not tokens:
                row.append(-torch.inf)
            elif confidence == "max_prob":
                row.append(float(torch.log(torch.tensor(total / positions, dtype=torch.float64))))
            else:
                row.append(-total / tokens)
        scores.append(row)
    shares = torch.softmax(2.0 * torch.tensor(scores, dtype=torch.float64), 0)
    wanted = sum(
        term.loss(
            logits, teacher=term.teacher, chunks=term.chunks, **term.options,
            chunk_weights=share[term.chunks.sample],
        ).loss
        for term, share in zip(terms, shares, strict=True)
    )  # fmt: skip
    assert torch.allclose(found.loss, wanted)


def test_a_stored_top_k_of_all_tokens_is_as_confident_as_its_logits() -> None:
    logits, terms = terms_of()
    stored = TeacherTopK.from_logits(terms[0].teacher, 11, vocab_size=11, ids=terms[0].teacher_ids)
    other = [
        TeacherTerm(p_kl, stored, terms[0].chunks, {**terms[0].options, "top_k": 11},
                    terms[0].teacher_ids, 11),
        terms[1],
    ]  # fmt: skip
    for confidence in ("ce", "entropy", "max_prob"):
        found, wanted = (multi_teacher(logits, x, weights=confidence).loss for x in (other, terms))
        assert torch.allclose(found, wanted)


def test_wrong_weights_are_refused() -> None:
    logits, terms = terms_of()
    with pytest.raises(ValueError, match="terms is empty"):
        multi_teacher(logits, [])
    with pytest.raises(ValueError, match="expected 2 numbers"):
        multi_teacher(logits, terms, weights=[1.0])
    with pytest.raises(ValueError, match="expected numbers or ce, entropy, max_prob"):
        multi_teacher(logits, terms, weights="margin")
    bare = [TeacherTerm(t.loss, t.teacher, t.chunks, t.options) for t in terms]
    with pytest.raises(ValueError, match="needs TeacherTerm"):
        multi_teacher(logits, bare, weights="ce")
