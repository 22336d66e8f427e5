"""The door: from texts to one scalar with a graph, by two objects."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_texts
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import xtoken
from xtoken import Pair
from xtoken.data import Conversation, make_examples
from xtoken.distillation import (
    Batch,
    Counts,
    DistillCollator,
    Distiller,
    DistillLossName,
    MultiBatch,
)
from xtoken.distillation.options import LOSS_NAMES, LossFields
from xtoken.errors import (
    ArgumentTypeError,
    DataError,
    NonFiniteError,
    OptionError,
    PairError,
    ShapeError,
    TokenIdError,
)
from xtoken.losses import LmHead, TeacherTopK
from xtoken.losses.inputs import LossInputs, LossOptions
from xtoken.losses.p_kl.loss import p_kl
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.pair_parts import PairParts

TEXTS = tiny_texts(8)
CHAT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
MESSAGES = [
    {"role": "user", "content": "How far is the moon?"},
    {"role": "assistant", "content": "It is 384,400 km from here."},
]


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    tokenizers = [AutoTokenizer.from_pretrained(folder / side) for side in ("student", "teacher")]
    for tokenizer in tokenizers:
        tokenizer.chat_template = CHAT
    return Pair(*tokenizers, cache_dir=False)


@pytest.fixture(scope="module")
def models(folder: Path) -> tuple[Any, Any]:
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / side) for side in ("student", "teacher")
    )
    return student, teacher.eval()


def signals(models: tuple[Any, Any], batch: Batch) -> tuple[Tensor, Tensor]:
    student, teacher = models
    with torch.no_grad():
        teacher_logits = teacher(**batch.teacher).logits
    return student(**batch.student).logits, teacher_logits


def gradient(models: tuple[Any, Any], loss: Tensor) -> Tensor:
    student = models[0]
    student.zero_grad()
    loss.backward()
    grads = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
    return torch.cat(grads).clone()


def test_a_loss_takes_two_objects(models: tuple[Any, Any], pair: Pair) -> None:
    distiller = pair.distiller("prefix-kl")
    batch = distiller.collate(TEXTS)
    student, teacher = models
    output = distiller(student(**batch.student).logits, teacher(**batch.teacher).logits, batch)
    output.loss.backward()
    assert output.loss > 0
    assert int(output.num_chunks) == len(batch.chunks) > 100
    assert output.ce is None


def test_it_is_the_function_of_the_parts(models: tuple[Any, Any], pair: Pair) -> None:
    distiller = pair.distiller("p-kl", top_k=64, direction="reverse", temperature=2.0)
    batch = distiller.collate(TEXTS)
    student, teacher = signals(models, batch)
    examples = make_examples(
        TEXTS, pair.student_tokenizer, pair.teacher_tokenizer, max_tokens=10**6
    ).examples
    alignments = [example.alignment for example in examples]
    chunks = ChunkBatch.from_alignments(alignments).usable(
        batch.student_loss_mask, batch.teacher_loss_mask
    )
    parts = PairParts.from_projection(pair.projection, needs="p-kl")
    expected = p_kl(
        LossInputs(student, teacher, chunks),
        parts,
        LossOptions(top_k=64, direction="reverse", temperature=2.0),
    )
    output = distiller(student, teacher, batch)
    assert torch.equal(output.loss, expected.loss)
    assert output.metrics["kl"] == expected.metrics["kl"]


@pytest.mark.parametrize("name", [name for name in LOSS_NAMES if name != "same-vocab-kl"])
def test_every_loss_is_reached_by_its_name(models: tuple[Any, Any], pair: Pair, name: Any) -> None:
    distiller = pair.distiller(name)
    batch = distiller.collate(TEXTS[:2])
    student, teacher = signals(models, batch)
    output = distiller(student, None if name == "ce" else teacher, batch)
    assert torch.isfinite(output.loss)
    assert gradient(models, output.loss).abs().sum() > 0


def test_a_teacher_with_the_same_tokenizer_is_reached_by_name(
    models: tuple[Any, Any], pair: Pair
) -> None:
    same = Pair(pair.student_tokenizer, pair.student_tokenizer, cache_dir=False)
    distiller = same.distiller("same-vocab-kl")
    batch = distiller.collate(TEXTS[:2])
    logits = models[0](**batch.student).logits
    assert float(distiller(logits, logits.detach(), batch).loss.detach()) == pytest.approx(
        0, abs=1e-6
    )
    with pytest.raises(PairError, match="same-vocab-kl"):
        pair.distiller("same-vocab-kl")


def test_padding_on_the_left_changes_nothing(models: tuple[Any, Any], pair: Pair) -> None:
    losses = []
    for side in ("right", "left"):
        distiller = pair.distiller("prefix-kl", padding_side=side, ce_weight=1.0)  # type: ignore[arg-type]
        batch = distiller.collate(TEXTS)
        assert ("position_ids" in batch.student) == (side == "left")
        losses.append(float(distiller(*signals(models, batch), batch).loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_gradient_does_not_depend_on_the_cut(models: tuple[Any, Any], pair: Pair) -> None:
    distiller = pair.distiller("prefix-kl", kd_weight=0.5, ce_weight=1.0)
    whole = distiller.collate(TEXTS)
    expected = gradient(models, distiller(*signals(models, whole), whole).loss)
    parts = [distiller.collate(TEXTS[:3]), distiller.collate(TEXTS[3:])]
    totals = sum((distiller.counts(part) for part in parts), Counts(0, 0))
    assert totals == distiller.counts(whole)
    found = torch.zeros_like(expected)
    for part in parts:
        found += gradient(models, distiller(*signals(models, part), part, totals=totals).loss)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_the_balance_gives_both_losses_one_size(models: tuple[Any, Any], pair: Pair) -> None:
    distiller = pair.distiller("p-kl", kd_weight="balanced", ce_weight=1.0)
    batch = distiller.collate(TEXTS)
    output = distiller(*signals(models, batch), batch)
    assert output.kd is not None
    assert output.ce is not None
    scaled = float((output.kd_scale * output.kd).detach())
    assert scaled == pytest.approx(float(output.ce.detach()), rel=1e-5)
    assert float(output.loss.detach()) == pytest.approx(2 * float(output.ce.detach()), rel=1e-5)
    assert output.metrics["kd_scale"] == output.kd_scale


def test_hidden_states_and_head_give_the_loss_of_the_logits(
    models: tuple[Any, Any], pair: Pair
) -> None:
    distiller = pair.distiller("p-kl", ce_weight=1.0)
    batch = distiller.collate(TEXTS[:3])
    student, teacher = signals(models, batch)
    hidden = models[0].model(**batch.student).last_hidden_state
    head = LmHead(hidden, models[0].get_output_embeddings().weight)
    plain, fused = (distiller(given, teacher, batch).loss for given in (student, head))
    assert float(fused.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)


@pytest.mark.parametrize("loss", ["p-kl", "prefix-kl", "exact-kl", "h-kl"])
def test_a_teacher_by_hidden_states_and_head_gives_the_loss_of_its_logits(
    models: tuple[Any, Any], pair: Pair, loss: DistillLossName
) -> None:
    distiller = pair.distiller(loss)
    batch = distiller.collate(TEXTS[:3])
    student, teacher = signals(models, batch)
    with torch.no_grad():
        hidden = models[1].model(**batch.teacher).last_hidden_state
    head = LmHead(hidden, models[1].get_output_embeddings().weight)
    plain, fused = (distiller(student, given, batch).loss for given in (teacher, head))
    assert float(fused.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)


def test_stored_predictions_stand_in_for_logits(models: tuple[Any, Any], pair: Pair) -> None:
    distiller = pair.distiller("p-kl")
    batch = distiller.collate(TEXTS[:3])
    student, teacher = signals(models, batch)
    size = pair.sizes[1]
    stored = TeacherTopK.from_logits(teacher, size, vocab_size=size)
    live, read = (
        float(distiller(student, given, batch).loss.detach()) for given in (teacher, stored)
    )
    assert read == pytest.approx(live, rel=1e-4)


def test_conversations_and_examples_are_collated_as_texts_are(pair: Pair) -> None:
    distiller = pair.distiller("p-kl")
    forms = [
        MESSAGES,
        {"messages": MESSAGES},
        Conversation.from_messages(MESSAGES),
        distiller.examples([MESSAGES])[0],
    ]
    batches = [distiller.collate([form]) for form in forms]  # type: ignore[list-item]
    for batch in batches:
        assert torch.equal(batch.student_ids, batches[0].student_ids)
        assert torch.equal(batch.student_loss_mask, batches[0].student_loss_mask)
        assert len(batch.chunks) == len(batches[0].chunks) > 3
    text = pair.student_tokenizer.decode(
        batches[0].student_ids[batches[0].student_loss_mask].tolist()
    )
    assert text.startswith("It is 384,400 km from here.")


def test_a_batch_moves_as_one(pair: Pair) -> None:
    distiller = pair.distiller("p-kl")
    batch = distiller.collate(TEXTS[:2])
    moved = batch.to("meta")
    tensors = [*moved.student.values(), *moved.teacher.values(), moved.chunks.sample]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.device.type == "meta"
    assert moved.pair == batch.pair == pair.fingerprints
    assert repr(batch).startswith("Batch(2 examples, student [2, ")


def test_ids_that_are_tokenized_already_make_a_batch(pair: Pair) -> None:
    distiller = pair.distiller("p-kl")
    rows = [side.encode(TEXTS[:2]) for side in pair.sides]
    batch, expected = distiller.batch(*rows), distiller.collate(TEXTS[:2])
    assert torch.equal(batch.student_ids, expected.student_ids)
    assert len(batch.chunks) == len(expected.chunks)


def test_examples_are_cut_at_a_boundary(pair: Pair) -> None:
    batch = pair.distiller("p-kl", max_tokens=24).collate(TEXTS)
    assert max(batch.student_ids.shape[1], batch.teacher_ids.shape[1]) <= 24


def test_weights_of_w_can_be_learned(models: tuple[Any, Any], pair: Pair) -> None:
    distiller = pair.distiller("p-kl", learnable_projection=True)
    assert sum(parameter.numel() for parameter in distiller.parameters()) > 0
    batch = distiller.collate(TEXTS[:3])
    distiller(*signals(models, batch), batch).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in distiller.parameters())
    assert not list(pair.distiller("p-kl").parameters())


def test_a_batch_or_teacher_of_another_pair_is_refused(models: tuple[Any, Any], pair: Pair) -> None:
    distiller = pair.distiller("p-kl")
    batch = distiller.collate(TEXTS[:2])
    student, teacher = signals(models, batch)
    other = Pair(pair.teacher_tokenizer, pair.teacher_tokenizer, cache_dir=False)
    foreign = other.distiller("p-kl").collate(TEXTS[:2])
    with pytest.raises(PairError, match="make the batch with this distiller's collate"):
        distiller(student, teacher, foreign)


def test_wrong_calls_name_what_was_meant(models: tuple[Any, Any], pair: Pair) -> None:
    distiller = pair.distiller("p-kl")
    batch = distiller.collate(TEXTS[:2])
    student, teacher = signals(models, batch)
    with pytest.raises(ArgumentTypeError, match=r"batch is a dict; pass distiller\.collate"):
        distiller(student, teacher, batch.student)
    with pytest.raises(ArgumentTypeError, match="needs the teacher's logits or a TeacherTopK"):
        distiller(student, None, batch)
    with pytest.raises(ArgumentTypeError, match=r"teacher is a .*; pass its logits"):
        distiller(student, models[1](**batch.teacher), batch)
    with pytest.raises(ArgumentTypeError, match=r"student is .*; pass the model's logits"):
        distiller(models[0](**batch.student), teacher, batch)
    with pytest.raises(ArgumentTypeError, match=r"items\[0\] is a int"):
        distiller.collate([3])  # type: ignore[list-item]
    with pytest.raises(DataError, match="a batch of 0 examples"):
        distiller.collate([])
    with pytest.raises(ArgumentTypeError, match=r"pair is a Projection; pass xtoken\.Pair"):
        Distiller(pair.projection)  # type: ignore[arg-type]


def test_options_are_refused_where_they_cannot_work(pair: Pair) -> None:
    with pytest.raises(OptionError, match="loss = 'pkl', expected one of prefix-kl, p-kl"):
        pair.distiller("pkl")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="has no option 'topk'; it knows "):
        pair.distiller("p-kl", topk=3)  # type: ignore[call-arg]
    with pytest.raises(OptionError, match="merge = 'mean' is not an option of alm"):
        pair.distiller("alm", merge="mean")
    with pytest.raises(OptionError, match="direction = 'reverse' is not an option of ce; it has"):
        pair.distiller("ce", direction="reverse")
    with pytest.raises(OptionError, match="learnable_projection = True, but ce trains no"):
        pair.distiller("ce", learnable_projection=True)
    with pytest.raises(OptionError, match="learnable_projection = True, but prefix-kl trains no"):
        pair.distiller("prefix-kl", learnable_projection=True)
    assert pair.distiller("ce", compiled=True).options.compiled
    with pytest.raises(OptionError, match="kd_weight = -1 is out of range; expected"):
        pair.distiller("p-kl", kd_weight=-1)
    with pytest.raises(OptionError, match="leaves nothing to train on"):
        pair.distiller("p-kl", kd_weight="balanced")


def test_the_options_of_a_distiller_are_those_of_the_losses() -> None:
    assert set(LossFields.__annotations__) == set(LossOptions.__dataclass_fields__)


def test_a_collator_crosses_to_the_workers_of_a_loader(pair: Pair) -> None:
    import pickle

    collator = pair.distiller("p-kl").collator
    again: DistillCollator = pickle.loads(pickle.dumps(collator))
    assert again.pair == pair.fingerprints


def test_several_teachers_learn_from_one_text(
    models: tuple[Any, Any], pair: Pair, folder: Path
) -> None:
    same = Pair(pair.student_tokenizer, pair.student_tokenizer, cache_dir=False)
    members = [pair.distiller("p-kl", max_tokens=60), same.distiller("same-vocab-kl")]
    both = xtoken.distiller(members, weights=[1.0, 0.25])
    batch = both.collate(TEXTS[:4])
    student, teacher = models
    assert all(part.student_ids.shape == batch.student["input_ids"].shape for part in batch.batches)
    with torch.no_grad():
        second = student(**batch.teachers[1]).logits * 0.5
        first = teacher(**batch.teachers[0]).logits
    logits = student(**batch.student).logits
    output = both(logits, [first, second], batch)
    alone = [
        float(member(logits, signal, part).loss.detach())
        for member, signal, part in zip(members, (first, second), batch.batches, strict=True)
    ]
    assert float(output.loss.detach()) == pytest.approx(alone[0] + 0.25 * alone[1], rel=1e-5)
    assert {"teacher0/kl", "teacher1/kl"} <= set(output.metrics)
    confident = xtoken.distiller(members, weights="max_prob", ce_weight=1.0)
    assert torch.isfinite(confident(logits, [first, second], batch).loss)


def test_one_of_several_teachers_counts_whatever_its_own_weights_are(
    models: tuple[Any, Any], pair: Pair
) -> None:
    """A member's own `kd_weight` of 0 left its chunks uncounted, so that its loss was their sum."""
    texts = TEXTS[:4]
    alone = pair.distiller("p-kl")
    batch = alone.collate(texts)
    student, teacher = signals(models, batch)
    expected = float(alone(student, teacher, batch).loss.detach())
    both = xtoken.distiller([pair.distiller("p-kl", kd_weight=0.0, ce_weight=1.0)], weights=[1.0])
    output = both(student, [teacher], both.collate(texts))
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ArgumentTypeError, match="needs the teacher's logits or a TeacherTopK"):
        both(student, [None], both.collate(texts))


