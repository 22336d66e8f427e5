"""Targets made in the step are those that a store makes of the whole examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_texts
from torch import Tensor
from transformers import AutoTokenizer

from xtoken import Pair
from xtoken.data import Example
from xtoken.data.completions import Completion
from xtoken.distillation import Batch, Distiller
from xtoken.losses import LOSSES, LossInputs, TeacherTopK
from xtoken.losses.exact_kl.batch_targets import target_options
from xtoken.targets import TargetExample
from xtoken.tensors.chunks import ChunkBatch

COLUMNS = 200


@pytest.fixture(scope="module")
def distiller(folder: Path) -> Distiller:
    sides = [AutoTokenizer.from_pretrained(folder / side) for side in ("student", "teacher")]
    return Pair(*sides, cache_dir=False).distiller("exact-kl", top_k=COLUMNS, ce_weight=0.0)


def logits_for(ids: Tensor, size: int, seed: int) -> Tensor:
    return 3 * torch.randn(*ids.shape, size, generator=torch.Generator().manual_seed(seed))


def cut(texts: Sequence[str], share: float) -> list[Any]:
    """The texts behind a prompt, which is often cut inside a word."""
    places = [int(len(text) * share) for text in texts]
    return [Completion(t[:at], t[at:]) if at else t for t, at in zip(texts, places, strict=True)]


def stored(distiller: Distiller, batch: Batch, examples: list[Example], signal: TeacherTopK) -> Any:
    """The batch with the targets that `TargetStore` makes."""
    builder = distiller.parts.targets
    assert builder is not None
    columns = batch.teacher["attention_mask"].argmax(-1).tolist()
    made = []
    for row, (each, first) in enumerate(zip(examples, columns, strict=True)):
        inside = slice(first, first + len(each.teacher_ids))
        made.append(
            TargetExample(
                each.student_ids,
                each.teacher_ids,
                each.alignment,
                signal.log_probs[row, inside].numpy(),
                signal.ids[row, inside].numpy(),
            )
        )
    return batch.with_targets(
        builder.build(made, target_options(distiller.options), threads=1), builder.tokens
    )


def gradient(distiller: Distiller, student: Tensor, teacher: Any, batch: Batch) -> list[Tensor]:
    logits = student.clone().requires_grad_()
    loss = distiller(logits, teacher, batch).loss
    return [loss.detach(), *torch.autograd.grad(loss, logits)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("share", [0.0, 0.31, 0.5, 0.77])
def test_whatever_stands_before_what_counts(distiller: Distiller, share: float, side: Any) -> None:
    examples = distiller.examples(cut(tiny_texts(8), share))
    distiller = distiller.pair.distiller(
        "exact-kl", top_k=COLUMNS, ce_weight=0.0, padding_side=side
    )
    batch = distiller.prepared(distiller.collator(examples))
    student = logits_for(batch.student_ids, distiller.pair.sizes[0], 0)
    teacher = logits_for(batch.teacher_ids, distiller.pair.sizes[1], 1)
    teacher = teacher.masked_fill((batch.teacher["attention_mask"] == 0)[..., None], torch.nan)
    signal = TeacherTopK.from_logits(torch.nan_to_num(teacher), COLUMNS)
    expected = gradient(distiller, student, signal, stored(distiller, batch, examples, signal))
    assert expected[0] > 0
    for given in (signal, teacher):
        for found, other in zip(gradient(distiller, student, given, batch), expected, strict=True):
            torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-9)


def test_documents_of_a_packed_row_are_read_each_alone(distiller: Distiller) -> None:
    examples = distiller.examples(cut(tiny_texts(4), 0.4))
    sizes = distiller.pair.sizes
    alone, rows = [], []
    for seed, example in enumerate(examples):
        batch = distiller.collate([example])
        student = logits_for(batch.student_ids, sizes[0], seed)
        teacher = logits_for(batch.teacher_ids, sizes[1], 100 + seed)
        rows.append((student, teacher))
        loss, grad = gradient(distiller, student, teacher, batch)
        alone.append((loss * len(batch.chunks), grad * len(batch.chunks)))
    joined = distiller.pair.aligner.align  # each document is aligned alone, then put behind
    starts = [
        torch.zeros(1, sum(len(ids) for ids in side), dtype=torch.bool) for side in sides(examples)
    ]
    masks = [torch.from_numpy(np.concatenate(side))[None] for side in loss_masks(examples)]
    bounds: list[list[int]] = [[0], [0]]
    kinds = []
    for example in examples:
        found = joined(example.student_ids, example.teacher_ids)
        for place, own in enumerate((found.student_bounds, found.teacher_bounds)):
            starts[place][0, bounds[place][-1]] = True
            bounds[place] += (own[1:] + bounds[place][-1]).tolist()
        kinds.append(found.kind)
    whole = type(found)(
        np.array(bounds[0]), np.array(bounds[1]), np.concatenate(kinds), np.zeros(4, np.int64)
    )
    chunks = ChunkBatch.usable_from_alignments(
        [whole], *masks, student_document_starts=starts[0], teacher_document_starts=starts[1]
    )
    logits = torch.cat([student for student, _ in rows], 1).requires_grad_()
    ids = [torch.from_numpy(np.concatenate(side))[None] for side in sides(examples)]
    inputs = LossInputs(
        logits, torch.cat([teacher for _, teacher in rows], 1), chunks,
        student_ids=ids[0], teacher_ids=ids[1], normalizer=1.0,
    )  # fmt: skip
    loss = LOSSES["exact-kl"].function(inputs, distiller.parts, distiller.options).loss
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss.detach(), torch.stack([each for each, _ in alone]).sum())
    torch.testing.assert_close(
        grad, torch.cat([each for _, each in alone], 1), atol=1e-5, rtol=1e-4
    )


def sides(examples: Sequence[Example]) -> tuple[list[Any], list[Any]]:
    return [each.student_ids for each in examples], [each.teacher_ids for each in examples]


def loss_masks(examples: Sequence[Example]) -> tuple[list[Any], list[Any]]:
    return (
        [each.student_loss_mask for each in examples],
        [each.teacher_loss_mask for each in examples],
    )
