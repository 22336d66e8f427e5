"""Chunk batches: flattening of alignments, and which chunks a loss counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import EXACT, MISMATCH, SPECIAL, STUDENT_ONLY, make_case

from xtoken import Alignment
from xtoken.errors import ShapeError
from xtoken.tensors.chunks import ChunkBatch


def alignment(student: list[int], teacher: list[int], kind: list[int]) -> Alignment:
    return Alignment(
        np.array(student), np.array(teacher), np.array(kind, np.uint8), np.zeros(4, np.int64)
    )


@pytest.fixture
def two_samples() -> ChunkBatch:
    first = alignment([0, 1, 2, 4], [0, 1, 3, 4], [SPECIAL, EXACT, EXACT])
    second = alignment([0, 2, 3, 4], [0, 1, 2, 2], [EXACT, MISMATCH, STUDENT_ONLY])
    return ChunkBatch.from_alignments([first, second])


def mask(shape: tuple[int, int], *off: tuple[int, int]) -> torch.Tensor:
    result = torch.ones(shape, dtype=torch.bool)
    for place in off:
        result[place] = False
    return result


def test_chunks_keep_sample_ranges_and_kind(two_samples: ChunkBatch) -> None:
    assert two_samples.sample.tolist() == [0, 0, 0, 1, 1, 1]
    assert two_samples.student_start.tolist() == [0, 1, 2, 0, 2, 3]
    assert two_samples.teacher_end.tolist() == [1, 3, 4, 1, 2, 2]
    assert two_samples.kind.tolist() == [SPECIAL, EXACT, EXACT, EXACT, MISMATCH, STUDENT_ONLY]
    assert len(two_samples) == 6


def test_exact_chunks_with_predictors_inside_both_masks_are_usable(
    two_samples: ChunkBatch,
) -> None:
    usable = two_samples.usable(mask((2, 4)), mask((2, 4)))
    assert usable.student_start.tolist() == [1, 2]  # not the first chunk of a sample
    assert two_samples.usable(mask((2, 4), (0, 3)), mask((2, 4))).student_start.tolist() == [1]
    assert two_samples.usable(mask((2, 4)), mask((2, 4), (0, 1))).student_start.tolist() == [2]


def test_more_kinds_are_usable_when_admitted_but_never_one_sided_ones(
    two_samples: ChunkBatch,
) -> None:
    masks = mask((2, 4)), mask((2, 4))
    assert len(two_samples.usable(*masks, admit=(EXACT, MISMATCH))) == 3
    assert len(two_samples.usable(*masks, admit=(EXACT, MISMATCH, SPECIAL, STUDENT_ONLY))) == 3


def test_left_padding_shifts_ranges_and_keeps_the_first_token_without_predictor() -> None:
    one = alignment([0, 1, 2], [0, 2, 3], [EXACT, EXACT])
    shifted = ChunkBatch.from_alignments([one], [3], [1])
    assert shifted.student_start.tolist() == [3, 4]
    assert shifted.teacher_end.tolist() == [3, 4]
    usable = shifted.usable(mask((1, 5)), mask((1, 4)))
    assert usable.student_start.tolist() == [4]


@pytest.mark.parametrize("left", [False, True])
def test_the_same_chunks_are_usable_on_either_padding_side(left: bool) -> None:
    case, other = make_case(3), make_case(3, left=left)
    assert len(case.usable) == len(other.usable) > 0
    assert torch.equal(
        case.usable.student_end - case.usable.student_start,
        other.usable.student_end - other.usable.student_start,
    )


def test_chunk_ids_name_each_tokens_chunk(two_samples: ChunkBatch) -> None:
    assert two_samples.chunk_ids("student", (2, 5)).tolist() == [
        [0, 1, 2, 2, -1],
        [3, 3, 4, 5, -1],
    ]
    assert two_samples.chunk_ids("teacher", (2, 4)).tolist() == [[0, 1, 1, 2], [3, 4, -1, -1]]


def test_a_mask_gives_one_to_one_chunks() -> None:
    chunks = ChunkBatch.from_mask(mask((2, 3), (1, 2)))
    assert len(chunks) == 5
    assert torch.equal(chunks.student_end, chunks.teacher_start + 1)


def test_an_empty_batch_has_no_chunks_anywhere() -> None:
    assert len(ChunkBatch.empty()) == 0
    assert len(ChunkBatch.from_alignments([])) == 0
    assert len(ChunkBatch.empty().usable(mask((2, 3)), mask((2, 3)))) == 0


def test_selecting_and_moving_keep_every_field(two_samples: ChunkBatch) -> None:
    picked = two_samples.select(torch.tensor([2, 4])).to("cpu")
    assert picked.student_start.tolist() == [2, 2]
    assert picked.has_predictor.tolist() == [True, True]


def test_wrong_offsets_bounds_masks_and_dtypes_are_refused(two_samples: ChunkBatch) -> None:
    one = alignment([0, 1], [0, 1], [EXACT])
    with pytest.raises(ShapeError, match="student_offsets has 2 entries, expected 1"):
        ChunkBatch.from_alignments([one], [0, 0])
    with pytest.raises(ShapeError, match="teacher_bounds has 3 entries, expected 2"):
        ChunkBatch.from_alignments([alignment([0, 1], [0, 1, 2], [EXACT])])
    with pytest.raises(ShapeError, match=r"student_mask is torch\.int64"):
        two_samples.usable(mask((2, 4)).long(), mask((2, 4)))
    with pytest.raises(ShapeError, match="alignments of this batch"):
        two_samples.usable(mask((1, 4)), mask((2, 4)))
    with pytest.raises(ShapeError, match="teacher token 3"):
        two_samples.usable(mask((2, 4)), mask((2, 3)))
    with pytest.raises(ShapeError, match=r"expected bool \[B, T\]"):
        ChunkBatch.from_mask(torch.ones(3, dtype=torch.bool))
    zero = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ShapeError, match=r"kind is torch.int32"):
        ChunkBatch.from_ranges(zero, zero, zero, zero, zero, zero.to(torch.int32))


@given(st.integers(0, 10_000), st.booleans(), st.sets(st.integers(0, 4)), st.floats(0.0, 0.3))
def test_the_usable_chunks_are_those_of_a_loop(
    seed: int, left: bool, admit: set[int], share: float
) -> None:
    case = make_case(seed, left=left)
    generator = torch.Generator().manual_seed(seed)
    masks = [
        m & (torch.rand(m.shape, generator=generator) >= share)
        for m in (case.student_mask, case.teacher_mask)
    ]
    wanted = []
    for c in range(len(case.chunks)):
        b = int(case.chunks.sample[c])
        usable = int(case.chunks.kind[c]) in admit
        for side, mask, real in zip(
            ("student", "teacher"), masks, (case.student_mask, case.teacher_mask), strict=True
        ):
            tokens = range(
                int(getattr(case.chunks, f"{side}_start")[c]),
                int(getattr(case.chunks, f"{side}_end")[c]),
            )
            usable &= len(tokens) > 0 and all(bool(mask[b, t]) for t in tokens)
            # The token before is one of the sample's own.
            usable &= len(tokens) > 0 and tokens[0] >= 1 and bool(real[b, tokens[0] - 1])
        if usable:
            wanted.append(c)
    found = case.chunks.usable(*masks, admit=sorted(admit))
    assert torch.equal(found.student_start, case.chunks.student_start[wanted])
    assert torch.equal(found.sample, case.chunks.sample[wanted])