def test_weights_of_several_teachers_follow_the_rules_of_one(
    models: tuple[Any, Any], pair: Pair
) -> None:
    with pytest.raises(OptionError, match="kd_weight = -1 is out of range; expected"):
        xtoken.distiller([pair], kd_weight=-1)
    with pytest.raises(OptionError, match="leaves nothing to train on"):
        xtoken.distiller([pair], kd_weight="balanced")
    with pytest.raises(OptionError, match=r"distillers\[1\] has loss 'ce', which reads no teacher"):
        xtoken.distiller([pair, pair.distiller("ce")])
    without = xtoken.distiller([pair], kd_weight=0.0, ce_weight=1.0)
    batch = without.collate(TEXTS[:2])
    logits = models[0](**batch.student).logits
    one = pair.distiller("p-kl", kd_weight=0.0, ce_weight=1.0)
    expected = one(logits, None, one.collate(TEXTS[:2])).loss
    assert torch.equal(without(logits, [None], batch).loss, expected)


def test_wrong_calls_of_several_teachers_name_what_was_meant(
    models: tuple[Any, Any], pair: Pair
) -> None:
    one = pair.distiller("p-kl")
    both = xtoken.distiller([pair, one])
    batch = both.collate(TEXTS[:2])
    student, teacher = signals(models, one.collate(TEXTS[:2]))
    with pytest.raises(ArgumentTypeError, match="batch is a Batch, expected a MultiBatch of 2"):
        both(student, [teacher, teacher], one.collate(TEXTS[:2]))
    with pytest.raises(ArgumentTypeError, match="batch is a MultiBatch of 1 teachers"):
        both.counts(xtoken.distiller([pair]).collate(TEXTS[:2]))
    with pytest.raises(ArgumentTypeError, match="1 totals for 2 teachers"):
        both(student, [teacher, teacher], batch, totals=both.counts(batch)[:1])
    with pytest.raises(ArgumentTypeError, match=r"teachers is a Pair; pass a list"):
        xtoken.distiller(pair)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"weights = \['a'\], expected 1 numbers"):
        xtoken.distiller([pair], weights=["a"])  # type: ignore[list-item]
    with pytest.raises(OptionError, match="weights = 'sure', expected numbers or ce, entropy"):
        xtoken.distiller([pair], weights="sure")  # type: ignore[arg-type]


