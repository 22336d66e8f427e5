"""P-KL against a float64 loop, in every mode, and its known answers."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from gradients import gradcheck
from loss_cases import EXACT, MISMATCH, make_case, p_kl, same_model

from xtoken.errors import ArgumentTypeError, NonFiniteError, OptionError, PairError, ShapeError
from xtoken.losses import TeacherTopK
from xtoken.losses.engine.row_blocks import BlockLoss
from xtoken.losses.p_kl.loss import PKLBlocks
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.projection import SparseProjection

import reference_losses as reference

MODES = [(None, "chunk"), (4, "chunk"), (4, "microbatch"), (1, "chunk"), (99, "microbatch")]
MERGES = ["chain", "last", "mean"]
DIRECTIONS = ["forward", "reverse", "jsd"]


def dense(projection: SparseProjection) -> torch.Tensor:
    return reference.dense(
        projection.indptr, projection.indices, projection.weights, projection.shape
    )


@pytest.mark.parametrize(("mode", "merge", "tail"), [*product(MODES, MERGES, [False, True])])
def test_value_and_gradient_are_those_of_the_loop(
    mode: tuple[int | None, str], merge: str, tail: bool
) -> None:
    case = make_case(1)
    w = dense(case.projection)
    for direction in DIRECTIONS:
        options = {
            "top_k": mode[0], "top_k_scope": mode[1], "tail_bucket": tail, "merge": merge,
            "direction": direction, "temperature": 1.7, "beta": 0.3,
        }  # fmt: skip
        slow = reference.p_kl(case.student_logits, case.teacher_logits, w, case.usable, **options)
        fast = p_kl(
            case.student_logits, case.teacher_logits, case.projection, case.usable,
            normalizer=1.0, block_size=2, **options,
        ).loss  # fmt: skip
        assert torch.allclose(fast, slow, rtol=1e-9)
        (found,) = torch.autograd.grad(fast, case.student_logits)
        (wanted,) = torch.autograd.grad(slow, case.student_logits)
        assert torch.allclose(found, wanted, atol=1e-11)


@pytest.mark.parametrize(("mode", "merge"), [*product(MODES, MERGES)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(mode: tuple[int | None, str], merge: str, direction: str) -> None:
    case = make_case(2, batch=1, chunks=8, v_s=6, v_t=5, padded=1)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return p_kl(
            logits, case.teacher_logits, case.projection, case.usable, top_k=mode[0],
            top_k_scope=mode[1], merge=merge, direction=direction, block_size=2,
        ).loss  # fmt: skip

    assert len(case.usable) > 0
    # The one column that is kept has all of the mass.
    assert gradcheck(loss, (case.student_logits,), constant=mode[0] == 1)


# Under the identity nothing lies outside of all columns, so a tail needs a true top k.
TAILS = [(mode, False) for mode in MODES] + [(mode, True) for mode in MODES if mode[0] in (1, 4)]


@pytest.mark.parametrize(("mode", "tail"), TAILS)
@pytest.mark.parametrize("merge", MERGES)
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(
    mode: tuple[int | None, str], tail: bool, merge: str
) -> None:
    case = same_model()
    for direction in DIRECTIONS:
        result = p_kl(
            case.student_logits, case.teacher_logits, case.projection, case.usable, top_k=mode[0],
            top_k_scope=mode[1], tail_bucket=tail, merge=merge, direction=direction,
        )  # fmt: skip
        (found,) = torch.autograd.grad(result.loss, case.student_logits)
        assert abs(result.loss.item()) < 1e-12
        assert float(found.abs().max()) < 1e-12


def test_with_the_identity_for_w_it_is_plain_kl() -> None:
    case = make_case(4, v_s=12, v_t=12)
    w = SparseProjection.identity(12)
    found = p_kl(case.student_logits, case.teacher_logits, w, case.usable)
    rows = case.usable.sample, case.usable.student_start - 1
    others = case.usable.sample, case.usable.teacher_start - 1
    wanted = torch.nn.functional.kl_div(
        torch.log_softmax(case.student_logits[rows][:, :12], -1),
        torch.log_softmax(case.teacher_logits[others][:, :12], -1),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    assert torch.allclose(found.loss, wanted)


@pytest.mark.parametrize("seed", range(8))
def test_it_is_never_negative(seed: int) -> None:
    case = make_case(seed, scale=5.0)
    for (k, scope), merge, tail in product(MODES, MERGES, [False, True]):
        loss = p_kl(
            case.student_logits, case.teacher_logits, case.projection, case.usable, top_k=k,
            top_k_scope=scope, merge=merge, tail_bucket=tail,
        ).loss  # fmt: skip
        assert loss.item() >= -1e-12


def numerals() -> tuple[torch.Tensor, torch.Tensor, SparseProjection, ChunkBatch, dict[str, int]]:
    """The paper's example: a student with `201` in one token, a teacher that spells 2, 0, 1."""
    student = {name: i for i, name in enumerate(["201", "2", "0", "1", "the", "a", "3"])}
    teacher = {name: i for i, name in enumerate(["2", "0", "1", "the", "a", "3"])}
    ptr, ids, weights = [0], [], []
    for name in student:
        pieces = [teacher[x] for x in ("2", "0", "1")] if name == "201" else [teacher[name]]
        share = [0.1**i for i in range(len(pieces))]
        ids += pieces
        weights += [x / sum(share) for x in share]
        ptr.append(len(ids))
    projection = SparseProjection.from_csr(ptr, ids, weights, (len(student), len(teacher)))
    teacher_logits = torch.full((1, 4, len(teacher)), -8.0, dtype=torch.float64)
    for position, name in enumerate(["2", "0", "1"]):
        teacher_logits[0, position, teacher[name]] = 8.0
    student_logits = torch.zeros(1, 2, len(student), dtype=torch.float64, requires_grad=True)
    one = torch.tensor([1])
    chunks = ChunkBatch.from_ranges(one * 0, one, one + 1, one, one + 3)
    return student_logits, teacher_logits, projection, chunks, student


