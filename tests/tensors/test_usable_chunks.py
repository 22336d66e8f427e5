"""The usable chunks of alignments in one pass: those of the two steps, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from xtoken import Alignment, AlignmentBatch
from xtoken.errors import ArgumentTypeError, OptionError, ShapeError, XTokenError
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.host_chunks import HostChunks
from xtoken.vocab.fingerprints import PairFingerprint

SIDES = ("student", "teacher")
PAIR = PairFingerprint("a" * 32, "b" * 32)
Drawn = tuple[AlignmentBatch, list[torch.Tensor], list[torch.Tensor], list[int]]


def drawn(seed: int, *, pattern: str = "runs", falling: bool = False) -> Drawn:
    """Alignments with empty sides and all kinds, masks, document starts and admitted kinds."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(0, 5))
    counts = rng.integers(0, 40, rows) * rng.integers(0, 2, rows)
    bounds, columns, masks, starts = [], [], [], []
    for _ in SIDES:
        sizes = [rng.choice(4, count, p=(0.1, 0.6, 0.2, 0.1)) for count in counts]
        own = [np.concatenate(([0], np.cumsum(size))).astype(np.int64) for size in sizes]
        if falling and rows:
            rng.shuffle(own[int(rng.integers(rows))])
        bounds.append(np.concatenate([np.zeros(0, np.int64), *own]))
        columns.append(rng.integers(0, 4, rows))
        width = int(
            max((one.max() + at for one, at in zip(own, columns[-1], strict=True)), default=0)
        )
        masks.append(
            masked(rng, (rows + int(rng.integers(2)), width + int(rng.integers(3))), pattern)
        )
        starts.append(torch.from_numpy(rng.random(tuple(masks[-1].shape)) < 0.1))
    batch = AlignmentBatch(
        *bounds,
        rng.choice(5, int(counts.sum()), p=(0.8, 0.05, 0.05, 0.05, 0.05)).astype(np.uint8),
        np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        np.zeros((rows, 4), np.int64),
        *columns,
        PAIR,
    )
    admit = [kind for kind in (-1, 0, 1, 2, 3, 4, 300) if kind == 0 or rng.random() < 0.4]
    return batch, masks, starts, admit


def masked(rng: np.random.Generator, shape: tuple[int, int], pattern: str) -> torch.Tensor:
    if pattern == "all":
        return torch.ones(shape, dtype=torch.bool)
    if pattern == "tokens":
        return torch.from_numpy(rng.random(shape) < 0.8)
    turns = np.zeros(shape, np.bool_)
    for row in turns:
        for _ in range(int(rng.integers(1, 4))):
            row[slice(*sorted(rng.integers(0, shape[1] + 1, 2)))] = True
    return torch.from_numpy(turns)


def same(one: ChunkBatch, other: ChunkBatch) -> None:
    for name in (field.name for field in fields(ChunkBatch) if field.name not in ("pair", "_host")):
        left, right = getattr(one, name), getattr(other, name)
        assert (left.dtype, left.stride()) == (right.dtype, right.stride()), name
        assert torch.equal(left, right), name
    assert one.pair == other.pair
    assert (one.host.predicted, one.host.reach) == (other.host.predicted, other.host.reach)
    texts = one.host.text, other.host.text
    assert texts[0] is not None
    assert texts[1] is not None
    assert texts[0].alignments == texts[1].alignments
    for left, right in zip(*(each.starts or () for each in texts), strict=True):
        assert np.array_equal(left, right)
    anew = HostChunks.of(one)
    for host in (one.host, other.host):
        for name in (field.name for field in fields(HostChunks) if field.name != "text"):
            assert np.array_equal(getattr(host, name), getattr(anew, name)), name


@given(st.integers(0, 2**32), st.sampled_from(["runs", "all", "tokens"]), st.booleans())
@example(0, "runs", False)
def test_one_pass_gives_the_chunks_of_two_steps_and_of_a_loop(
    seed: int, pattern: str, packed: bool
) -> None:
    batch, masks, starts, admit = drawn(seed, pattern=pattern)
    named = {f"{side}_document_starts": own for side, own in zip(SIDES, starts, strict=True)}
    extra = named if packed else {}
    found = ChunkBatch.usable_from_alignments(batch, *masks, admit=admit, **extra)
    same(found, ChunkBatch.from_alignments(batch, **extra).usable(*masks, admit=admit))

    wanted = []
    for sample, one in enumerate(batch):
        for chunk in range(len(one)):
            tokens = []
            counts = int(one.kind[chunk]) in admit
            for side, mask, start in zip(SIDES, masks, starts, strict=True):
                bounds = getattr(one, f"{side}_bounds")
                column = int(getattr(batch, f"{side}_columns")[sample])
                inside = range(int(bounds[chunk]), int(bounds[chunk + 1]))
                counts &= len(inside) > 0 and inside[0] > 0
                for token in inside:
                    counts &= bool(mask[sample, column + token])
                    counts &= not (packed and bool(start[sample, column + token]))
                tokens += [column + inside.start, column + inside.stop]
            if counts:
                wanted.append([sample, *tokens, int(one.kind[chunk])])
    names = ("sample", "student_start", "student_end", "teacher_start", "teacher_end", "kind")
    rows = torch.stack([getattr(found, name) for name in names], 1)
    assert rows.tolist() == wanted
    assert found.has_predictor.all()


