"""A loss is the same on any number of threads, under autocast, and of a teacher in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_texts
from torch import Tensor
from transformers import AutoTokenizer

import xtoken
from xtoken import Pair
from xtoken.distillation import Batch, Distiller
from xtoken.distillation.options import LOSS_NAMES
from xtoken.errors import OptionError
from xtoken.losses import LmHead, TeacherTopK

OF_TWO_TOKENIZERS: list[Any] = [
    name for name in LOSS_NAMES if name not in ("ce", "auto", "same-vocab-kl")
]


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    sides = [AutoTokenizer.from_pretrained(folder / side) for side in ("student", "teacher")]
    return Pair(*sides, cache_dir=False)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def signals(pair: Pair, batch: Batch) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sides = zip((batch.student_ids, batch.teacher_ids), pair.sizes, strict=True)
    return [2 * torch.randn(*ids.shape, size, generator=generator) for ids, size in sides]


def gradient(distiller: Distiller, student: Tensor, teacher: Any, batch: Batch) -> list[Tensor]:
    logits = student.clone().requires_grad_()
    loss = distiller(logits, teacher, batch).loss
    return [loss.detach(), *torch.autograd.grad(loss, logits)]


@pytest.mark.filterwarnings("ignore:.*count as unused")
@pytest.mark.parametrize("name", OF_TWO_TOKENIZERS)
def test_any_number_of_threads_gives_the_same_bits(pair: Pair, threads: None, name: Any) -> None:
    assert pair.sizes[0] % 8  # where torch's own softmax has another gradient
    distiller = pair.distiller(name)
    batch = distiller.collate(tiny_texts(8))
    student, teacher = signals(pair, batch)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(gradient(distiller, student, teacher, batch))
    for others in found[1:]:
        for each, other in zip(found[0], others, strict=True):
            assert torch.equal(each, other)


@pytest.mark.filterwarnings("ignore:.*count as unused")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OF_TWO_TOKENIZERS)
def test_a_teacher_in_float64_says_the_same(pair: Pair, name: Any, dtype: torch.dtype) -> None:
    distiller = pair.distiller(name)
    batch = distiller.collate(tiny_texts(2))
    student, teacher = signals(pair, batch)
    found = gradient(distiller, student.to(dtype), teacher.double(), batch)
    expected = gradient(distiller, student.to(dtype), teacher, batch)
    torch.testing.assert_close(found[0].float(), expected[0].float(), rtol=1e-4, atol=1e-6)
    assert found[1].dtype == dtype
    torch.testing.assert_close(found[1], expected[1], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("weights", ["ce", "entropy", "max_prob"])
def test_a_confidence_is_not_read_of_another_temperature(pair: Pair, weights: Any) -> None:
    of_each = [pair.distiller("strict-top-k") for _ in range(2)]
    distiller = xtoken.distiller(of_each, weights=weights)
    batch = distiller.collate(tiny_texts(2))
    student, teacher = signals(pair, of_each[0].collate(tiny_texts(2)))
    ids = of_each[0].collate(tiny_texts(2)).teacher_ids
    stored = [TeacherTopK.from_logits(teacher, 8, ids=ids, temperature=each) for each in (1.0, 2.0)]
    distiller(student, [stored[0]] * 2, batch)
    with pytest.raises(OptionError, match=r"taken at temperature 2.0, the .* is at 1.0; pass the"):
        distiller(student, stored, batch)


AUTOCAST: list[tuple[Any, dict[str, Any]]] = [
    *((name, {}) for name in OF_TWO_TOKENIZERS),
    ("p-kl", {"top_k": 20, "top_k_scope": "microbatch"}),
    ("prefix-kl", {"top_k": 20, "top_k_scope": "microbatch", "tail_bucket": True}),
]


@pytest.mark.filterwarnings("ignore:.*count as unused")
@pytest.mark.parametrize(("name", "options"), AUTOCAST)
def test_heads_are_read_in_full_precision_under_autocast_too(
    pair: Pair, name: Any, options: dict[str, Any]
) -> None:
    distiller = pair.distiller(name, **options)
    batch = distiller.collate(tiny_texts(2))
    generator = torch.Generator().manual_seed(0)
    ids = batch.student_ids, batch.teacher_ids
    states = [torch.randn(*each.shape, 32, generator=generator) for each in ids]
    weights = [torch.randn(size, 32, generator=generator) / 2 for size in pair.sizes]
    found = []
    for cast in (False, True):
        hidden = states[0].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            heads = LmHead(hidden, weights[0]), LmHead(states[1], weights[1])
            loss = distiller(*heads, batch).loss
        found.append([loss.detach(), *torch.autograd.grad(loss, hidden)])
    for each, other in zip(*found, strict=True):
        torch.testing.assert_close(other, each, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weights", ["ce", "entropy", "max_prob"])
def test_a_top_k_and_a_confidence_are_too(pair: Pair, weights: Any) -> None:
    of_each = [pair.distiller("strict-top-k") for _ in range(2)]
    distiller = xtoken.distiller(of_each, weights=weights)
    batch = distiller.collate(tiny_texts(2))
    generator = torch.Generator().manual_seed(0)
    single = of_each[0].collate(tiny_texts(2))
    states = [torch.randn(*single.teacher_ids.shape, 32, generator=generator) for _ in range(2)]
    heads = [LmHead(each, torch.randn(pair.sizes[1], 32, generator=generator)) for each in states]
    student = signals(pair, single)[0]
    found, stored = [], []
    for cast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            found.append(distiller(student, heads, batch).metrics["teacher0/weight"])
            stored.append(TeacherTopK.from_logits(heads[0], 8))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=0)
    assert torch.equal(stored[1].ids, stored[0].ids)
    assert torch.equal(stored[1].log_probs, stored[0].log_probs)
