"""Targets made once from stored predictions: found again, resumed, refused, and the same loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizer_zoo import byte_level_bpe
from transformers import PreTrainedTokenizerFast

from xtoken import Pair
from xtoken.data import Example
from xtoken.distillation import Distiller
from xtoken.distillation.batch import Batch
from xtoken.errors import PairError, StoreError
from xtoken.losses.exact_kl.batch_targets import target_options
from xtoken.targets import TargetExample, TargetOptions
from xtoken.teachers import Predictions, StoreKey, TargetStore, TopKStore
from xtoken.teachers import target_store as module
from xtoken.training.batches import ExampleCollator
from xtoken.training.routing import unasked
from xtoken.training.teaching import Teaching

TEXTS = [
    "In 1991, 20,126 of 3,401 walked.",
    "def f(x): return x[201:2024]",
    "Hundreds of numbers: 1 22 333 4444.",
]
COLUMNS = 60


@pytest.fixture(scope="module")
def distiller() -> Distiller:
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    sides = [
        PreTrainedTokenizerFast(
            tokenizer_object=byte_level_bpe(size, digits=digits), bos_token=bos, eos_token=eos
        )
        for size, digits in ((900, 3), (700, 1))
    ]
    return Pair(*sides).distiller("exact-kl", top_k=COLUMNS)


def predictions(ids: np.ndarray, size: int) -> Predictions:
    rng = np.random.default_rng(len(ids))
    logits = 3 * rng.standard_normal((len(ids), size))
    log_probs = torch.log_softmax(torch.from_numpy(logits).float(), -1)
    best = log_probs.topk(COLUMNS, -1)
    own = np.zeros(len(ids), np.float32)
    return Predictions(best.indices.numpy(), best.values.numpy(), own)


def stored(folder: Path, distiller: Distiller, examples: list[Example]) -> TopKStore:
    vocab = distiller.pair.teacher_vocab
    store = TopKStore(folder, StoreKey("teacher", COLUMNS, "float32", vocab.fingerprint))
    ids = [example.teacher_ids for example in examples]
    store.add(ids, [predictions(each, distiller.pair.sizes[1]) for each in ids])
    return store


def opened(folder: Path, distiller: Distiller, **options: object) -> TargetStore:
    builder = distiller.parts.targets
    assert builder is not None
    chosen = TargetOptions(**options) if options else target_options(distiller.options)  # type: ignore[arg-type]
    return TargetStore(TopKStore.open(folder), builder, chosen)


def test_what_is_kept_is_what_the_builder_makes(tmp_path: Path, distiller: Distiller) -> None:
    examples = distiller.examples(TEXTS)
    predicted = stored(tmp_path, distiller, examples)
    store = opened(tmp_path, distiller)
    assert store.fill(examples, threads=1) == len(TEXTS)
    assert store.fill(examples) == 0
    again = opened(tmp_path, distiller)
    assert len(again) == len(TEXTS)
    assert all(example in again for example in examples)
    found = again.targets(examples[::-1])
    assert again.examples_made == 0
    rows = [predicted.get(example.teacher_ids) for example in examples[::-1]]
    expected = store.builder.build(
        [
            TargetExample(each.student_ids, each.teacher_ids, each.alignment, r.log_probs, r.ids)
            for each, r in zip(examples[::-1], rows, strict=True)
        ],
        store.options,
    )
    assert found == expected
    assert found.example(1) == again.targets([examples[1]])


def test_columns_that_pad_the_teachers_head_are_none(tmp_path: Path, distiller: Distiller) -> None:
    examples, size = distiller.examples(TEXTS), distiller.pair.sizes[1]
    ids = [example.teacher_ids for example in examples]
    found = [predictions(each, size + 64) for each in ids]
    assert any((each.ids >= size).any() for each in found)
    key = StoreKey("teacher", COLUMNS, "float32", distiller.pair.teacher_vocab.fingerprint)
    TopKStore(tmp_path, key).add(ids, found)
    store = opened(tmp_path, distiller)
    store.fill(examples, threads=1)
    made = [
        TargetExample(
            example.student_ids, example.teacher_ids, example.alignment, row.log_probs,
            np.where(row.ids < size, row.ids, -1),
        )
        for example, row in zip(examples, found, strict=True)
    ]  # fmt: skip
    builder = distiller.parts.targets
    assert builder is not None
    assert store.targets(examples) == builder.build(made, store.options, threads=1)


def test_an_interrupted_fill_goes_on_where_it_stopped(
    tmp_path: Path, distiller: Distiller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOKENS_PER_FILE", 8)
    examples = distiller.examples(TEXTS)
    stored(tmp_path, distiller, examples)

    def stop(done: int, total: int) -> None:
        assert total == len(TEXTS)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path, distiller).fill(examples, progress=stop)
    rest = opened(tmp_path, distiller)
    assert len(rest) == 2
    assert rest.fill(examples) == 1


def test_a_damaged_file_is_left_aside_and_its_targets_are_made_again(
    tmp_path: Path, distiller: Distiller
) -> None:
    examples = distiller.examples(TEXTS)
    stored(tmp_path, distiller, examples)
    store = opened(tmp_path, distiller)
    store.fill(examples)
    (path,) = store.directory.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    damaged = opened(tmp_path, distiller)
    assert damaged.files_discarded == 1
    assert len(damaged) == 0
    assert damaged.fill(examples) == len(TEXTS)
    assert opened(tmp_path, distiller).targets(examples) == store.targets(examples)


def test_other_options_and_other_pairs_have_targets_of_their_own(
    tmp_path: Path, distiller: Distiller
) -> None:
    examples = distiller.examples(TEXTS)
    stored(tmp_path, distiller, examples)
    opened(tmp_path, distiller).fill(examples)
    assert len(opened(tmp_path, distiller, levels=0)) == 0
    key = StoreKey("teacher", COLUMNS, "float32", "0" * 64)
    foreign = TopKStore(tmp_path / "foreign", key)
    assert distiller.parts.targets is not None
    with pytest.raises(PairError, match="teacher tokenizer"):
        TargetStore(foreign, distiller.parts.targets, TargetOptions())


def test_a_text_that_was_kept_for_another_teacher_has_its_targets_when_it_is_for_this_one(
    tmp_path: Path, distiller: Distiller
) -> None:
    examples = list(distiller.examples(TEXTS))
    stored(tmp_path, distiller, examples)
    fresh = opened(tmp_path, distiller).targets(examples)
    of_another = [
        replace(each, teacher_loss_mask=np.zeros_like(each.teacher_loss_mask)) for each in examples
    ]
    assert opened(tmp_path, distiller).fill(of_another) == len(TEXTS)
    assert len(opened(tmp_path, distiller).targets(of_another)) == 0
    assert opened(tmp_path, distiller).targets(examples) == fresh
    # In one call too.
    store = opened(tmp_path, distiller)
    assert store.fill([*of_another, *examples]) == len(TEXTS)
    assert opened(tmp_path, distiller).targets(examples) == fresh
    assert len(opened(tmp_path, distiller).targets(of_another)) == 0


def test_a_text_of_one_teacher_token_needs_no_predictions(
    tmp_path: Path, distiller: Distiller
) -> None:
    examples = list(distiller.examples(TEXTS))
    stored(tmp_path, distiller, examples)
    ids = examples[0].teacher_ids[-1:]
    assert ids not in TopKStore.open(tmp_path)
    # Its mask holds a first token, which nothing predicts.
    single = unasked(replace(examples[0], teacher_ids=ids))
    single = replace(single, teacher_loss_mask=np.ones(1, dtype=np.bool_))
    store = opened(tmp_path, distiller)
    assert store.knows([single, *examples])
    assert len(store.targets([single])) == 0
    assert store.targets([single, *examples]).example(1) == store.targets(examples).example(0)


def test_an_example_without_predictions_is_refused(tmp_path: Path, distiller: Distiller) -> None:
    examples = distiller.examples(TEXTS)
    stored(tmp_path, distiller, examples[:2])
    with pytest.raises(StoreError, match="no predictions"):
        opened(tmp_path, distiller).fill(examples)


def test_a_step_with_stored_targets_has_the_loss_of_one_that_makes_them(
    tmp_path: Path, distiller: Distiller
) -> None:
    examples = distiller.examples(TEXTS)
    predicted = stored(tmp_path, distiller, examples)
    store = opened(tmp_path, distiller)
    store.fill(examples)
    batch = distiller.prepared(distiller.collator(examples))
    torch.manual_seed(0)
    student = torch.randn(*batch.student_ids.shape, distiller.pair.sizes[0], requires_grad=True)
    signal = predicted.signal(batch.teacher_ids, batch.teacher["attention_mask"])
    kept = batch.with_targets(store.targets(examples), store.builder.tokens)
    assert kept.targets is not None
    assert kept.to("cpu").targets is not None
    found, expected = distiller(student, signal, kept), distiller(student, signal, batch)
    torch.testing.assert_close(found.kd, expected.kd)
    gradients = [torch.autograd.grad(each.loss, student)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_a_collator_has_targets_wherever_predictions_are_stored(
    tmp_path: Path, distiller: Distiller
) -> None:
    examples = distiller.examples(TEXTS)
    predicted = stored(tmp_path, distiller, examples[:2])
    store = opened(tmp_path, distiller)
    assert not len(store)
    assert store.knows(examples[:2])
    assert not store.knows(examples)
    collator = ExampleCollator(Teaching([distiller], [predicted]))
    batch = collator.batch([(each,) for each in examples[:2]])
    assert isinstance(batch, Batch)
    assert batch.targets is not None
    kept = distiller.collate(examples[:2]).with_targets(
        store.targets(examples[:2]), store.builder.tokens
    )
    assert kept.targets is not None
    torch.testing.assert_close(batch.targets.probs, kept.targets.probs, rtol=0, atol=0)
    assert torch.equal(batch.targets.tokens, kept.targets.tokens)
    # What is not stored yet is left to the step, which asks the teacher.
    other = collator.batch([(each,) for each in examples])
    assert isinstance(other, Batch)
    assert other.targets is None
