"""GOLD and H-KL against a float64 loop, Proposition 1, and the sorted L1 under them."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from gradients import gradcheck
from loss_cases import common_set, loss_of, make_case

from xtoken.errors import OptionError, ShapeError, TokenIdError
from xtoken.losses import CommonSet, PairParts, TeacherTopK
from xtoken.losses.engine import sorting
from xtoken.losses.engine.sorting import sorted_l1
from xtoken.tensors.chunks import ChunkBatch

import reference_losses as reference

COMMON = [(0, 3), (2, 0), (5, 5), (7, 10), (12, 1)]


def gold(student, teacher, chunks, common=None, sizes=(13, 11), **given):
    pairs = list(zip(*COMMON, strict=True)) if common is None else common
    pair = PairParts(sizes, strict_common=common_set(*map(list, pairs)))
    return loss_of("gold", student, teacher, chunks, pair, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("merge", ["chain", "mean"])
@pytest.mark.parametrize("common", [COMMON, []])
def test_wide_rows_too_have_the_value_and_gradient_of_the_loop(
    common: list[tuple[int, int]], merge: str, dtype: torch.dtype
) -> None:
    """Single precision by the core; the gradient written a row at a time."""
    case = make_case(8)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(*x.shape[:2], size, generator=generator, dtype=torch.float64) * 4.0
        for x, size in ((case.student_logits, 2100), (case.teacher_logits, 3000))
    )
    student.requires_grad_()
    options = {"merge": merge, "temperature": 0.7, "uld_weight": 1.3}
    slow = reference.hybrid(student, teacher, case.usable, common, 2100, 3000, **options)
    (wanted,) = torch.autograd.grad(slow, student)
    logits = student.detach().to(dtype).requires_grad_()
    strict = common_set(*map(list, zip(*common, strict=True))) if common else None
    pair = PairParts((2100, 3000), strict_common=strict)
    name = "gold" if common else "uld"
    # ULD's own loss has no weights.
    scale = 1.0 if common else options.pop("uld_weight")
    fast = (
        scale
        * loss_of(
            name, logits, teacher.to(dtype), case.usable, pair, normalizer=1.0, **options
        ).loss
    )
    single = dtype == torch.float32
    assert torch.allclose(fast.double(), slow, rtol=1e-5 if single else 1e-9)
    (found,) = torch.autograd.grad(fast, logits)
    assert torch.allclose(found.double(), wanted, atol=1e-6 if single else 1e-11)
    assert wanted.abs().max() > 1e-3


@pytest.mark.parametrize("merge", ["chain", "last", "mean"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_value_and_gradient_are_those_of_the_loop(merge: str, direction: str) -> None:
    case = make_case(1)
    options = {
        "merge": merge, "direction": direction, "beta": 0.3, "temperature": 1.5,
        "common_weight": 0.7, "uld_weight": 1.3,
    }  # fmt: skip
    slow = reference.hybrid(
        case.student_logits, case.teacher_logits, case.usable, COMMON, 13, 11, **options
    )
    fast = gold(
        case.student_logits, case.teacher_logits, case.usable, normalizer=1.0, block_size=2,
        **options,
    ).loss  # fmt: skip
    assert torch.allclose(fast, slow, rtol=1e-9)
    (found,) = torch.autograd.grad(fast, case.student_logits)
    (wanted,) = torch.autograd.grad(slow, case.student_logits)
    assert torch.allclose(found, wanted, atol=1e-11)


@pytest.mark.parametrize(
    ("merge", "direction"), [*product(["chain", "last", "mean"], ["forward", "reverse", "jsd"])]
)
def test_gradcheck(merge: str, direction: str) -> None:
    case = make_case(2, batch=1, chunks=8)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return gold(
            logits, case.teacher_logits, case.usable, merge=merge,
            direction=direction,
        ).loss  # fmt: skip

    assert gradcheck(loss, (case.student_logits,))


def test_the_common_kl_pushes_every_uncommon_token_down_by_its_share_of_the_common_mass() -> None:
    """Proposition 1: the gradient on an uncommon student logit j is p[j] * M_C."""
    case = make_case(3)
    found = gold(
        case.student_logits, case.teacher_logits, case.usable, uld_weight=0.0, normalizer=1.0,
    ).loss  # fmt: skip
    (grad,) = torch.autograd.grad(found, case.student_logits)
    uncommon = [s for s in range(13) if s not in [a for a, _ in COMMON]]
    pairs = reference.pairs(
        case.student_logits, case.teacher_logits, case.usable, "chain", 1.0, 13, 11
    )
    for c, (p, q) in enumerate(pairs):
        mass = q[[t for _, t in COMMON]].sum()
        row = grad[int(case.usable.sample[c]), int(case.usable.student_start[c]) - 1]
        assert torch.allclose(row[uncommon], (p * mass)[uncommon].detach())
        assert (row[uncommon] > 0).all()


def test_a_teacher_sure_of_the_digits_lowers_the_students_numeral() -> None:
    """The student's `201` (id 0) has no partner: GOLD pushes it down, though it is right."""
    student_logits = torch.zeros(1, 2, 7, dtype=torch.float64, requires_grad=True)
    teacher_logits = torch.full((1, 4, 6), -8.0, dtype=torch.float64)
    for position in range(3):
        teacher_logits[0, position, position] = 8.0
    one = torch.tensor([1])
    chunks = ChunkBatch.from_ranges(one * 0, one, one + 1, one, one + 3)
    common = [list(range(1, 7)), list(range(6))]
    loss = gold(student_logits, teacher_logits, chunks, common, (7, 6)).loss
    (grad,) = torch.autograd.grad(loss, student_logits)
    assert grad[0, 0, 0].item() > 0


