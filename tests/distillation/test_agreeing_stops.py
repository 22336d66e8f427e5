"""What stops a side is one event: an agreeing pair has loss 0 and no gradient where it stops."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from chat_families import ENDINGS, ending
from torch import Tensor

from xtoken import ChunkKind, Pair
from xtoken.data import Example
from xtoken.distillation import Batch, Distiller
from xtoken.losses import LOSSES, TeacherTopK
from xtoken.vocab.side import Side, SideName

MESSAGES = [
    {"role": "user", "content": "How far is the moon?"},
    {"role": "assistant", "content": "384,400 km."},
    {"role": "user", "content": "And the sun?"},
    {"role": "assistant", "content": "150 million km."},
]
FAMILIES = tuple(
    name
    for name in ENDINGS
    if name
    in ("chatml", "gemma3", "gemma4", "gpt-oss", "phi4", "llama3 base config", "unknown names")
)
# One template of them asks for a system prompt, which others have no place for.
TEACHERS = tuple(name for name in ENDINGS if name != "a system prompt is asked for")
# What the teacher may split its probability of stopping into.
STOP, GO_ON = 0.37, 0.63
NEVER = -40.0


@cache
def side_of(side: SideName, name: str) -> Side:
    return Side(side, ending(name).tokenizer)


@cache
def pair_of(student: str, teacher: str) -> Pair:
    return Pair(side_of("student", student), side_of("teacher", teacher), cache_dir=False)


@cache
def examples_of(pair: Pair) -> list[Example]:
    """MESSAGES as each loss of the pair collates them."""
    return pair.distiller("ce").examples([MESSAGES])


def collated(distiller: Distiller) -> Batch:
    return distiller.prepared(distiller.collator(examples_of(distiller.pair)))


def stop_chunks(batch: Batch) -> Tensor:
    return (batch.chunks.kind == int(ChunkKind.SPECIAL)).nonzero().flatten()


def agreeing(pair: Pair, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits of two models that stop with one probability at each end of a turn, by the marker that
    stands there, say one and the same word else, and go with the text everywhere else."""
    word = b"the"
    at = {"student": pair.student_vocab.id_of(word), "teacher": pair.teacher_vocab.id_of(word)}
    logits = []
    for side, size in zip(("student", "teacher"), pair.sizes, strict=True):
        ids = getattr(batch, side)["input_ids"]
        rows = torch.full((*ids.shape, size), NEVER)
        rows.scatter_(2, ids.roll(-1, 1)[..., None], 0.0)  # else the text as it is
        starts = getattr(batch.chunks, f"{side}_start")
        for chunk in stop_chunks(batch).tolist():
            sample, start = int(batch.chunks.sample[chunk]), int(starts[chunk])
            rows[sample, start - 1] = NEVER
            rows[sample, start - 1, at[side]] = torch.tensor(GO_ON).log()
            rows[sample, start - 1, ids[sample, start]] = torch.tensor(STOP).log()
        logits.append(rows)
    return logits[0].requires_grad_(), logits[1]


def only_stops(batch: Batch) -> Batch:
    return replace(batch, chunks=batch.chunks.select(stop_chunks(batch)))


@pytest.mark.parametrize(("student", "teacher"), [*itertools.product(FAMILIES, TEACHERS)])
def test_ends_of_turns_are_among_the_counted_chunks(student: str, teacher: str) -> None:
    pair = pair_of(student, teacher)
    batch = pair.distiller("p-kl").collate([MESSAGES])
    counted = stop_chunks(batch)
    assert len(counted) >= 1
    for side in ("student", "teacher"):
        ids, starts = getattr(batch, side)["input_ids"], getattr(batch.chunks, f"{side}_start")
        stops = getattr(pair, f"{side}_vocab").stops
        for chunk in counted.tolist():
            assert int(ids[batch.chunks.sample[chunk], starts[chunk]]) in stops


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "same-vocab-kl"])
@pytest.mark.parametrize(("student", "teacher"), [*itertools.product(FAMILIES, FAMILIES)])
def test_an_agreeing_pair_has_no_loss_and_no_gradient_where_it_stops(
    student: str, teacher: str, loss: Any
) -> None:
    distiller: Distiller = pair_of(student, teacher).distiller(loss)
    batch = only_stops(collated(distiller))
    student_logits, teacher_logits = agreeing(distiller.pair, batch)
    output = distiller(student_logits, teacher_logits, batch)
    output.loss.backward()
    assert float(output.loss.detach()) == pytest.approx(0, abs=1e-6)
    assert student_logits.grad is not None
    assert float(student_logits.grad.nan_to_num().abs().max()) < 1e-6


@pytest.mark.parametrize("loss", ["p-kl", "prefix-kl"])
@pytest.mark.parametrize(("student", "teacher"), [("chatml", "gemma3"), ("gemma3", "gpt-oss")])
def test_an_agreeing_pair_has_no_loss_where_it_stops_on_cells_too(
    student: str, teacher: str, loss: Any
) -> None:
    distiller: Distiller = pair_of(student, teacher).distiller(loss, cells=True)
    batch = only_stops(distiller.collate([MESSAGES]))
    output = distiller(*agreeing(distiller.pair, batch), batch)
    assert float(output.loss.detach()) == pytest.approx(0, abs=1e-6)


def test_stops_that_the_student_lacks_are_added_to_the_one_that_it_has() -> None:
    pair = pair_of("chatml", "gemma3")
    # A student with one marker for the end of a turn and of a text.
    tokenizer = ending("chatml").tokenizer
    one = Pair(_with_eos(tokenizer, "<|im_end|>"), pair.teacher_tokenizer, cache_dir=False)
    distiller = one.distiller("p-kl")
    batch = only_stops(distiller.collate([MESSAGES]))
    student_logits, teacher_logits = agreeing(one, batch)
    eos = one.teacher_vocab.roles["eos"]
    split = teacher_logits.clone()
    for chunk in range(len(batch.chunks)):
        sample, at = int(batch.chunks.sample[chunk]), int(batch.chunks.teacher_start[chunk]) - 1
        marker = int(batch.teacher_ids[sample, at + 1])
        split[sample, at, marker] = torch.tensor(0.3 * STOP).log()
        split[sample, at, eos] = torch.tensor(0.7 * STOP).log()
    for signal in (split, TeacherTopK.from_logits(split, 16, vocab_size=one.sizes[1])):
        for options in ({}, {"top_k": 8}, {"top_k": 8, "top_k_scope": "microbatch"}):
            loss = one.distiller("p-kl", **options)(student_logits, signal, batch).loss  # type: ignore[arg-type]
            assert float(loss.detach()) == pytest.approx(0, abs=1e-6), options


def _with_eos(tokenizer: Any, eos: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.eos_token = eos
    return changed
