"""exact-kl through the distiller: the targets are made in the step, from any teacher's signal."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import torch
from tokenizer_zoo import byte_level_bpe
from transformers import PreTrainedTokenizerFast

from xtoken import Pair
from xtoken.tensors.teacher_signal import TeacherTopK

TEXTS = ["In 1991, 20,126 of 3,401 walked.", "def f(x): return x[201:2024]"]


def a_pair() -> Pair:
    sides = byte_level_bpe(900, digits=3), byte_level_bpe(700, digits=1)
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    return Pair(
        *(
            PreTrainedTokenizerFast(tokenizer_object=side, bos_token=bos, eos_token=eos)
            for side in sides
        )
    )


def test_the_distiller_trains_with_exact_targets() -> None:
    pair = a_pair()
    distiller = pair.distiller("exact-kl", top_k=200)
    batch = distiller.collate(TEXTS)
    torch.manual_seed(0)
    shapes = [(*batch.student_ids.shape, pair.sizes[0]), (*batch.teacher_ids.shape, pair.sizes[1])]
    student = torch.randn(shapes[0], requires_grad=True)
    teacher = 3 * torch.randn(shapes[1])
    output = distiller(student, teacher, batch)
    output.loss.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert output.metrics["groups"] > 1
    stored = distiller(student, TeacherTopK.from_logits(teacher, 200), batch)
    torch.testing.assert_close(stored.kd, output.kd)
    steps = []
    row = student.detach().clone().requires_grad_()
    for _ in range(30):
        loss = distiller(row, teacher, batch).kd
        assert loss is not None
        steps.append(loss.item())
        (grad,) = torch.autograd.grad(loss, row)
        row = (row - 40 * grad).detach().requires_grad_()
    assert steps[-1] < 0.5 * steps[0]


def test_columns_below_a_probability_are_the_targets_tail() -> None:
    pair = a_pair()
    found = []
    for least in (0.0, 1e-3, 1e-2):
        distiller = pair.distiller("exact-kl", top_k=200, min_prob=least)
        batch = distiller.collate(TEXTS)
        torch.manual_seed(0)
        student = torch.randn(*batch.student_ids.shape, pair.sizes[0])
        teacher = 3 * torch.randn(*batch.teacher_ids.shape, pair.sizes[1])
        metrics = distiller(student, teacher, batch).metrics
        found.append((float(metrics["groups"]), float(metrics["target_tail"])))
    for (groups, tail), (fewer, more) in pairwise(found):
        assert fewer < groups
        assert more > tail


def test_of_full_logits_512_columns_are_looked_at_unless_more_are_asked_for() -> None:
    pair = a_pair()
    found = {}
    for top_k in (None, 512, pair.sizes[1]):
        distiller = pair.distiller("exact-kl", top_k=top_k, min_prob=0.0)
        batch = distiller.collate(TEXTS)
        torch.manual_seed(0)
        student = torch.randn(*batch.student_ids.shape, pair.sizes[0])
        teacher = torch.randn(*batch.teacher_ids.shape, pair.sizes[1])
        found[top_k] = float(distiller(student, teacher, batch).metrics["target_tail"])
    assert found[None] == found[512]
    assert found[pair.sizes[1]] < 0.5 * found[512]


def test_the_builder_is_copied_with_the_pair() -> None:
    pair = a_pair()
    distiller = pair.distiller("exact-kl")
    builder = distiller.parts.targets
    assert builder is not None
    for made in (copy.deepcopy(builder), pickle.loads(pickle.dumps(builder))):
        assert (made.tokens == builder.tokens).all()
        assert (made.roots == builder.roots).all()
