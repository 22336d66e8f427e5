"""Where the teacher's mass goes in a text, against a plain count of its rows."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizer_zoo import byte_level_bpe

from xtoken import Aligner, Projection
from xtoken.audit.placement import SHAPES, mass_placement
from xtoken.targets import TargetBuilder, TargetExample, TargetOptions

TEXT = "In 1991, 20,126 of 3,401 walked; the bread 1 22 333 4444 unbelievably walked on.\n" * 3


@pytest.fixture(name="example", scope="module", params=["student", "teacher"])
def _example(request: pytest.FixtureRequest) -> tuple[Projection, TargetExample]:
    """The side with the larger vocabulary, which packs digits, is the parameter."""
    sides = byte_level_bpe(900, digits=3), byte_level_bpe(700, digits=1)
    student, teacher = sides if request.param == "student" else sides[::-1]
    projection = Projection.build(student, teacher, cache_dir=False)
    ids = [np.array(side.encode(TEXT, add_special_tokens=False).ids) for side in (student, teacher)]
    rng = np.random.default_rng(0)
    size = projection.shape[1]
    logits = 2 * rng.standard_normal((len(ids[1]), size))
    for at, following in enumerate(ids[1][1:]):
        logits[at, following] += 7
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    alignment = Aligner(student, teacher, threads=1).align(*ids)
    return projection, TargetExample(*ids, alignment, log_probs.astype(np.float32))


def test_the_shares_are_those_of_the_rows(example: tuple[Projection, TargetExample]) -> None:
    projection, text = example
    builder = TargetBuilder(projection)
    options = TargetOptions(min_prob=0.0)
    targets, accounts = builder.accounts([text], options, threads=1)
    assert targets == builder.build([text], options, threads=1)
    student, teacher = projection.vocabularies()
    reached = {
        int(projection.token_pieces(s)[0])
        for s in range(len(student))
        if len(projection.token_pieces(s))
    }
    specials = {
        int(projection.indices[projection.indptr[s]])
        for s in student.special_tokens
        if projection.indptr[s] < projection.indptr[s + 1]
    } | set(teacher.stops)
    own, other = text.student_ids, text.teacher_ids
    starts = np.cumsum([0, *(len(teacher.token_bytes(int(t))) for t in other)]).tolist()
    begins = np.cumsum([0, *(len(student.token_bytes(int(s))) for s in own)]).tolist()
    looked = 0
    for position, account in zip(targets.positions.tolist(), accounts, strict=True):
        if begins[position] not in starts:
            assert (account == 0).all()
            continue
        at = starts.index(begins[position])
        row = np.exp(text.log_probs[at - 1].astype(float))
        dropped = left_out = unreached = 0.0
        last = student.token_bytes(int(own[position - 1]))
        for t, q in enumerate(row):
            content = teacher.token_bytes(t)
            if not content:
                dropped += q if t not in specials else 0.0
                continue
            unreached += q if t not in reached else 0.0
            first = student.segment(content)[0]
            joined = student.segment(last + student.token_bytes(first))
            if joined[0] != own[position - 1] and t != other[at]:
                left_out += q
        assert account[0] == pytest.approx(dropped, abs=1e-5)
        assert account[1] == pytest.approx(left_out, abs=1e-5)
        assert account[3] == pytest.approx(unreached, abs=1e-5)
        assert account[2] >= 0
        looked += 1
    assert looked > 30


def test_shapes_and_classes_count_the_same_boundaries(
    example: tuple[Projection, TargetExample],
) -> None:
    by_shape, by_class = mass_placement(*example)
    assert {item.name for item in by_shape} <= set(SHAPES)
    assert sum(item.boundaries for item in by_shape) == sum(item.boundaries for item in by_class)
    assert "two-digit numerals" in {item.name for item in by_class}
    for item in (*by_shape, *by_class):
        for share in (item.unreached, item.dropped, item.left_out, item.placed):
            assert 0 <= share <= 1
        assert item.unreached >= item.dropped
    shapes = {item.name: item for item in by_shape}
    if "m:1" in shapes:  # the teacher has the larger vocabulary
        assert shapes["m:1"].unreached > 0.2
        assert shapes["m:1"].placed > 0.995
        assert sum(item.carried * item.boundaries for item in by_shape) > 0
    else:
        assert shapes["1:n"].boundaries > 5


def test_what_the_predictions_do_not_list_is_said(
    example: tuple[Projection, TargetExample],
) -> None:
    projection, whole = example
    columns = np.argsort(-whole.log_probs, axis=1)[:, :200]
    listed = np.take_along_axis(whole.log_probs, columns, axis=1)
    cut = TargetExample(whole.student_ids, whole.teacher_ids, whole.alignment, listed, columns)
    for full, part in zip(
        mass_placement(projection, whole)[0], mass_placement(projection, cut)[0], strict=True
    ):
        assert full.unlisted == pytest.approx(0, abs=1e-5)
        assert part.unlisted > 1e-3
        # All of it may be such mass, or none.
        missing = full.unreached - part.unreached
        assert -1e-6 <= missing <= part.unlisted + 1e-6
