"""The parts of a loss share one gradient buffer, and each is differentiated in any order."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_texts
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer

from xtoken import Pair
from xtoken.distillation import Batch
from xtoken.distillation.options import LOSS_NAMES

KD_WEIGHT, CE_WEIGHT = 1.3, 0.7
OF_TWO_TOKENIZERS = [name for name in LOSS_NAMES if name not in ("ce", "auto", "same-vocab-kl")]
CASES: list[tuple[Any, dict[str, Any]]] = [
    *((name, {}) for name in OF_TWO_TOKENIZERS),
    ("p-kl", {"learnable_projection": True}),
    ("p-kl", {"top_k": 20, "tail_bucket": True}),
]


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    sides = [AutoTokenizer.from_pretrained(folder / side) for side in ("student", "teacher")]
    return Pair(*sides, cache_dir=False)


def signals(pair: Pair, batch: Batch) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sides = zip((batch.student_ids, batch.teacher_ids), pair.sizes, strict=True)
    return [2 * torch.randn(*ids.shape, size, generator=generator) for ids, size in sides]


@pytest.mark.filterwarnings("ignore:.*count as unused")
@pytest.mark.parametrize(("name", "options"), CASES)
def test_parts_are_differentiated_in_any_order_and_again(
    pair: Pair, name: Any, options: dict[str, Any]
) -> None:
    distiller = pair.distiller(name, kd_weight=KD_WEIGHT, ce_weight=CE_WEIGHT, **options)
    batch = distiller.collate(tiny_texts(2))
    student, teacher = signals(pair, batch)
    only_kd = pair.distiller(name, kd_weight=1.0, ce_weight=0.0, **options)
    only_ce = pair.distiller("ce")
    expected = {}
    for part, alone in (("kd", only_kd), ("ce", only_ce)):
        logits = student.clone().requires_grad_()
        loss = alone(logits, teacher if part == "kd" else None, batch).loss
        expected[part] = torch.autograd.grad(loss, logits)[0]
    expected["loss"] = KD_WEIGHT * expected["kd"] + CE_WEIGHT * expected["ce"]
    for order in itertools.permutations(expected):
        logits = student.clone().requires_grad_()
        output = distiller(logits, teacher, batch)
        for part in (*order, *order):
            (found,) = torch.autograd.grad(getattr(output, part), logits, retain_graph=True)
            scale = expected[part].abs().max()
            assert scale > 0
            torch.testing.assert_close(
                found, expected[part], atol=1e-5 * float(scale), rtol=1e-4, msg=f"{part} of {order}"
            )


def test_a_loss_is_checkpointed(pair: Pair) -> None:
    distiller = pair.distiller("prefix-kl", kd_weight=KD_WEIGHT, ce_weight=CE_WEIGHT)
    batch = distiller.collate(tiny_texts(2))
    student, teacher = signals(pair, batch)

    def run(logits: Tensor) -> Tensor:
        return distiller(logits, teacher, batch).loss

    grads = []
    for way in ("plain", "checkpointed"):
        logits = student.clone().requires_grad_()
        kept = {"use_reentrant": False}
        loss = run(logits) if way == "plain" else checkpoint(run, logits, **kept)
        grads.append(torch.autograd.grad(loss, logits)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.filterwarnings("ignore:.*count as unused")
@pytest.mark.parametrize("ended", ["kd", "loss"])
def test_a_gradient_of_the_weights_alone_leaves_nothing_to_the_next_of_the_logits(
    pair: Pair, ended: str
) -> None:
    distiller = pair.distiller(
        "p-kl", kd_weight=KD_WEIGHT, ce_weight=CE_WEIGHT, learnable_projection=True
    )
    batch = distiller.collate(tiny_texts(2))
    student, teacher = signals(pair, batch)
    weights = [each for each in distiller.parameters() if each.requires_grad]
    for part in ("kd", "ce", "loss"):
        logits = student.clone().requires_grad_()
        (expected,) = torch.autograd.grad(getattr(distiller(logits, teacher, batch), part), logits)
        output = distiller(logits, teacher, batch)
        torch.autograd.grad(getattr(output, ended), weights, retain_graph=True)
        (found,) = torch.autograd.grad(getattr(output, part), logits)
        torch.testing.assert_close(found, expected, msg=f"{part} after the weights of {ended}")