def test_what_is_drawn_holds_chunks_that_count_and_others() -> None:
    shares = []
    for seed in range(40):
        batch, masks, _, admit = drawn(seed)
        kept = ChunkBatch.usable_from_alignments(batch, *masks, admit=admit)
        shares.append((len(kept), len(batch.kind)))
    assert sum(kept == 0 for kept, _ in shares) < 30
    assert sum(0 < kept < count for kept, count in shares) > 10


@given(st.integers(0, 2**32), st.integers(-2, 2), st.integers(-3, 0), st.integers(-3, 0))
def test_one_pass_says_what_two_steps_say_of_what_does_not_fit(
    seed: int, column: int, rows: int, width: int
) -> None:
    """Bounds that fall, columns before the row, masks that are too small."""
    batch, masks, _, admit = drawn(seed, falling=True)
    batch = replace(batch, student_columns=batch.student_columns + column)
    small = [mask[: max(len(mask) + rows, 0), : max(mask.shape[1] + width, 0)] for mask in masks]

    def told(call: Callable[[], ChunkBatch]) -> ChunkBatch | str:
        try:
            return call()
        except XTokenError as error:
            return f"{type(error)}: {error}"

    one = told(lambda: ChunkBatch.usable_from_alignments(batch, *small, admit=admit))
    two = told(lambda: ChunkBatch.from_alignments(batch).usable(*small, admit=admit))
    if isinstance(one, str) or isinstance(two, str):
        assert one == two
        assert "\n" not in str(one)
    else:
        same(one, two)


@pytest.fixture
def one() -> Alignment:
    return Alignment(
        np.array([0, 1, 2, 4]), np.array([0, 1, 3, 4]), np.zeros(3, np.uint8), np.zeros(4, np.int64)
    )


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def test_a_list_of_alignments_takes_its_offsets(one: Alignment) -> None:
    offsets = {"student_offsets": [2, 0], "teacher_offsets": [0, 3]}
    masks = ones(2, 6), ones(2, 7)
    found = ChunkBatch.usable_from_alignments([one, one], *masks, **offsets)
    same(found, ChunkBatch.from_alignments([one, one], **offsets).usable(*masks))
    assert found.student_start.tolist() == [3, 4, 1, 2]
    assert len(ChunkBatch.usable_from_alignments([], ones(0, 0), ones(0, 0))) == 0


def test_masks_with_gaps_between_their_rows_are_read(one: Alignment) -> None:
    wide = ones(4, 9)
    wide[:, 3] = False
    found = ChunkBatch.usable_from_alignments([one, one], wide[::2, :4], ones(1, 4).expand(2, 4))
    assert found.student_start.tolist() == [1, 1]


def test_later_changes_of_a_mask_or_an_alignment_leave_the_chunks(one: Alignment) -> None:
    masks = ones(1, 4), ones(1, 4)
    found = ChunkBatch.usable_from_alignments([one], *masks)
    masks[0].fill_(False)
    one.student_bounds[:] = 0
    assert found.student_end.tolist() == found.host.student_end.tolist() == [2, 4]


def test_wrong_masks_starts_and_offsets_are_refused(one: Alignment) -> None:
    good = ones(1, 4)
    usable = ChunkBatch.usable_from_alignments
    with pytest.raises(ArgumentTypeError, match=r"teacher_mask is numpy\.ndarray, expected Tensor"):
        usable([one], good, good.numpy())  # type: ignore[arg-type]
    for wrong in (good.long(), good[0]):
        with pytest.raises(ShapeError, match=r"student_mask is .* expected torch.bool \[B, T\]"):
            usable([one], wrong, good)
    with pytest.raises(
        ShapeError, match=r"teacher token 3, but the batch is \(1, 3\); pass the al"
    ):
        usable([one], good, good[:, :3])
    with pytest.raises(ShapeError, match=r"reach sample 1 and student token 3, but the batch is"):
        usable([one, one], good, ones(2, 4))
    with pytest.raises(ShapeError, match=r"starts has shape \(1, 3\), expected \(1, 4\) like stud"):
        usable([one], good, good, student_document_starts=good[:, :3])
    with pytest.raises(ShapeError, match=r"teacher_document_starts is torch\.int64"):
        usable([one], good, good, teacher_document_starts=good.long())
    with pytest.raises(OptionError, match="an AlignmentBatch has its own columns"):
        usable(AlignmentBatch.stack([one]), good, good, student_offsets=[0])
    with pytest.raises(ShapeError, match="student_offsets has 2 entries, expected 1"):
        usable([one], good, good, student_offsets=[0, 0])
    batch = AlignmentBatch.stack([one])
    short = replace(batch, student_bounds=batch.student_bounds[:-1])
    with pytest.raises(ShapeError, match="entries of student_bounds: 3 where 4 was expected"):
        usable(short, good, good)