def test_a_teacher_sure_of_the_digits_raises_the_students_numeral() -> None:
    student_logits, teacher_logits, projection, chunks, ids = numerals()
    for k, scope in MODES[:3]:
        loss = p_kl(
            student_logits, teacher_logits, projection, chunks, top_k=k, top_k_scope=scope
        ).loss
        (grad,) = torch.autograd.grad(loss, student_logits)
        assert float(grad[0, 0, ids["201"]]) < 0
        assert float(grad[0, 0, ids["the"]]) >= 0


@pytest.mark.parametrize(("scope", "tail"), [*product(["chunk", "microbatch"], [False, True])])
def test_a_stored_top_k_of_the_whole_vocabulary_says_what_the_logits_say(
    scope: str, tail: bool
) -> None:
    case = make_case(5)
    stored = TeacherTopK.from_logits(case.teacher_logits, 11, vocab_size=11)
    options = {"top_k": 5, "top_k_scope": scope, "tail_bucket": tail}
    found, wanted = (
        p_kl(case.student_logits, teacher, case.projection, case.usable, **options)
        for teacher in (stored, case.teacher_logits)
    )
    assert torch.allclose(found.loss, wanted.loss)
    assert torch.allclose(found.metrics["teacher_mass"], wanted.metrics["teacher_mass"])
    gradients = [torch.autograd.grad(r.loss, case.student_logits)[0] for r in (found, wanted)]
    assert torch.allclose(*gradients)


def test_a_stored_top_k_in_chunk_scope_keeps_its_supported_columns() -> None:
    case = make_case(6)
    stored = TeacherTopK.from_logits(case.teacher_logits, 5, vocab_size=11)
    w = dense(case.projection)
    total = torch.zeros((), dtype=torch.float64)
    counted = 0
    both = reference.pairs(
        case.student_logits, case.teacher_logits, case.usable, "chain", 1.0, 13, 11
    )
    for p, q in both:
        kept = [int(t) for t in torch.topk(q, 5).indices if float(w[:, int(t)].sum()) > 0]
        a, b = q[kept], (p @ w)[kept]
        total = total + reference.kl(a / a.sum(), b / b.sum())
        counted += 1
    found = p_kl(case.student_logits, stored, case.projection, case.usable).loss
    assert torch.allclose(found, total / counted)