def test_several_teachers_have_one_student_side(pair: Pair) -> None:
    right, left = pair.distiller("p-kl"), pair.distiller("p-kl", padding_side="left")
    message = "one distiller pads on the right to multiples of 1, another on the left"
    with pytest.raises(OptionError, match=message):
        xtoken.distiller([right, left])
    with pytest.raises(OptionError, match="another on the right to multiples of 8"):
        xtoken.distiller([pair, pair.distiller("p-kl", pad_to_multiple_of=8)])
    texts = [TEXTS[0], TEXTS[0][:40]]
    for other in (right.collate(TEXTS[1:3]), left.collate(texts)):
        with pytest.raises(ShapeError, match=r"batches\[1\] holds other student tokens or padding"):
            MultiBatch((right.collate(texts), other))


def test_narrow_heads_are_cut_off_for_several_teachers_as_for_one(
    models: tuple[Any, Any], pair: Pair
) -> None:
    one = pair.distiller("p-kl", ce_weight=1.0)
    several = xtoken.distiller([pair.distiller("p-kl")], weights=[1.0], ce_weight=1.0)
    batch = one.collate([TEXTS[0]])
    rows, columns = (size - 1 for size in pair.sizes)
    student, teacher = signals(models, batch)
    student, teacher = student[..., :rows], teacher[..., :columns]
    with pytest.warns(UserWarning, match="count as unused"):
        expected = one(student, teacher, batch).loss
    with pytest.warns(UserWarning, match="count as unused"):
        found = several(student, [teacher], several.collate([TEXTS[0]])).loss
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_teachers_of_other_students_are_refused(pair: Pair) -> None:
    other = Pair(pair.teacher_tokenizer, pair.teacher_tokenizer, cache_dir=False)
    with pytest.raises(PairError, match="several teachers need one student tokenizer"):
        xtoken.distiller([pair, other])
    with pytest.raises(OptionError, match="0 teachers, expected at least 1"):
        xtoken.distiller([])
    with pytest.raises(OptionError, match="expected 1 numbers of at least 0"):
        xtoken.distiller([pair], weights=[1.0, 2.0])


