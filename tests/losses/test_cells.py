"""P-KL and prefix KL on cells, and without what the student's tokenizer would have joined."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from byte_cases import make_byte_case, random_pair
from loss_cases import Case
from torch import Tensor

from xtoken import Projection, Vocab
from xtoken.errors import OptionError, PairError
from xtoken.losses import LOSSES, LossOptions, LossOutput, PairParts, TeacherTopK
from xtoken.tensors.cells import CellFold, Cells

import reference_losses as reference

NEEDS = {"projection", "tries", "cells"}


@dataclass
class CellCase:
    case: Case
    student: Vocab
    teacher: Vocab
    projection: Projection

    def loss(self, name: str = "p-kl", **given: object) -> LossOutput:
        ids = {"student_ids": self.case.student_ids, "teacher_ids": self.case.teacher_ids}
        return self.case.loss(name, **{**ids, **given})


def make(seed: int, **given: object) -> CellCase:
    found = make_byte_case(seed, letters=30, **given)
    student, teacher, projection = random_pair(seed % 7, 14, 12)
    pair = PairParts.from_projection(projection, needs=NEEDS)
    return CellCase(replace(found.batch, pair=pair), student, teacher, projection)


def column_map(case: CellCase) -> Tensor:
    """[V_t, V_t] the root map, from its definition by bytes and each side's own segmentation."""
    size = len(case.teacher)
    known = {case.student.token_bytes(i) for i in range(len(case.student))} - {b""}

    def root(token: int) -> int:
        text = case.teacher.token_bytes(token)
        if not text or text in known:
            return case.teacher.id_of(text) if text else token
        first = case.student.segment(text)[0]
        return root(case.teacher.segment(case.student.token_bytes(first))[0])

    moved = torch.zeros(size, size, dtype=torch.float64)
    for token in range(size):
        moved[token, root(token)] = 1
    return moved


def swallowed(case: CellCase, last: int) -> list[int]:
    """The teacher's tokens behind which the student would not keep its last token."""
    before = case.student.token_bytes(last)
    found = []
    for token in range(len(case.teacher)):
        text = case.teacher.token_bytes(token)
        if before and text:
            first = case.student.token_bytes(case.student.segment(text)[0])
            if case.student.segment(before + first)[0] != case.student.id_of(before):
                found.append(token)
    return found


def slow(case: CellCase, *, cells: bool, consistent: bool, **options: object) -> Tensor:
    """The reference P-KL of the mapped W and of a teacher whose rows are mapped and masked."""
    batch, total = case.case, torch.zeros((), dtype=torch.float64)
    matrix = case.projection
    w = reference.dense(matrix.indptr, matrix.indices, matrix.weights, matrix.shape)
    moved = column_map(case) if cells else torch.eye(matrix.shape[1], dtype=torch.float64)
    for c in range(len(batch.usable)):
        one = batch.usable.select(torch.tensor([c]))
        b, start = int(one.sample[0]), int(one.student_start[0])
        rows = torch.softmax(batch.teacher_logits[..., : matrix.shape[1]].double(), -1)
        if consistent:
            rows = rows.clone()
            rows[..., swallowed(case, int(batch.student_ids[b, start - 1]))] = 0
        logits = torch.log(rows @ moved)
        total = total + reference.p_kl(batch.student_logits, logits, w @ moved, one, **options)
    return total


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("cells", "consistent"), [(True, False), (False, True), (True, True)])
def test_value_and_gradient_are_those_of_the_loop(seed: int, cells: bool, consistent: bool) -> None:
    case = make(seed)
    options = {"direction": ("forward", "jsd")[seed % 2], "tail_bucket": False}
    if seed % 3 == 1:
        options["top_k"] = 2  # of few columns with mass, no tie among those without
    given = {"cells": cells, "consistent": consistent}
    found = case.loss(normalizer=1.0, block_size=1 + seed % 4, **options, **given).loss
    wanted = slow(case, **options, **given)
    assert torch.allclose(found, wanted, rtol=1e-6)
    gradients = [torch.autograd.grad(x, case.case.student_logits)[0] for x in (found, wanted)]
    assert torch.allclose(*gradients, atol=1e-7)


