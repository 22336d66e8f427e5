"""ULD, same-vocabulary KL and ALM against float64 loops, and several teachers at once."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from gradients import gradcheck
from loss_cases import Case, loss_of, make_case, p_kl, w_alone
from torch import Tensor

from xtoken.errors import NonFiniteError, OptionError, PairError, ShapeError, TokenIdError
from xtoken.losses import (
    LOSSES,
    LossInputs,
    LossOptions,
    PairParts,
    TeacherTerm,
    TeacherTopK,
    multi_teacher,
)
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.projection import SparseProjection

import reference_losses as reference


def uld(*args, **given):
    return loss_of("uld", *args, PairParts((13, 11)), **given)


def alm(*args, **given):
    return loss_of("alm", *args, PairParts((13, 11)), **given)


def same_vocab_kl(*args, vocab_size: int, **given):
    return loss_of("same-vocab-kl", *args, PairParts((vocab_size, vocab_size)), **given)


def ids_of(case: Case) -> dict[str, torch.Tensor]:
    return {"student_ids": case.student_ids, "teacher_ids": case.teacher_ids}


def agree(found: torch.Tensor, wanted: torch.Tensor, logits: torch.Tensor) -> None:
    assert torch.allclose(found, wanted, rtol=1e-9)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (found, wanted)]
    assert torch.allclose(*gradients, atol=1e-11)


@pytest.mark.parametrize("merge", ["chain", "last", "mean"])
def test_uld_is_the_loop(merge: str) -> None:
    case = make_case(1)
    args = (case.student_logits, case.teacher_logits, case.usable)
    found = uld(*args, merge=merge, temperature=2.0, normalizer=1.0).loss
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
        teacher_ids=ids[1], normalizer=1.0, block_size=2, **options,
    ).loss  # fmt: skip
    wanted = reference.alm(
        case.student_logits, case.teacher_logits, *ids, case.usable, 13, 11, **options
    )
    agree(found, wanted, case.student_logits)


MERGES, DIRECTIONS = ("chain", "last", "mean"), ("forward", "reverse", "jsd")
BASELINES = [
    *(partial(uld, merge=merge) for merge in MERGES),
    *(
        partial(same_vocab_kl, vocab_size=11, merge=merge, direction=direction)
        for merge, direction in product(MERGES, DIRECTIONS)
    ),
    *(partial(alm, temperature=3.0, direction=direction) for direction in DIRECTIONS),
]


@pytest.mark.parametrize("loss", BASELINES)
def test_gradcheck_of_each_baseline(loss: partial) -> None:
    case = make_case(4, batch=1, chunks=10)
    ids = {"student_ids": case.student_ids, "teacher_ids": case.teacher_ids}

    def value(logits: torch.Tensor) -> torch.Tensor:
        given = ids if loss.func is alm else {}
        return loss(logits, case.teacher_logits, case.usable, **given).loss

    assert gradcheck(value, (case.student_logits,))


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
    options = ids_of(case)
    found, wanted = (
        alm(case.student_logits, teacher, case.usable, **options).loss
        for teacher in (stored, case.teacher_logits)
    )
    assert torch.allclose(found, wanted)
    bare = TeacherTopK(stored.ids, stored.log_probs)
    with pytest.raises(OptionError, match="lacks token_log_probs"):
        alm(case.student_logits, bare, case.usable, **options)


def test_a_certain_student_keeps_alm_finite() -> None:
    case = make_case(7, dtype=torch.float32)
    with torch.no_grad():
        following = case.student_ids.roll(-1, 1)
        case.student_logits.scatter_(2, following[..., None], 200.0)
    loss = alm(case.student_logits, case.teacher_logits, case.usable, **ids_of(case)).loss
    (grad,) = torch.autograd.grad(loss, case.student_logits)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_alm_keeps_the_digits_of_what_a_sure_student_leaves_to_others(direction: str) -> None:
    case = make_case(7, dtype=torch.float32)
    with torch.no_grad():
        following = case.student_ids.roll(-1, 1)
        # About 1 in 10^6 for all others, at logits that are themselves rounded by more.
        case.student_logits.mul_(0.1).add_(100.0)
        case.student_logits.scatter_add_(
            2, following[..., None], torch.full_like(case.student_logits[..., :1], 16.0)
        )
    options = {**ids_of(case), "temperature": 1.0, "direction": direction, "normalizer": 1.0}
    found = alm(case.student_logits, case.teacher_logits, case.usable, **options).loss
    exact = case.student_logits.detach().double().requires_grad_()
    wanted = reference.alm(
        exact, case.teacher_logits, *ids_of(case).values(), case.usable, 13, 11,
        temperature=1.0, direction=direction,
    )  # fmt: skip
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(found, case.student_logits)[0].double(),
        torch.autograd.grad(wanted, exact)[0],
        rtol=1e-4,
        atol=1e-6,
    )


def test_an_option_that_a_loss_does_not_read_is_refused_by_name() -> None:
    case = make_case(8)
    for name, options, match in (
        ("uld", {"top_k": 3}, "top_k = 3 is not an option of uld; it reads block_size, compiled"),
        ("uld", {"direction": "reverse"}, "direction = 'reverse' is not an option of uld"),
        ("alm", {"merge": "mean", **ids_of(case)}, "merge = 'mean' is not an option of alm"),
        ("p-kl", {"uld_weight": 0.5}, "uld_weight = 0.5 is not an option of p-kl"),
        ("gold", {"tail_bucket": True}, "tail_bucket = True is not an option of gold"),
    ):
        with pytest.raises(OptionError, match=match):
            case.loss(name, **options)


def test_what_does_not_fit_is_refused() -> None:
    case = make_case(9)
    args = (case.student_logits, case.teacher_logits, case.usable)
    with pytest.raises(PairError, match=r"the student has 13 tokens, the teacher 11"):
        case.loss("same-vocab-kl")
    with pytest.raises(OptionError, match="full logits leave no tail"):
        same_vocab_kl(*args, vocab_size=11, tail_bucket=True)
    with pytest.raises(ShapeError, match=r"ids is torch\.int32"):
        TeacherTopK(torch.zeros(1, 2, 3, dtype=torch.int32), torch.zeros(1, 2, 3))
    with pytest.raises(ShapeError, match=r"log_probs is torch\.float32 \(1, 2, 2\)"):
        TeacherTopK(torch.zeros(1, 2, 3, dtype=torch.int64), torch.zeros(1, 2, 2))
    with pytest.raises(OptionError, match=r"temperature = 0\.0"):
        TeacherTopK(torch.zeros(1, 2, 3, dtype=torch.int64), torch.zeros(1, 2, 3), 0.0)
    with pytest.raises(OptionError, match="k = 0 must be at least 1"):
        TeacherTopK.from_logits(case.teacher_logits, 0)
    with pytest.raises(ShapeError, match=r"ids has shape \(1, 1\), expected"):
        TeacherTopK.from_logits(case.teacher_logits, 2, ids=torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(
        TokenIdError, match=r"ids span \[\d+, \d+\], outside the teacher vocabulary"
    ):
        TeacherTopK.from_logits(case.teacher_logits, 2, vocab_size=11, ids=case.teacher_ids + 11)
    with pytest.raises(ShapeError, match="there is no position"):
        TeacherTopK.from_logits(case.teacher_logits[:, :0], 2)
    wrong = case.teacher_ids.clone() + 11
    with pytest.raises(
        TokenIdError, match=r"teacher_ids holds \d+, outside the teacher vocabulary"
    ):
        alm(*args, student_ids=case.student_ids, teacher_ids=wrong)
    with pytest.raises(OptionError, match=r"temperature = 0\.0 must be above 0"):
        alm(*args, **ids_of(case), temperature=0.0)
    with pytest.raises(OptionError, match="alm needs teacher_ids; pass LossInputs"):
        alm(*args, student_ids=case.student_ids)
    negative = -torch.ones_like(case.teacher_ids)[..., None]
    with pytest.raises(TokenIdError, match="ids hold -1; pad a short row with log_probs"):
        TeacherTopK(negative, torch.zeros(negative.shape))


def terms_of(seed: int = 10, batch: int = 3) -> list[TeacherTerm]:
    """One student with a teacher of another tokenizer and one of its own."""
    case = make_case(seed, batch=batch)
    generator = torch.Generator().manual_seed(seed)
    shape = case.student_logits.shape
    own = torch.randn(*shape, generator=generator, dtype=torch.float64) * 3
    own_chunks = ChunkBatch.from_mask(case.student_mask & (torch.arange(shape[1]) > 0))
    student = case.student_logits
    return [
        TeacherTerm(
            "p-kl",
            LossInputs(student, case.teacher_logits, case.usable, teacher_ids=case.teacher_ids),
            w_alone(case.projection),
        ),
        TeacherTerm(
            "same-vocab-kl",
            LossInputs(student, own, own_chunks, teacher_ids=case.student_ids),
            PairParts((13, 13)),
        ),
    ]


def test_static_weights_add_the_losses_of_the_teachers() -> None:
    terms = terms_of()
    alone = [multi_teacher([term]).loss for term in terms]
    both = multi_teacher(terms, weights=[0.25, 2.0])
    assert torch.allclose(both.loss, 0.25 * alone[0] + 2.0 * alone[1])
    assert torch.allclose(multi_teacher(terms).loss, (alone[0] + alone[1]) / 2)
    assert int(both.num_chunks) == sum(len(term.inputs.chunks) for term in terms)
    assert both.metrics["teacher1/weight"].item() == 2.0
    assert "teacher0/teacher_mass" in both.metrics


@pytest.mark.parametrize("confidence", ["ce", "entropy", "max_prob"])
def test_confident_teachers_weigh_more_sample_by_sample(confidence: str) -> None:
    terms = terms_of()
    found = multi_teacher(terms, weights=confidence, sharpness=2.0)
    scores = []
    for term, size in zip(terms, (11, 13), strict=True):
        row, chunks = [], term.inputs.chunks
        for sample in range(3):
            total, positions, tokens = 0.0, 0, 0
            for c in range(len(chunks)):
                if int(chunks.sample[c]) != sample:
                    continue
                tokens += int(chunks.student_end[c] - chunks.student_start[c])
                for t in range(int(chunks.teacher_start[c]), int(chunks.teacher_end[c])):
                    q = torch.softmax(term.inputs.teacher[sample, t - 1, :size], -1)
                    positions += 1
                    if confidence == "ce":
                        total -= float(torch.log(q[int(term.inputs.teacher_ids[sample, t])]))
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
        LOSSES[term.loss]
        .function(replace(term.inputs, chunk_weights=share[term.inputs.chunks.sample]), term.pair)
        .loss
        for term, share in zip(terms, shares, strict=True)
    )
    assert torch.allclose(found.loss, wanted)


def test_a_stored_top_k_of_all_tokens_is_as_confident_as_its_logits() -> None:
    terms = terms_of()
    inputs = terms[0].inputs
    stored = TeacherTopK.from_logits(inputs.teacher, 11, vocab_size=11, ids=inputs.teacher_ids)
    first = replace(terms[0], inputs=replace(inputs, teacher=stored), options=LossOptions(top_k=11))
    other = [first, terms[1]]
    for confidence in ("ce", "entropy", "max_prob"):
        found, wanted = (multi_teacher(x, weights=confidence).loss for x in (other, terms))
        assert torch.allclose(found, wanted)


def shares_of(terms: list[TeacherTerm], **given: object) -> Tensor:
    """[K, B] the weights: of each teacher's loss in each sample alone, with and without them."""
    rows = []
    for k, term in enumerate(terms):
        row = []
        for sample in range(term.inputs.student.shape[0]):
            alone = [
                replace(
                    each,
                    inputs=replace(
                        each.inputs,
                        chunk_weights=(each.inputs.chunks.sample == sample).double()
                        * (each is term),
                        normalizer=1.0,
                    ),
                )
                for each in terms
            ]
            whole = LOSSES[term.loss].function(alone[k].inputs, term.pair).loss.detach()
            found = multi_teacher(alone, **given).loss.detach()
            row.append(found / whole if float(whole) else torch.zeros_like(whole))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_a_teacher_without_a_chunk_in_a_sample_takes_nothing_from_the_others() -> None:
    terms = terms_of()
    chunks = terms[1].inputs.chunks
    kept = (chunks.sample != 0).nonzero().flatten()
    some = ChunkBatch.from_ranges(
        *(
            getattr(chunks, name)[kept]
            for name in ("sample", "student_start", "student_end", "teacher_start", "teacher_end")
        ),
        chunks.kind[kept],
    )
    terms[1] = replace(terms[1], inputs=replace(terms[1].inputs, chunks=some))
    wanted = torch.tensor([[1.0, 0.5, 0.5], [0.0, 0.5, 0.5]], dtype=torch.float64)
    for confidence in ("ce", "entropy", "max_prob"):
        torch.testing.assert_close(shares_of(terms, weights=confidence, sharpness=0), wanted)
        found = shares_of(terms, weights=confidence)
        torch.testing.assert_close(found[:, 0], wanted[:, 0])
        torch.testing.assert_close(found.sum(0), torch.ones_like(found[0]))