def test_a_stored_top_k_of_the_whole_vocabulary_says_what_the_logits_say() -> None:
    case = make_case(4)
    stored = TeacherTopK.from_logits(case.teacher_logits, 11, vocab_size=11)
    found, wanted = (
        gold(case.student_logits, teacher, case.usable).loss
        for teacher in (stored, case.teacher_logits)
    )
    assert torch.allclose(found, wanted)


def test_an_empty_and_a_full_common_set_are_the_two_halves() -> None:
    case = make_case(5, v_s=11, v_t=11)
    none = torch.zeros(0, dtype=torch.int64)
    every = list(range(11))
    args = (case.student_logits, case.teacher_logits, case.usable)
    empty = PairParts((11, 11), strict_common=CommonSet(none, none))
    only_uld = loss_of("gold", *args, empty)
    only_kl = gold(*args, [every, every], (11, 11))
    assert only_uld.metrics["kl"].item() == 0.0
    assert only_kl.metrics["uld"].item() == 0.0
    count = len(case.usable)
    kl = reference.same_vocab_kl(*args, 11) / count
    uld = reference.hybrid(*args, [], 11, 11) / count
    assert torch.allclose(only_kl.loss, kl)
    assert torch.allclose(only_uld.loss, uld)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(40, 25), (25, 40), (30, 30), (1, 5), (0, 3)])