def test_a_stored_top_k_is_read_at_another_temperature_within_its_entries() -> None:
    case = make_case(7)
    at_one, at_two = (
        TeacherTopK.from_logits(case.teacher_logits, 5, vocab_size=11, temperature=t)
        for t in (1.0, 2.0)
    )
    found, wanted = (
        p_kl(case.student_logits, stored, case.projection, case.usable, temperature=2.0).loss
        for stored in (at_one, at_two)
    )
    assert torch.allclose(found, wanted)
    with pytest.raises(OptionError, match="the loss asks for 2"):
        p_kl(
            case.student_logits, at_one, case.projection, case.usable, temperature=2.0,
            tail_bucket=True, top_k=3,
        )  # fmt: skip


def test_a_chunk_whose_stored_columns_w_never_reaches_adds_nothing() -> None:
    case = make_case(8)
    lost = (~case.projection.supported).nonzero().flatten()[:1]
    shape = (*case.teacher_ids.shape, 1)
    stored = TeacherTopK(lost.expand(shape).contiguous(), torch.zeros(shape, dtype=torch.float64))
    loss = p_kl(case.student_logits, stored, case.projection, case.usable).loss
    (grad,) = torch.autograd.grad(loss, case.student_logits)
    assert loss.item() == 0.0
    assert not grad.any()


def test_learnable_weights_get_the_gradient_of_the_loop() -> None:
    for (k, scope), tail in product(MODES, [False, True]):
        case = make_case(9)
        plain = case.projection
        learnable = SparseProjection.from_csr(
            plain.indptr, plain.indices, plain.weights, plain.shape, learnable=True
        )
        assert learnable.free is not None
        fast = p_kl(
            case.student_logits, case.teacher_logits, learnable, case.usable, top_k=k,
            top_k_scope=scope, tail_bucket=tail, normalizer=1.0, block_size=2,
        ).loss  # fmt: skip
        w = torch.zeros(plain.shape, dtype=torch.float64)
        w = w.index_put((learnable.row_of, learnable.indices), learnable.values())
        slow = reference.p_kl(
            case.student_logits, case.teacher_logits, w, case.usable, top_k=k, top_k_scope=scope,
            tail_bucket=tail,
        )  # fmt: skip
        inputs = (case.student_logits, learnable.free)
        for found, wanted in zip(
            torch.autograd.grad(fast, inputs), torch.autograd.grad(slow, inputs), strict=True
        ):
            assert torch.allclose(found, wanted, atol=1e-10)


def test_metrics_are_detached_means_over_chunks() -> None:
    case = make_case(10)
    result = p_kl(
        case.student_logits, case.teacher_logits, case.projection, case.usable, top_k=4,
        top_k_scope="microbatch", temperature=2.0, full_metrics=True,
    )  # fmt: skip
    assert set(result.metrics) == {"kl", "teacher_mass", "top1_agreement", "empty_row_mass"}
    assert not any(value.requires_grad for value in result.metrics.values())
    assert torch.allclose(result.metrics["kl"] * 4.0, result.loss)
    assert int(result.num_chunks) == len(case.usable)
    w = dense(case.projection)
    pairs = list(
        reference.pairs(case.student_logits, case.teacher_logits, case.usable, "chain", 2.0, 13, 11)
    )
    empty = sum(p[w.sum(1) == 0].sum().item() for p, _ in pairs) / len(pairs)
    assert float(result.metrics["empty_row_mass"]) == pytest.approx(empty)
    part = p_kl(
        case.student_logits, case.teacher_logits, case.projection, case.usable, top_k=4,
        top_k_scope="microbatch", temperature=2.0,
    )  # fmt: skip
    assert torch.allclose(part.loss, result.loss)
    assert "empty_row_mass" not in part.metrics


def test_finite_logits_far_apart_give_a_finite_loss() -> None:
    case = make_case(11, dtype=torch.float32)
    with torch.no_grad():
        case.student_logits[..., ::2] -= 500.0
    result = p_kl(case.student_logits, case.teacher_logits, case.projection, case.usable)
    result.loss.backward()
    assert torch.isfinite(result.loss)
    assert case.student_logits.grad is not None
    assert torch.isfinite(case.student_logits.grad).all()
    assert result.loss.item() > 10.0


def test_a_student_without_mass_where_the_teacher_has_some_is_infinitely_far() -> None:
    case = make_case(12)
    column = int(case.projection.indices[0])
    sources = case.projection.row_of[case.projection.indices == column]
    with torch.no_grad():
        case.student_logits[..., sources] = -torch.inf
    loss = p_kl(case.student_logits, case.teacher_logits, case.projection, case.usable).loss
    assert torch.isposinf(loss)


