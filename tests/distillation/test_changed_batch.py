"""A batch whose ids or masks were changed behind its chunks is refused, never half believed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_texts
from transformers import AutoTokenizer

from xtoken import Pair
from xtoken.distillation import Batch
from xtoken.errors import ArgumentTypeError


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    sides = [AutoTokenizer.from_pretrained(folder / side) for side in ("student", "teacher")]
    return Pair(*sides, cache_dir=False)


def loss(pair: Pair, batch: Batch) -> float:
    generator = torch.Generator().manual_seed(0)
    sides = zip((batch.student_ids, batch.teacher_ids), pair.sizes, strict=True)
    student, teacher = (torch.randn(*ids.shape, size, generator=generator) for ids, size in sides)
    return float(pair.distiller("p-kl", ce_weight=1.0)(student, teacher, batch).loss)


def clear(batch: Batch, name: str) -> Batch:
    getattr(batch, name)[:, 4:] = 0
    return batch


CHANGES: dict[str, Callable[[Batch], Batch]] = {
    **{
        name: lambda batch, name=name: clear(batch, name)
        for name in ("student_ids", "teacher_ids", "student_loss_mask", "teacher_loss_mask")
    },
    "of another mask": lambda batch: replace(
        batch, student_loss_mask=torch.zeros_like(batch.student_loss_mask)
    ),
    "rows in another order": lambda batch: replace(
        batch,
        student={name: each.flip(0) for name, each in batch.student.items()},
        student_loss_mask=batch.student_loss_mask.flip(0),
    ),
    "some rows": lambda batch: replace(
        batch, student_loss_mask=batch.student_loss_mask[:1], teacher=batch.teacher
    ),
    "changed, then moved": lambda batch: clear(batch, "student_loss_mask").to("cpu"),
    "moved, then changed": lambda batch: clear(batch.to("cpu"), "teacher_ids"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_batch_is_refused(pair: Pair, change: str) -> None:
    batch = pair.distiller("p-kl").collate(tiny_texts(2))
    with pytest.raises(ArgumentTypeError, match=r"^batch\.\w+ was changed .* and collate them$"):
        loss(pair, CHANGES[change](batch))


def test_a_batch_that_was_copied_or_moved_is_what_it_was(pair: Pair) -> None:
    batch = pair.distiller("p-kl").collate(tiny_texts(2))
    expected = loss(pair, batch)
    more = batch.student | {"token_type_ids": torch.zeros_like(batch.student_ids)}
    with torch.inference_mode():
        inferred = pair.distiller("p-kl").collate(tiny_texts(2))
    for same in (
        batch.to("cpu"),
        copy.deepcopy(batch),
        copy.copy(batch),
        pickle.loads(pickle.dumps(batch)),
        replace(batch, student=more),
        inferred,
        inferred.to("cpu"),
    ):
        assert loss(pair, same) == expected