def test_the_cases_have_columns_that_move_and_tokens_that_are_joined() -> None:
    cases = [make(seed) for seed in range(6)]
    assert sum(len(case.case.pair.cells.fold) > 0 for case in cases) > 3
    assert sum(len(swallowed(case, token)) for case in cases for token in range(13)) > 10


@pytest.mark.parametrize("seed", range(4))
def test_all_mass_of_text_is_placed_on_cells(seed: int) -> None:
    case = make(seed)
    outputs = [case.loss(cells=cells, tail_bucket=False) for cells in (False, True)]
    masses = [float(output.metrics["teacher_mass"]) for output in outputs]
    assert masses[1] == pytest.approx(1, abs=1e-9)
    assert masses[0] < masses[1] or not len(case.case.pair.cells.fold)


@pytest.mark.parametrize("name", ["p-kl", "prefix-kl"])
@pytest.mark.parametrize(("tail", "consistent"), [(False, False), ("auto", False), ("auto", True)])
def test_a_stored_top_k_of_all_tokens_says_what_the_logits_say(
    name: str, tail: object, consistent: bool
) -> None:
    """Without a tail, stored columns that are left out are compared on neither side."""
    for seed in range(4):
        case = make(seed)
        size, logits = len(case.teacher), case.case.teacher_logits
        stored = TeacherTopK.from_logits(logits, size, vocab_size=size)
        found, wanted = (
            case.loss(
                name, teacher=teacher, cells=True, consistent=consistent, tail_bucket=tail
            ).loss
            for teacher in (stored, logits)
        )
        assert torch.allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("name", ["p-kl", "prefix-kl"])
def test_few_stored_columns_keep_the_loss_and_the_gradient_finite(name: str) -> None:
    case = make(2)
    stored = TeacherTopK.from_logits(case.case.teacher_logits, 3, vocab_size=len(case.teacher))
    for options in ({}, {"tail_bucket": "auto"}, {"top_k": 2, "tail_bucket": "auto"}):
        loss = case.loss(name, teacher=stored, cells=True, consistent=True, **options).loss
        assert torch.isfinite(loss)
        assert torch.isfinite(torch.autograd.grad(loss, case.case.student_logits)[0]).all()


def test_the_root_of_prefix_kl_is_p_kl_of_first_pieces_on_the_same_cells() -> None:
    case = make(3)
    pair = case.case.pair
    for consistent in (False, True):
        root = case.loss("prefix-kl", max_depth=0, cells=True, consistent=consistent).loss
        cells = Cells.__new__(Cells)
        torch.nn.Module.__init__(cells)
        cells.fold, cells.projection = pair.cells.fold, pair.first_cells
        cells.builder, cells._swallowing = pair.cells.builder, {}
        first = PairParts(pair.sizes, projection=pair.first_pieces, cells=cells)
        wanted = case.loss("p-kl", pair=first, cells=True, consistent=consistent).loss
        assert torch.allclose(root, wanted)
    whole = case.loss("prefix-kl", cells=True, consistent=True).loss
    assert whole > root


@pytest.mark.parametrize("scope", ["chunk", "microbatch"])
def test_block_size_changes_nothing(scope: str) -> None:
    case = make(4)
    options = {"cells": True, "consistent": True, "top_k": 4, "top_k_scope": scope}
    for name in ("p-kl", "prefix-kl"):
        whole, cut = (case.loss(name, block_size=size, **options).loss for size in (1000, 2))
        assert torch.allclose(whole, cut)


def test_one_vocabulary_has_no_column_that_moves() -> None:
    student, _, _ = random_pair(2, 14, 12)
    projection = Projection.build(student, student, cache_dir=False)
    pair = PairParts.from_projection(projection, needs={"projection", "cells"})
    assert len(pair.cells.fold) == 0
    assert torch.equal(pair.cells.projection.indices, pair.projection.indices)