def test_what_does_not_fit_is_refused_by_name() -> None:
    case = make_case(14)
    student, teacher, w, chunks = (
        case.student_logits, case.teacher_logits, case.projection, case.usable,
    )  # fmt: skip
    for match, call in {
        "top_k = 0": {"top_k": 0},
        "top_k_scope = 'batch'": {"top_k_scope": "batch"},
        "temperature = 0": {"temperature": 0.0},
        "direction = 'both'": {"direction": "both"},
        "beta = 1.0": {"direction": "jsd", "beta": 1.0},
        "merge = 'sum'": {"merge": "sum"},
        "normalizer = 0": {"normalizer": 0.0},
    }.items():
        with pytest.raises(OptionError, match=match):
            p_kl(student, teacher, w, chunks, **call)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ShapeError, match=r"student_ids has shape \(1, 1\)"):
        p_kl(student, teacher, w, chunks, student_ids=ids)
    with pytest.raises(ShapeError, match="fewer than the student vocabulary of 13"):
        p_kl(student[..., :12], teacher, w, chunks)
    with pytest.raises(ShapeError, match="fewer than V_t = 11"):
        p_kl(student, teacher[..., :9], w, chunks)
    with pytest.raises(ShapeError, match="alignments of this batch"):
        p_kl(student[:, :3], teacher, w, chunks)
    with pytest.raises(ShapeError, match="the student has 1 samples, the teacher 2"):
        p_kl(student[:1], teacher, w, chunks)
    with pytest.raises(ShapeError, match=r"chunks are on meta, .* pass chunks\.to"):
        p_kl(student, teacher, w, chunks.to("meta"))
    with pytest.raises(PairError, match=r"projection of the pair is on meta, .* or distiller\.to"):
        p_kl(student, teacher, SparseProjection.identity(13).to("meta"), chunks)
    with pytest.raises(ShapeError, match="no predictor"):
        p_kl(student, teacher, w, case.chunks)
    with pytest.raises(ArgumentTypeError, match=r"student is numpy\.ndarray, expected Tensor"):
        p_kl(student.detach().numpy(), teacher, w, chunks)
    stored = TeacherTopK.from_logits(teacher, 3, vocab_size=11)
    with pytest.raises(OptionError, match="merge='mean' needs the teacher's full logits"):
        p_kl(student, stored, w, chunks, merge="mean")
    empty = SparseProjection.from_csr([0] * 14, [], [], (13, 11))
    with pytest.raises(PairError, match="reaches no teacher column"):
        p_kl(student, teacher, empty, chunks)
    full = SparseProjection.from_csr(range(14), [i % 11 for i in range(13)], [1.0] * 13, (13, 11))
    with pytest.raises(OptionError, match="no student token outside"):
        p_kl(student, teacher, full, chunks, tail_bucket=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_nan_or_infinite_is_named(bad: float) -> None:
    case = make_case(15)
    sample, position = int(case.usable.sample[0]), int(case.usable.student_start[0]) - 1
    source = int(case.projection.row_of[0])
    with torch.no_grad():
        case.student_logits[sample, position, source] = bad
    with pytest.raises(
        NonFiniteError, match=rf"student_logits\[{sample}, {position}, {source}\] = "
    ):
        p_kl(case.student_logits, case.teacher_logits, case.projection, case.usable)
    case = make_case(15)
    case.teacher_logits[sample, int(case.usable.teacher_start[0]) - 1, 2] = bad
    with pytest.raises(NonFiniteError, match=rf"teacher\[{sample}, \d+, 2\] = "):
        p_kl(case.student_logits, case.teacher_logits, case.projection, case.usable)


def test_mismatched_chunks_count_where_admitted() -> None:
    case = make_case(16)
    more = case.chunks.usable(case.student_mask, case.teacher_mask, admit=(EXACT, MISMATCH))
    assert len(more) > len(case.usable)
    assert torch.isfinite(
        p_kl(case.student_logits, case.teacher_logits, case.projection, more).loss
    )


@pytest.mark.parametrize(("mode", "merge", "tail"), [*product(MODES, MERGES, [False, True])])
def test_the_closed_form_is_what_autograd_finds(
    mode: tuple[int | None, str], merge: str, tail: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(17, dtype=torch.float32, v_s=60, v_t=50, chunks=30)
    options = {
        "top_k": mode[0], "top_k_scope": mode[1], "merge": merge, "tail_bucket": tail,
        "temperature": 1.3, "full_metrics": True,
        "chunk_weights": torch.linspace(0.5, 1.5, len(case.usable)),
    }  # fmt: skip
    args = (case.student_logits, case.teacher_logits, case.projection, case.usable)
    _compare_closed_form(args, options, [case.student_logits], monkeypatch)


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_closed_form_of_a_stored_top_k_is_what_autograd_finds(
    mode: tuple[int | None, str], tail: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(18, dtype=torch.float32, v_s=60, v_t=50, chunks=30)
    stored = TeacherTopK.from_logits(case.teacher_logits, 45, vocab_size=50)
    learnable = SparseProjection.from_csr(
        case.projection.indptr, case.projection.indices, case.projection.weights,
        case.projection.shape, learnable=True,
    )  # fmt: skip
    args = (case.student_logits, stored, learnable, case.usable)
    options = {"top_k": mode[0], "top_k_scope": mode[1], "tail_bucket": tail}
    _compare_closed_form(args, options, [case.student_logits, learnable.free], monkeypatch)


def _compare_closed_form(args, options, leaves, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    closed = PKLBlocks._closed_form
    monkeypatch.setattr(
        PKLBlocks, "_closed_form", lambda *given: taken.append(closed(*given)) or taken[-1]
    )
    found = p_kl(*args, **options)
    assert taken
    assert None not in taken
    monkeypatch.setattr(PKLBlocks, "value_and_grad", BlockLoss.value_and_grad)
    wanted = p_kl(*args, **options)
    assert torch.allclose(found.loss, wanted.loss, rtol=1e-5)
    for one, other in zip(
        torch.autograd.grad(found.loss, leaves), torch.autograd.grad(wanted.loss, leaves),
        strict=True,
    ):  # fmt: skip
        assert torch.allclose(one, other, atol=1e-6)
    for name, value in wanted.metrics.items():
        assert torch.allclose(found.metrics[name], value, rtol=1e-5), name


@pytest.mark.parametrize(("scope", "tail"), [*product(["chunk", "microbatch"], [False, True])])
def test_the_pads_of_a_short_stored_row_change_nothing(scope: str, tail: bool) -> None:
    case = make_case(19)
    stored = TeacherTopK.from_logits(case.teacher_logits, 4, vocab_size=case.v_t)
    pads = (*stored.ids.shape[:2], 3)
    padded = TeacherTopK(
        torch.cat([stored.ids, stored.ids[..., :1].expand(pads)], -1),
        torch.cat([stored.log_probs, torch.full(pads, -torch.inf)], -1),
    )
    found, wanted = (
        p_kl(
            case.student_logits, teacher, case.projection, case.usable, top_k=4,
            top_k_scope=scope, tail_bucket=tail,
        )
        for teacher in (padded, stored)
    )  # fmt: skip
    gradients = [torch.autograd.grad(x.loss, case.student_logits)[0] for x in (found, wanted)]
    torch.testing.assert_close(found.loss, wanted.loss)
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(found.metrics, wanted.metrics)


def test_a_tail_of_little_mass_keeps_its_digits_in_float32() -> None:
    """1 minus the kept mass would be 0 here."""
    projection = SparseProjection.from_csr(torch.arange(5), torch.arange(4), torch.ones(4), (4, 4))
    one = torch.tensor([1])
    chunks = ChunkBatch.from_ranges(torch.tensor([0]), one, one + 1, one, one + 1)
    student = torch.tensor([[[20.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]], requires_grad=True)
    teacher = torch.tensor([[[3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    found, wanted = (
        p_kl(student.to(dtype), teacher.to(dtype), projection, chunks, top_k=2, tail_bucket=True)
        for dtype in (torch.float32, torch.float64)
    )
    gradients = [torch.autograd.grad(x.loss, student)[0] for x in (found, wanted)]
    torch.testing.assert_close(found.loss, wanted.loss, check_dtype=False)
    torch.testing.assert_close(*gradients)