OF_TWO_TOKENIZERS = [name for name in LOSS_NAMES if name not in ("ce", "auto", "same-vocab-kl")]
CASES: list[tuple[Any, dict[str, Any]]] = [
    *((name, {}) for name in OF_TWO_TOKENIZERS),
    ("p-kl", {"cells": True, "consistent": True}),
    ("p-kl", {"top_k": 20, "tail_bucket": "auto", "direction": "jsd"}),
    ("p-kl", {"top_k": 20, "top_k_by": "student", "full_metrics": True}),
    ("p-kl", {"learnable_projection": True, "top_k": 20, "top_k_scope": "microbatch"}),
    ("prefix-kl", {"cells": True, "consistent": True}),
    ("prefix-kl", {"mirror": True, "top_k": 20, "direction": "reverse"}),
    ("exact-kl", {"direction": "jsd"}),
]


def a_step(
    distiller: Distiller, batch: Batch, student: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor]:
    logits = student.clone().requires_grad_()
    loss = distiller(logits, teacher, batch).loss
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def anew(pair: Pair) -> Pair:
    """The pair, with nothing of it made yet."""
    return Pair(pair.student_tokenizer, pair.teacher_tokenizer, cache_dir=False)


def random_signals(pair: Pair, batch: Batch) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sides = zip((batch.student_ids, batch.teacher_ids), pair.sizes, strict=True)
    return [2 * torch.randn(*ids.shape, size, generator=generator) for ids, size in sides]


