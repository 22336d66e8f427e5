"""A stored top-k is a part of a distribution, or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tiny_models import tiny_texts
from transformers import AutoTokenizer

from xtoken import Pair
from xtoken.errors import NonFiniteError, OptionError, PairError, ShapeError, TokenIdError
from xtoken.losses import LossInputs, PairParts, TeacherTopK, same_vocab_kl
from xtoken.tensors.chunks import ChunkBatch


def signal(ids: list[int], log_probs: list[float], **given) -> TeacherTopK:
    return TeacherTopK(torch.tensor([[ids]]), torch.tensor([[log_probs]]), **given)


@pytest.mark.parametrize(
    ("ids", "log_probs", "error", "match"),
    [
        ([0, 1], [11.0, 3.0], OptionError, r"log_probs\[0, 0\] sums to 5\.989e\+04 as prob"),
        ([0, 1], [0.7, 0.2], OptionError, "pass logits through TeacherTopK.from_logits"),
        ([0, 1], [-0.1, -0.1], OptionError, "expected 1 at most"),
        ([4, 4], [-1.0, -2.0], OptionError, r"ids\[0, 0\] names token 4 twice"),
        ([-1, 2], [-1.0, -2.0], TokenIdError, "ids hold -1; pad a short row with log_probs = -inf"),
        ([0, 1], [float("nan"), -2.0], NonFiniteError, r"log_probs\[0, 0\] holds NaN"),
        ([0, 1], [float("inf"), -2.0], OptionError, "sums to inf as probabilities"),
    ],
)
def test_numbers_that_are_no_part_of_a_distribution_are_refused(
    ids, log_probs, error, match
) -> None:
    with pytest.raises(error, match=match):
        signal(ids, log_probs)
    signal(ids, log_probs, validate=False)  # checked before, by whoever stored it


def test_an_id_beyond_a_known_vocabulary_is_refused() -> None:
    with pytest.raises(TokenIdError, match=r"ids hold 9, outside the teacher vocabulary \(V_t = 9"):
        signal([9, 1], [-1.0, -2.0], vocab_size=9)


def test_the_pads_of_a_short_row_may_repeat_an_id() -> None:
    pads = [-torch.inf, -torch.inf]
    assert signal([3, 3, 3], [-0.5, *pads]).ids.shape == (1, 1, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounded_log_probabilities_of_the_whole_vocabulary_are_taken(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(0)) * 4
    whole = TeacherTopK.from_logits(logits, 300)
    TeacherTopK(whole.ids, whole.log_probs.to(dtype))


def test_positions_that_are_not_read_may_hold_anything() -> None:
    logits = torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(0))
    whole = TeacherTopK.from_logits(logits, 8)
    for read in (torch.arange(10).view(2, 5) % 3 > 0, torch.zeros(2, 5, dtype=torch.bool)):
        given = torch.where(read[..., None], logits, torch.nan)
        some = TeacherTopK.from_logits(given, 8, positions=read)
        assert some.ids.shape == whole.ids.shape
        assert torch.equal(some.ids[read], whole.ids[read])
        assert torch.equal(some.log_probs[read], whole.log_probs[read])
        assert torch.isneginf(some.log_probs[~read]).all()
    with pytest.raises(ShapeError, match=r"positions has shape \(2, 4\), expected \(2, 5\)"):
        TeacherTopK.from_logits(logits, 8, positions=read[:, 1:])


def test_logits_that_are_nan_are_refused_before_they_are_stored() -> None:
    logits = torch.zeros(2, 3, 4)
    logits[1, 2, 3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"logits\[1, 2\] holds NaN"):
        TeacherTopK.from_logits(logits, 2)


def test_token_log_probs_of_another_shape_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"token_log_probs is torch\.float32 \(2,\)"):
        signal([0, 1], [-1.0, -2.0], token_log_probs=torch.zeros(2))


def test_a_signal_of_another_vocabulary_is_refused_by_the_losses() -> None:
    chunks = ChunkBatch.from_mask(torch.tensor([[False, True]]))
    stored = TeacherTopK.from_logits(torch.zeros(1, 2, 7), 2, vocab_size=7)
    inputs = LossInputs(torch.zeros(1, 2, 9), stored, chunks)
    with pytest.raises(PairError, match="of a teacher of 7 tokens, the pair's teacher has V_t = 9"):
        same_vocab_kl(inputs, PairParts((9, 9)))


def test_a_signal_whose_tokens_the_teacher_does_not_have_is_refused_by_the_losses() -> None:
    chunks = ChunkBatch.from_mask(torch.tensor([[False, True]]))
    log_probs = torch.log(torch.tensor([[[0.7, 0.2], [0.7, 0.2]]]))
    logits = torch.zeros(1, 2, 9)
    for ids, foreign in (([20, 21], True), ([20, 3], True), ([3, 20], False)):
        stored = TeacherTopK(torch.tensor([[ids, ids]]), log_probs)
        if foreign:
            with pytest.raises(PairError, match=r"names token 2\d, .* beyond V_t = 9; pass"):
                same_vocab_kl(LossInputs(logits, stored, chunks), PairParts((9, 9)))
        else:  # an lm_head's padding
            same_vocab_kl(LossInputs(logits, stored, chunks), PairParts((9, 9)))


def test_a_moved_signal_keeps_what_is_known_of_it() -> None:
    ids = torch.zeros(1, 3, dtype=torch.int64)
    stored = TeacherTopK.from_logits(
        torch.zeros(1, 3, 5), 2, vocab_size=5, temperature=2.0, ids=ids, teacher_fingerprint="f"
    ).to("cpu")
    assert (stored.temperature, stored.vocab_size, stored.teacher_fingerprint) == (2.0, 5, "f")
    assert stored.token_log_probs is not None


@pytest.mark.parametrize("loss", ["prefix-kl", "exact-kl", "p-kl", "alm"])
def test_another_temperature_is_told_with_what_makes_the_one_asked_for(
    loss: Literal["prefix-kl", "exact-kl", "p-kl", "alm"], folder: Path
) -> None:
    sides = [AutoTokenizer.from_pretrained(folder / side) for side in ("student", "teacher")]
    pair = Pair(*sides, cache_dir=False)
    options: dict[str, Any] = {} if loss == "alm" else {"top_k": 8}
    if loss == "p-kl":
        options["tail_bucket"] = True
    distiller = pair.distiller(loss, **options)
    batch = distiller.collate(tiny_texts(2))
    logits, teacher = (
        torch.zeros(*ids.shape, size)
        for ids, size in zip((batch.student_ids, batch.teacher_ids), pair.sizes, strict=True)
    )
    hot, stored = (
        TeacherTopK.from_logits(teacher, 8, ids=batch.teacher_ids, temperature=each)
        for each in (2.0, 1.0)
    )
    remedy = r"pass the teacher's full logits, or TeacherTopK.from_logits\(..., temperature=1.0\)"
    with pytest.raises(OptionError, match=rf"taken at temperature 2.0, .* 1.0; {remedy} of them"):
        distiller(logits, hot, batch)
    distiller(logits, stored, batch)