def test_columns_of_a_stored_top_k_are_added_up() -> None:
    fold = CellFold(torch.tensor([0, 0, 2, 2, 4]))
    ids = torch.tensor([[3, 1, 4], [1, 0, 9]])
    probs = torch.tensor([[0.5, 0.2, 0.1], [0.3, 0.4, 0.0]], dtype=torch.float64)
    found, logs = fold.stored(ids, torch.log(probs))
    kept = [
        {int(i): round(float(x), 6) for i, x in zip(*row, strict=True) if x > 0}
        for row in zip(found, logs.exp(), strict=True)
    ]
    assert kept == [{2: 0.5, 0: 0.2, 4: 0.1}, {0: 0.7}]
    assert fold.named(torch.tensor([False, True, False, False, True])).tolist() == [
        True, False, False, False, True
    ]  # fmt: skip


def test_what_is_joined_is_what_the_tokenizer_says() -> None:
    for seed in range(7):
        case = make(seed)
        tokens = np.arange(len(case.student), dtype=np.int64)
        found = case.case.pair.cells.swallowing(tokens)
        assert [each.tolist() for each in found] == [swallowed(case, t) for t in tokens.tolist()]


@pytest.mark.parametrize("name", ["p-kl", "prefix-kl"])
@pytest.mark.parametrize(
    ("options", "stored", "fits"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"tail_bucket": "auto"}, False, False),
        ({"tail_bucket": "auto"}, True, True),
        ({"cells": True}, False, False),
        ({"top_k": 3}, False, True),
        ({"top_k": 3, "tail_bucket": "auto"}, False, True),
        ({"top_k": 500}, False, False),
        ({"top_k": 3, "top_k_scope": "microbatch"}, False, False),
        ({"top_k": 3, "top_k_scope": "microbatch"}, True, False),
        ({"top_k": 3, "top_k_by": "student"}, False, False),
        ({"top_k": 3, "top_k_by": "student"}, True, True),
    ],
)
def test_a_reverse_kl_of_what_consistent_leaves_out_is_refused(
    name: str, options: dict[str, object], stored: bool, fits: bool
) -> None:
    if name == "prefix-kl" and "top_k_by" in options:
        return
    case = make(3)  # of whose columns three at least are left at each chunk
    teacher = case.case.teacher_logits
    if stored:
        teacher = TeacherTopK.from_logits(teacher, 4, vocab_size=case.case.v_t)

    def loss(direction: str) -> Tensor:
        return case.loss(
            name, teacher=teacher, consistent=True, direction=direction, **options
        ).loss

    for direction in ("forward", "jsd", *(["reverse"] if fits else [])):
        found = loss(direction)
        (gradient,) = torch.autograd.grad(found, case.case.student_logits)
        assert torch.isfinite(found)
        assert torch.isfinite(gradient).all()
    if not fits:
        with pytest.raises(OptionError, match="'reverse' with consistent = True is infinite"):
            loss("reverse")


def test_what_does_not_fit_is_refused() -> None:
    case = make(1)
    with pytest.raises(OptionError, match="consistent = True with merge = 'last'"):
        case.loss(consistent=True, merge="last")
    with pytest.raises(OptionError, match="p-kl needs student_ids"):
        case.loss(consistent=True, student_ids=None)
    with pytest.raises(PairError, match="the pair has no cells, which p-kl needs; pass PairParts"):
        case.loss(cells=True, pair=PairParts.from_projection(case.projection, needs="p-kl"))
    learnable = PairParts.from_projection(
        case.projection, needs={"projection", "cells"}, learnable=True
    )
    with pytest.raises(OptionError, match="cells = True with a learnable W"):
        case.loss(cells=True, pair=learnable)
    assert LOSSES["p-kl"].parts_for(LossOptions(cells=True)) == {"projection", "cells"}