@pytest.mark.filterwarnings("ignore:.*count as unused")
@pytest.mark.parametrize("narrow", [0, 1])
@pytest.mark.parametrize(("loss", "options"), CASES)
def test_the_default_device_of_the_caller_changes_nothing(
    pair: Pair, loss: Any, options: dict[str, Any], narrow: int
) -> None:
    """Meta stands in for a GPU: it holds no numbers, so that nothing may be made there."""
    distiller = pair.distiller(loss, ce_weight=0.5, **options)
    batch = distiller.collate(TEXTS[:2])
    student, teacher = random_signals(pair, batch)
    student = student[..., : pair.sizes[0] - narrow]
    expected = a_step(distiller, batch, student, teacher)
    stored = TeacherTopK.from_logits(teacher, 30, ids=batch.teacher_ids)
    of_stored = float(distiller(student, stored, batch).loss.detach())
    with torch.device("meta"):
        distiller = anew(pair).distiller(loss, ce_weight=0.5, **options)
        batch = distiller.collate(TEXTS[:2])
        found = a_step(distiller, batch, student, teacher)
        assert float(distiller(student, stored, batch).loss.detach()) == of_stored
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.*count as unused")
@pytest.mark.parametrize("narrow", [0, 1])
@pytest.mark.parametrize(("loss", "options"), CASES)
def test_what_was_made_under_inference_mode_is_trained_with(
    pair: Pair, loss: Any, options: dict[str, Any], narrow: int
) -> None:
    distiller = pair.distiller(loss, ce_weight=0.5, **options)
    batch = distiller.collate(TEXTS[:2])
    student, teacher = random_signals(pair, batch)
    student = student[..., : pair.sizes[0] - narrow]
    expected = a_step(distiller, batch, student, teacher)
    with torch.inference_mode():
        distiller = anew(pair).distiller(loss, ce_weight=0.5, **options)
        batch = distiller.collate(TEXTS[:2])
        assert not distiller(student, teacher.clone(), batch).loss.requires_grad
    torch.testing.assert_close(a_step(distiller, batch, student, teacher), expected)


