"""What a step divides by: totals of its batches, or their mean over processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import tiny_texts
from transformers import AutoTokenizer

import xtoken
from xtoken import Pair
from xtoken.distillation import Counts
from xtoken.errors import ArgumentTypeError, OptionError
from xtoken.losses import global_normalizer
from xtoken.losses.output import device_of_group

TEXTS = tiny_texts(2)


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    tokenizers = [AutoTokenizer.from_pretrained(folder / side) for side in ("student", "teacher")]
    return Pair(*tokenizers, cache_dir=False)


def logits_of(pair: Pair, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(*ids.shape, size, generator=generator)
        for ids, size in zip((batch.student_ids, batch.teacher_ids), pair.sizes, strict=True)
    )
    return student.requires_grad_(), teacher


def test_a_loss_is_divided_by_less_than_one_where_processes_outnumber_chunks(pair: Pair) -> None:
    one = pair.distiller("p-kl", ce_weight=1.0)
    several = xtoken.distiller([one, one], ce_weight=1.0)
    batch = one.collate(TEXTS)
    student, teacher = logits_of(pair, batch)
    both = several.collate(TEXTS)

    def alone(totals: Counts) -> float:
        return one(student, teacher, batch, totals=totals).loss.item()

    def of_two(totals: Counts) -> float:
        found = several(student, [teacher, teacher], both, totals=(totals, totals))
        return float(found.loss.detach())

    for loss in (alone, of_two):
        whole = loss(Counts(1, 1))
        assert loss(Counts(0.25, 0.25)) == pytest.approx(4 * whole, rel=1e-5)
        assert loss(Counts(0, 0)) == pytest.approx(whole, rel=1e-6)


def test_totals_that_are_no_counts_are_refused(pair: Pair) -> None:
    one = pair.distiller("p-kl", ce_weight=1.0)
    several = xtoken.distiller([one, one])
    batch, both = one.collate(TEXTS), several.collate(TEXTS)
    student, teacher = logits_of(pair, batch)
    good = Counts(2, 2)
    for bad, told in (
        (Counts(-5, 5), "tokens = -5 must be a number of at least 0"),
        (Counts(5, math.nan), "chunks = nan must be a number"),
        (Counts(math.inf, 5), "tokens = inf must be a number"),
        (Counts("5", 5), "tokens = '5' must be a number"),  # type: ignore[arg-type]
    ):
        with pytest.raises(OptionError, match=rf"^totals\.{told}"):
            one(student, teacher, batch, totals=bad)
        with pytest.raises(OptionError, match=rf"^totals\[1\]\.{told}"):
            several(student, [teacher, teacher], both, totals=(good, bad))
    for wrong in ((good, good), (5, 5), 5.0):
        with pytest.raises(ArgumentTypeError, match=r"totals is .*, expected Counts; add up"):
            one(student, teacher, batch, totals=wrong)
    for wrong in (good, 5.0):
        with pytest.raises(ArgumentTypeError, match=r"totals is .*, expected tuple or list; pass"):
            several(student, [teacher, teacher], both, totals=wrong)
    with pytest.raises(ArgumentTypeError, match="0 totals for 2 teachers"):
        several(student, [teacher, teacher], both, totals=())


def test_a_normalizer_is_refused_below_zero_alone() -> None:
    assert float(global_normalizer(0)) == 1.0
    assert float(global_normalizer(0.5)) == 0.5
    for bad in (-1, math.nan):
        with pytest.raises(OptionError, match=r"num_chunks = .* must be at least 0"):
            global_normalizer(bad)


@pytest.fixture
def _group_without_a_cpu() -> Iterator[None]:
    dist.init_process_group("cuda:gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_group_without_a_cpu")
def test_counts_are_added_up_where_the_group_has_a_backend() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert device_of_group(None, cpu) == cuda
    assert device_of_group(None, cuda) == cuda
    with_both = dist.new_group([0], backend="gloo")
    assert device_of_group(with_both, cpu) == cpu
    if torch.cuda.is_available():
        assert Counts(3, 2).over_processes() == Counts(3, 2)