def test_sorted_l1_is_that_of_a_plain_sort(dtype: torch.dtype, n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(n)
    p, q = (torch.rand(6, size, generator=generator, dtype=dtype) for size in (n, m))
    if n > 5:
        p[:, 3] = p[:, 4] = 0.5  # equal values keep their order
        p[0, :3] = 0.0
    p.requires_grad_()
    found = sorted_l1(p, q)
    wanted = torch.stack([reference.sorted_l1(a, b) for a, b in zip(p, q, strict=True)])
    assert torch.allclose(found, wanted)
    factor = torch.rand(6, generator=generator, dtype=dtype)
    (grad,) = torch.autograd.grad((found * factor).sum(), p, retain_graph=True)
    (slow,) = torch.autograd.grad((wanted * factor).sum(), p)
    ties = torch.zeros_like(p, dtype=torch.bool)
    if n > 5:
        ties[:, 3:5] = True  # a tie's signs may change places
        ties[0, :3] = True  # at 0 against the padding any sign is a subgradient
    assert torch.allclose(grad[~ties], slow[~ties])
    with torch.no_grad():
        assert torch.allclose(sorted_l1(p, q), wanted)


SPREADS = {"peaked": (8.0, 3.0), "like": (3.0, 3.0), "flat": (0.01, 0.01), "far": (30.0, 60.0)}


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(("n", "m"), [(900, 1400), (1400, 900), (1100, 1100), (1, 700), (700, 1)])
def test_the_core_says_what_sorting_says(spread: str, n: int, m: int) -> None:
    """Values, and every sign, of ties too: with zeros, subnormal numbers and equal rows."""
    generator = torch.Generator().manual_seed(n)
    p, q = (
        torch.softmax(torch.randn(7, size, generator=generator) * scale, 1)
        for size, scale in zip((n, m), SPREADS[spread], strict=True)
    )
    p[1, n // 2 :] = 0.0
    q[2, m // 3 :] = 0.0
    p[3, ::2], q[3, ::3] = p[3, -1], p[3, -1]
    width = min(n, m)
    q[4, :width] = p[4, :width].flip(0)
    p[5], q[5] = 0.0, 0.0
    found, signs = sorting._by_core(p, q, True)
    wanted, others = sorting._by_sorting(p.double(), q.double(), True)
    _, singly = sorting._by_sorting(p, q, True)
    assert signs is not None
    assert others is not None
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), wanted, rtol=1e-6, atol=1e-9)
    assert torch.equal(signs.double(), others)
    assert torch.equal(signs, singly)
    assert torch.equal(sorting._by_core(p, q, False)[0], found)
    assert not sorting._by_core(p, p.flip(1), True)[1].any()


def test_a_row_that_holds_no_probabilities_is_as_sorting_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.rand(7, 12, generator=generator), torch.rand(7, 9, generator=generator)
    for row, bad in enumerate([torch.nan, torch.inf, -0.0, -0.5]):
        (q if row % 2 else p)[row, 3] = bad
    p[4, 2] = q[4, 2] = torch.inf
    wanted = sorting._by_sorting(p, q, True)
    for found, expected in zip(sorting._by_core(p, q, True), wanted, strict=True):
        assert torch.allclose(found, expected, equal_nan=True)
    for sides in ((p[:0], q[:0]), (p[:, :0], q), (p.double(), q.double()), (p.half(), q.half())):
        monkeypatch.setattr(sorting, "_by_core", None)  # these are sorted
        assert torch.allclose(
            sorted_l1(*sides), sorting._by_sorting(*sides, False)[0], equal_nan=True
        )


@pytest.mark.parametrize("name", ["gold", "h-kl"])
def test_no_common_token_and_no_weight_on_the_rest_is_zero_with_a_graph(name: str) -> None:
    case = make_case(6)
    none = CommonSet(*[torch.zeros(0, dtype=torch.int64)] * 2)
    pair = PairParts((13, 11), strict_common=none, relaxed_common=none)
    loss = case.loss(name, pair=pair, uld_weight=0.0).loss
    (grad,) = torch.autograd.grad(loss, case.student_logits)
    assert loss.item() == 0.0
    assert not grad.any()


def test_a_common_set_that_is_not_one_to_one_is_refused() -> None:
    case = make_case(7)
    args = (case.student_logits, case.teacher_logits, case.usable)
    for student, teacher, error, match in (
        ([0, 0], [1, 2], TokenIdError, "student_ids names a token twice"),
        ([0, 1], [2, 2], TokenIdError, "teacher_ids names a token twice"),
        ([13], [0], TokenIdError, r"spans \[13, 13\], outside the vocabulary \(V = 13\)"),
        ([0, 1], [0], ShapeError, "two lists of one length"),
        ([0.0], [0], ShapeError, r"expected torch\.int64"),
    ):
        with pytest.raises(error, match=match):
            gold(*args, common=[student, teacher])
    with pytest.raises(OptionError, match=r"uld_weight = -1\.0"):
        gold(*args, uld_weight=-1.0)


def test_the_reverse_kl_of_a_stored_top_k_is_refused_unless_all_is_stored() -> None:
    case = make_case(2)
    for k in (4, 11):
        stored = TeacherTopK.from_logits(case.teacher_logits, k, vocab_size=11)
        args = (case.student_logits, stored, case.usable)
        assert torch.isfinite(gold(*args, direction="jsd").loss)
        if k == 11:
            assert torch.isfinite(gold(*args, direction="reverse").loss)
        else:
            with pytest.raises(OptionError, match="'reverse' with a stored top-4 is infinite"):
                gold(*args, direction="reverse")