def narrow_case(pair: Pair, batch: Batch) -> tuple[tuple[int, int], Tensor, Tensor]:
    """Widths below the tokenizers', and logits of whole heads that give no mass beyond."""
    sides = zip((batch.student_ids, batch.teacher_ids), pair.sizes, strict=True)
    rows, columns = (max(int(ids.max()) + 1, size - 10) for ids, size in sides)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        2 * torch.randn(*ids.shape, size, generator=generator)
        for ids, size in zip((batch.student_ids, batch.teacher_ids), pair.sizes, strict=True)
    )
    # Of what only the tokens beyond can say, the loss would be infinite.
    for token in range(rows, pair.sizes[0]):
        pieces = pair.projection.token_pieces(token)
        if len(pieces) == 1:
            teacher[..., pieces[0]] = -torch.inf
    student[..., rows:] = -torch.inf
    teacher[..., columns:] = -torch.inf
    return (rows, columns), student, teacher


@pytest.mark.parametrize("narrow", ["both", "student", "teacher"])
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        *((name, {}) for name in OF_TWO_TOKENIZERS),
        ("p-kl", {"cells": True, "consistent": True}),
        ("prefix-kl", {"cells": True, "consistent": True}),
        ("exact-kl", {"cells": False, "consistent": False}),
        ("exact-kl", {"direction": "jsd"}),
    ],
)
def test_heads_narrower_than_their_tokenizers_leave_the_last_tokens_out(
    pair: Pair, loss: Any, options: dict[str, Any], narrow: str
) -> None:
    distiller = pair.distiller(loss, **options)
    batch = distiller.collate([TEXTS[0]])
    (rows, columns), student, teacher = narrow_case(pair, batch)
    found = []
    for cut in (False, True):
        logits = student[..., :rows] if cut and narrow != "teacher" else student
        other = teacher[..., :columns] if cut and narrow != "student" else teacher
        logits = logits.clone().requires_grad_()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            output = distiller(logits, other, batch)
        assert cut == any("count as unused" in str(each.message) for each in said)
        output.loss.backward()
        assert logits.grad is not None
        found.append((output.loss.detach(), logits.grad[..., :rows]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_weights_of_w_are_learned_under_a_narrow_head_too(pair: Pair) -> None:
    distiller = pair.distiller("p-kl", learnable_projection=True)
    batch = distiller.collate([TEXTS[0]])
    (rows, columns), student, teacher = narrow_case(pair, batch)
    w = distiller.parts.projection
    assert w is not None
    assert w.free is not None
    with torch.no_grad():  # as after some steps
        w.free += torch.randn(w.free.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for logits, other in ((student, teacher), (student[..., :rows], teacher[..., :columns])):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            output = distiller(logits, other, batch)
        (grad,) = torch.autograd.grad(output.loss, w.free)
        assert grad.abs().sum() > 0
        found.append((output.loss.detach(), grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("loss", "options"), CASES)
def test_what_the_models_say_at_padding_is_not_looked_at(
    pair: Pair, loss: Any, options: dict[str, Any], side: Any
) -> None:
    distiller = pair.distiller(loss, padding_side=side, **options)
    batch = distiller.collate([TEXTS[0], TEXTS[1][:40], {"prompt": "One ", "completion": "is 1."}])
    student, teacher = random_signals(pair, batch)
    expected = a_step(distiller, batch, student, teacher)
    assert (batch.teacher["attention_mask"] == 0).any()
    student[batch.student["attention_mask"] == 0] = torch.nan
    teacher[batch.teacher["attention_mask"] == 0] = torch.nan
    found = a_step(distiller, batch, student, teacher)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize(("loss", "options"), CASES)
def test_a_batch_without_a_chunk_has_a_loss_of_nothing(
    pair: Pair, loss: Any, options: dict[str, Any]
) -> None:
    distiller = pair.distiller(loss, **options)
    batch = distiller.batch([[5]], [[5]])
    value, grad = a_step(distiller, batch, *random_signals(pair, batch))
    assert float(value) == 0.0
    assert not grad.any()


def test_a_row_that_a_target_reads_may_hold_no_nan(pair: Pair) -> None:
    distiller = pair.distiller("exact-kl", padding_side="left")
    batch = distiller.collate([TEXTS[0], TEXTS[1][:40]])
    student, teacher = random_signals(pair, batch)
    teacher[1, -3, 7] = torch.nan
    place = teacher.shape[1] - 3
    with pytest.raises(NonFiniteError, match=rf"logits\[1, {place}\] holds NaN or \+inf"):
        distiller(student, teacher, batch)


@pytest.mark.filterwarnings("ignore:.*count as unused")
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_needs_no_row_of_the_models(
    models: tuple[Any, Any], folder: Path, side: Any
) -> None:
    tokenizers = [AutoTokenizer.from_pretrained(folder / side) for side in ("student", "teacher")]
    plain = Pair(*tokenizers, cache_dir=False).distiller("p-kl", padding_side=side)
    expected = plain(*signals(models, batch := plain.collate(TEXTS[:3])), batch).loss
    for tokenizer in tokenizers:
        tokenizer.add_special_tokens({"pad_token": "<added>"})  # and no resize_token_embeddings
    distiller = Pair(*tokenizers, cache_dir=False).distiller("p-kl", padding_side=side)
    batch = distiller.collate(TEXTS[:3])
    found = distiller(*signals(models, batch), batch)
    assert float(found.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    # Padding of another collator may be any token.
    ids = batch.student_ids.masked_fill(
        batch.student["attention_mask"] == 0, len(tokenizers[0]) - 1
    )
    batch = batch.remade(student=batch.student | {"input_ids": ids})
    student, teacher = signals(models, distiller.collate(TEXTS[:3]))
    assert torch.equal(distiller(student, teacher, batch).loss, found.loss)


def test_a_token_beyond_the_head_is_refused_where_a_text_holds_it(
    models: tuple[Any, Any], pair: Pair
) -> None:
    distiller = pair.distiller("p-kl")
    batch = distiller.collate([TEXTS[0]])
    student, teacher = signals(models, batch)
    ids = batch.student_ids.clone()
    ids[0, 3] = pair.sizes[0] - 1
    batch = batch.remade(student=batch.student | {"input_ids": ids})
    with (
        pytest.warns(UserWarning, match="count as unused"),
        pytest.raises(TokenIdError, match="resize_token_embeddings"),
    ):
        distiller(student[..., :-1], teacher, batch)
    with pytest.raises(ShapeError, match="this is another model's tokenizer"):
        distiller(student[..., :400], teacher, batch)
