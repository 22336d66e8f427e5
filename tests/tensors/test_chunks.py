"""Chunk batches: flattening of alignments, and which chunks a loss counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import EXACT, MISMATCH, SPECIAL, STUDENT_ONLY, make_case, real_pair

from xtoken import Aligner, Alignment, AlignmentBatch
from xtoken.errors import OptionError, ShapeError
from xtoken.losses import LossInputs, PairParts, p_kl, same_vocab_kl
from xtoken.tensors.chunks import ChunkBatch
from xtoken.vocab.fingerprints import PairFingerprint


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


def test_chunks_that_begin_before_their_row_are_refused() -> None:
    one, two = torch.tensor([1]), torch.tensor([2])
    for sample, start in ((-one, one), (one, -two)):
        chunks = ChunkBatch.from_ranges(sample, start, two, one, two)
        with pytest.raises(ShapeError, match="a chunk, leave their mask, width: 4 where 2 was"):
            chunks.usable(mask((2, 4)), mask((2, 4)))


def test_alignments_whose_arrays_do_not_fit_together_are_refused() -> None:
    batch = AlignmentBatch.stack([alignment([0, 1, 2], [0, 1, 2], [EXACT, EXACT])])
    for name in ("student_bounds", "teacher_columns"):
        short = replace(batch, **{name: getattr(batch, name)[:-1]})
        with pytest.raises(ShapeError, match=f"entries of {name}: . where . was expected"):
            ChunkBatch.from_alignments(short)
    with pytest.raises(ShapeError, match=r"chunk_indptr\[1\] = 1 is not a valid offset"):
        ChunkBatch.from_alignments(replace(batch, chunk_indptr=np.array([0, 1])))


def padded(rows: list[list[int]], left: bool) -> tuple[np.ndarray, np.ndarray]:
    """[B, T] ids and attention mask."""
    width = max(map(len, rows)) + 1
    ids, attention = np.zeros((2, len(rows), width), np.int64)
    for row, values in enumerate(rows):
        at = slice(width - len(values), width) if left else slice(0, len(values))
        ids[row, at], attention[row, at] = values, 1
    return ids, attention


def test_a_batch_of_alignments_brings_the_columns_of_its_padding() -> None:
    student, teacher, projection = real_pair()
    texts = ["In 1991, 201 of them.", "A longer text: 3401 numbers, and 20,126 more."]
    sides = [[t.encode(x, add_special_tokens=False).ids for x in texts] for t in (student, teacher)]
    aligner = Aligner(student, teacher, threads=1)
    pair = PairParts(projection.shape, projection=projection)
    generator = torch.Generator().manual_seed(0)
    tokens = [
        [torch.randn(len(ids), size, generator=generator) for ids in rows]
        for rows, size in zip(sides, projection.shape, strict=True)
    ]
    losses = []
    for left in (False, True):
        ids, masks = zip(*(padded(rows, left) for rows in sides), strict=True)
        batch = aligner.align_batch(*ids, student_mask=masks[0], teacher_mask=masks[1])
        chunks = ChunkBatch.from_alignments(batch)
        logits = []
        for rows, mask, size in zip(tokens, masks, projection.shape, strict=True):
            side = torch.full((*mask.shape, size), 17.0)
            side[torch.from_numpy(mask) > 0] = torch.cat(rows)
            logits.append(side)
        usable = chunks.usable(*(torch.from_numpy(mask) > 0 for mask in masks))
        assert len(usable) > 10
        losses.append(p_kl(LossInputs(*logits, usable), pair).loss)
        # One alignment a sample and its column say the same.
        one_by_one = ChunkBatch.from_alignments(
            list(batch), batch.student_columns.tolist(), batch.teacher_columns.tolist()
        )
        for name in ("sample", "student_start", "student_end", "teacher_end", "has_predictor"):
            assert torch.equal(getattr(one_by_one, name), getattr(chunks, name)), name
    assert torch.allclose(*losses)
    with pytest.raises(OptionError, match="an AlignmentBatch has its own columns"):
        ChunkBatch.from_alignments(batch, [0, 0])


def test_no_document_of_a_packed_row_is_predicted_by_the_one_before() -> None:
    """Two documents in one row; the chunk over the seam holds tokens of both."""
    packed = alignment([0, 1, 2, 3, 4], [0, 1, 3, 4, 5], [EXACT] * 4)
    seam = alignment([0, 1, 3, 4], [0, 1, 4, 5], [EXACT] * 3)
    starts = [torch.zeros(2, n, dtype=torch.bool) for n in (4, 5)]
    starts[0][:, [0, 2]] = True
    starts[1][:, [0, 3]] = True
    all_true = mask((2, 4)), mask((2, 5))
    without = ChunkBatch.from_alignments([packed, seam]).usable(*all_true)
    assert without.student_start.tolist() == [1, 2, 3, 1, 3]
    chunks = ChunkBatch.from_alignments(
        [packed, seam], student_document_starts=starts[0], teacher_document_starts=starts[1]
    )
    assert chunks.usable(*all_true).student_start.tolist() == [1, 3, 3]
    with pytest.raises(ShapeError, match=r"student_document_starts has shape \(2, 3\)"):
        ChunkBatch.from_alignments([packed, seam], student_document_starts=starts[0][:, :3])
    with pytest.raises(ShapeError, match=r"teacher_document_starts is torch\.int64"):
        ChunkBatch.from_alignments([packed, seam], teacher_document_starts=starts[1].long())


def test_a_mask_with_document_starts_predicts_no_first_token() -> None:
    starts = torch.tensor([[False, True, False, True]])
    chunks = ChunkBatch.from_mask(mask((1, 4), (0, 0)), starts)
    assert chunks.has_predictor.tolist() == [False, True, False]
    everything = mask((1, 4)), mask((1, 4))
    assert chunks.usable(*everything).student_start.tolist() == [2]
    with pytest.raises(ShapeError, match="expected bool"):
        ChunkBatch.from_mask(mask((1, 4)), starts[:, :3])


def test_chunks_without_a_predictor_are_refused_by_the_losses() -> None:
    starts = torch.tensor([[False, True, False]])
    chunks = ChunkBatch.from_mask(mask((1, 3), (0, 0)), starts)
    logits = torch.zeros(1, 3, 4)
    with pytest.raises(ShapeError, match="a chunk has no predictor"):
        same_vocab_kl(LossInputs(logits, logits, chunks), PairParts((4, 4)))


def test_a_pinned_or_moved_batch_keeps_its_pair() -> None:
    pair = PairFingerprint("a" * 32, "b" * 32)
    one = replace(alignment([0, 1, 2], [0, 1, 2], [EXACT, EXACT]), pair=pair)
    chunks = ChunkBatch.from_alignments([one])
    assert chunks.select(torch.tensor([1])).to("cpu").pair == pair


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


def test_the_host_copy_outlives_a_move_to_shared_memory() -> None:
    row = alignment([0, 1, 2, 4], [0, 2, 3, 4], [0, 0, 0])
    chunks = ChunkBatch.from_alignments([row] * 50)
    expected = chunks.sample.tolist(), chunks.student_start.tolist()
    host = chunks.host
    # As a worker of a DataLoader does before it hands a batch over.
    for tensor in (chunks.sample, chunks.student_start, chunks.student_end):
        tensor.share_memory_()
    filler = [torch.full_like(chunks.sample, -7) for _ in range(200)]
    assert (host.sample.tolist(), host.student_start.tolist()) == expected
    assert len(filler) == 200


def test_changed_chunks_are_checked_and_read_anew(two_samples: ChunkBatch) -> None:
    kept = two_samples.has_predictor & (two_samples.sample == 1)
    changed = replace(two_samples, has_predictor=kept)
    assert len(changed.usable(mask((2, 4)), mask((2, 4)))) == int(
        (kept & (two_samples.kind == EXACT)).sum()
    )
    later = replace(two_samples, student_end=two_samples.student_end + 9)
    assert later.host.student_end.max() == two_samples.student_end.max() + 9
    with pytest.raises(ShapeError, match=r"kind is torch\.float32"):
        replace(two_samples, kind=two_samples.kind.float())