def test_teachers_that_give_the_text_no_probability_weigh_alike_where_none_does_better() -> None:
    terms = terms_of()

    def impossible(term: TeacherTerm) -> TeacherTerm:
        chunks, teacher = term.inputs.chunks, term.inputs.teacher.clone()
        place = int((chunks.sample == 0).nonzero()[0])
        at = int(chunks.teacher_start[place])
        teacher[0, at - 1, term.inputs.teacher_ids[0, at]] = -torch.inf
        return replace(term, inputs=replace(term.inputs, teacher=teacher))

    none = shares_of([impossible(term) for term in terms], weights="ce")
    one = shares_of([impossible(terms[0]), terms[1]], weights="ce")
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(none[:, 0], half)
    torch.testing.assert_close(one[:, 0], torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(none[:, 1:], shares_of(terms, weights="ce")[:, 1:])


def test_a_teacher_of_nan_is_refused_by_its_own_place() -> None:
    terms = terms_of()
    teacher = terms[1].inputs.teacher.clone()
    at = int(terms[1].inputs.chunks.teacher_start[0]) - 1
    teacher[0, at, 2] = torch.nan
    broken = replace(terms[1], inputs=replace(terms[1].inputs, teacher=teacher))
    with pytest.raises(NonFiniteError, match=rf"teacher\[0, {at}, 2\] = nan"):
        multi_teacher([terms[0], broken], weights="entropy")


def test_wrong_weights_are_refused() -> None:
    terms = terms_of()
    with pytest.raises(OptionError, match="terms is empty"):
        multi_teacher([])
    with pytest.raises(OptionError, match="expected 2 finite numbers"):
        multi_teacher(terms, weights=[1.0])
    with pytest.raises(OptionError, match="expected numbers or ce, entropy, max_prob"):
        multi_teacher(terms, weights="margin")
    bare = [replace(t, inputs=replace(t.inputs, teacher_ids=None)) for t in terms]
    with pytest.raises(OptionError, match="needs teacher_ids"):
        multi_teacher(bare, weights="ce")
    other = replace(terms[1].inputs, student=terms[1].inputs.student.detach())
    with pytest.raises(ShapeError, match=r"terms\[1\] has another student"):
        multi_teacher([terms[0], replace(terms[1], inputs=other)])
