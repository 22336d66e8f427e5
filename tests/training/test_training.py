"""Training: the gradient of a step, evaluation, and what a run leaves behind."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_texts, write_pair
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from xtoken import Vocab
from xtoken._files import json_text
from xtoken.data import split_held_out
from xtoken.distillation import Counts, DistillCollator
from xtoken.errors import ArgumentTypeError, OptionError, TokenIdError
from xtoken.losses.exact_kl.depth_weights import DepthWeights
from xtoken.projection import Projection
from xtoken.teachers import StoreKey, TopKStore
from xtoken.tensors.target_batch import HostTargets
from xtoken.training import (
    DistillConfig,
    DistillTrainer,
    HeldOutEvaluator,
    HeldOutScore,
    ModelPair,
    PreparedData,
    load_models,
    open_teachers,
    prepare,
    train,
)
from xtoken.training.config_arguments import training_arguments
from xtoken.training.metrics_log import read_history
from xtoken.training.prepare import store_folder
from xtoken.vocab.classes import class_of

CONFIG = DistillConfig(
    steps=1,
    batch_size=6,
    top_k=64,
    teacher_top_k=64,
    max_tokens=96,
    learning_rate=3e-3,
    device="cpu",
    max_grad_norm=1e9,
    curves=False,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    return load_models(*write_pair(tmp_path_factory.mktemp("pair")))


@pytest.fixture(scope="module")
def materials(models: ModelPair) -> PreparedData:
    return prepare(models, split_held_out(tiny_texts(80), 0.2), CONFIG)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the teacher predicts of `materials`, computed once."""
    return tmp_path_factory.mktemp("cache")


class KeepGradient(TrainerCallback):
    """Keeps the gradient that the optimizer is about to use."""

    def __init__(self) -> None:
        self.gradient: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model: nn.Module, **_) -> None:
        self.gradient = {
            name: parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }


def gradient_of_a_step(
    materials: PreparedData, config: DistillConfig, cache: Path, padding_side: str = "right"
) -> dict[str, torch.Tensor]:
    keep = KeepGradient()
    teacher = open_teachers(materials, config, [config.loss], cache)[config.loss]
    trainer = DistillTrainer(
        materials.models.load_student(),
        training_arguments(config, cache),
        teachers=[] if teacher is None else [teacher],
        train_dataset=materials.train,
        processing_class=materials.pair,
        data_collator=DistillCollator(padding_side=padding_side),  # type: ignore[arg-type]
    )
    trainer.add_callback(keep)
    trainer.train()
    return keep.gradient


def assert_same_gradient(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    scale = max(float(gradient.abs().max()) for gradient in one.values())
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize(
    ("loss", "kd_weight"),
    [
        *(("p-kl", weight) for weight in ("balanced", 1.0)),
        *((loss, "balanced") for loss in ("prefix-kl", "h-kl", "gold", "uld", "ce")),
    ],
)
def test_the_gradient_does_not_depend_on_how_a_batch_is_cut(
    materials: PreparedData, cache: Path, loss: str, kd_weight: float | str
) -> None:
    config = replace(CONFIG, loss=loss, kd_weight=kd_weight)  # type: ignore[arg-type]
    whole = gradient_of_a_step(materials, config, cache)
    assert any(float(gradient.abs().max()) > 0 for gradient in whole.values())
    for batch_size in (3, 2, 1):
        cut = replace(config, batch_size=batch_size, accumulation=6 // batch_size)
        assert_same_gradient(whole, gradient_of_a_step(materials, cut, cache))


def test_the_gradient_depends_on_the_loss(materials: PreparedData, cache: Path) -> None:
    with_teacher = gradient_of_a_step(materials, CONFIG, cache)
    without = gradient_of_a_step(materials, replace(CONFIG, loss="ce"), cache)
    name = "model.embed_tokens.weight"
    assert not torch.allclose(with_teacher[name], without[name], rtol=1e-2)


def test_the_side_of_the_padding_changes_nothing(materials: PreparedData, cache: Path) -> None:
    right = gradient_of_a_step(materials, CONFIG, cache)
    left = gradient_of_a_step(materials, CONFIG, cache, padding_side="left")
    assert_same_gradient(right, left)


def test_a_live_teacher_gives_what_a_store_of_all_columns_gives(
    materials: PreparedData, cache: Path
) -> None:
    live = replace(CONFIG, top_k=None, teacher_top_k=None)
    stored = replace(CONFIG, top_k=None, teacher_top_k=len(materials.pair.teacher_vocab))
    assert_same_gradient(
        gradient_of_a_step(materials, live, cache),
        gradient_of_a_step(materials, stored, cache),
    )


def test_no_held_out_text_is_trained_on(materials: PreparedData) -> None:
    train_ids = {example.student_ids.tobytes() for example in materials.train.examples}
    held_ids = {example.student_ids.tobytes() for example in materials.held_out.examples}
    assert train_ids
    assert held_ids
    assert not train_ids & held_ids


class Uniform(nn.Module):
    """A model that knows nothing: all logits are 0."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = nn.Parameter(torch.zeros(columns))

    def forward(self, input_ids: torch.Tensor, **_: object) -> object:
        class Output:
            logits = self.columns.expand(*input_ids.shape, -1)

        return Output


@pytest.mark.parametrize("excess", [0, 5])
def test_a_uniform_model_has_the_known_score(materials: PreparedData, excess: int) -> None:
    vocab = materials.pair.student_vocab
    evaluator = HeldOutEvaluator(materials.held_out.examples, vocab)
    # A padded lm_head changes nothing.
    score = evaluator.score(Uniform(len(vocab) + excess))
    tokens = sum(len(example.student_ids) - 1 for example in materials.held_out.examples)
    text = b"".join(
        vocab.token_bytes(int(token))
        for example in materials.held_out.examples
        for token in example.student_ids[1:]
    )
    assert (score.tokens, score.bytes) == (tokens, len(text))
    assert score.bits_per_byte == pytest.approx(tokens * math.log2(len(vocab)) / len(text))
    assert score.numeral_positions > 50
    numerals = [f"{n:0{width}}".encode() for width in (2, 3) for n in range(10**width)]
    known = {vocab.token_bytes(token) for token in range(len(vocab))} & set(numerals)
    assert len(known) > 1000
    assert score.numeral_mass == pytest.approx(len(known) / len(vocab))
    assert score.digit_mass == pytest.approx(10 / len(vocab))
    assert score.numeral_nll == pytest.approx(math.log(len(vocab)))


def test_a_narrow_head_is_scored_on_what_it_can_say(materials: PreparedData) -> None:
    vocab, examples = materials.pair.student_vocab, materials.held_out.examples
    evaluator = HeldOutEvaluator(examples, vocab)
    columns = max(int(example.student_ids.max()) for example in examples) + 1
    assert any(vocab.token_bytes(i).strip().isdigit() for i in range(columns, len(vocab)))
    score = evaluator.score(Uniform(columns))
    assert score.numeral_nll == pytest.approx(math.log(columns))
    with pytest.raises(TokenIdError, match=f"head has {columns - 1} columns; call model.resize"):
        evaluator.score(Uniform(columns - 1))


def test_the_default_device_of_the_caller_does_not_change_the_score(
    materials: PreparedData,
) -> None:
    vocab, examples = materials.pair.student_vocab, materials.held_out.examples
    model = Uniform(len(vocab))
    expected = HeldOutEvaluator(examples, vocab).score(model)
    with torch.device("meta"):
        assert HeldOutEvaluator(examples, vocab).score(model) == expected


def test_bits_per_byte_are_those_of_a_plain_loop(materials: PreparedData) -> None:
    pair, models = materials.pair, materials.models
    model = models.load_student().double().eval()
    nats, count = 0.0, 0
    by_class: dict[str, list[float]] = {}
    for example in materials.held_out.examples:
        ids = torch.from_numpy(example.student_ids)[None]
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        for position in range(1, ids.shape[1]):
            token = int(ids[0, position])
            text = pair.student_vocab.token_bytes(token)
            bits = -float(log_probs[position - 1, token]) / math.log(2)
            nats += bits * math.log(2)
            count += len(text)
            of_class = by_class.setdefault(class_of(text), [0.0, 0])
            of_class[0] += bits
            of_class[1] += len(text)
    assert {"Latin letters", "ASCII punctuation", "three-digit numerals"} <= set(by_class)
    expected = nats / math.log(2) / count
    for batch_size in (1, 4, 100):
        evaluator = HeldOutEvaluator(
            materials.held_out.examples, pair.student_vocab, batch_size=batch_size
        )
        score = evaluator.score(models.load_student().train())
        assert score.bits_per_byte == pytest.approx(expected, rel=1e-5)
        assert evaluator.class_bytes == {name: size for name, (_, size) in by_class.items()}
        assert score.class_bits_per_byte == pytest.approx(
            {name: bits / size for name, (bits, size) in by_class.items()}, rel=1e-5
        )
        logged = score.metrics("eval_")
        bits, size = by_class["Latin letters"]
        assert logged["eval_bits_per_byte/Latin letters"] == pytest.approx(bits / size, rel=1e-5)
        assert HeldOutScore.from_metrics({**logged, "step": 1}, "eval_") == score


def test_evaluation_restores_the_mode_of_the_model(materials: PreparedData) -> None:
    model = materials.models.load_student().train()
    HeldOutEvaluator(materials.held_out.examples, materials.pair.student_vocab).score(model)
    assert model.training


def test_text_without_numerals_has_no_numeral_scores(models: ModelPair) -> None:
    texts = split_held_out([f"no figure here, only {word}" for word in ("oak", "elm", "fir")], 0.5)
    materials = prepare(models, texts, CONFIG)
    evaluator = HeldOutEvaluator(materials.held_out.examples, models.pair.student_vocab)
    score = evaluator.score(models.load_student())
    assert score.numeral_positions == 0
    assert math.isnan(score.numeral_mass)
    assert math.isnan(score.numeral_nll)
    text = json_text({"after": asdict(score)})
    assert "NaN" not in text
    assert repr(HeldOutScore.from_json(json.loads(text)["after"])) == repr(score)


def test_a_trained_student_is_better_and_scores_the_same_after_reloading(
    materials: PreparedData, cache: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, steps=15, batch_size=4, learning_rate=1e-2, eval_every=5, curves=True)
    teacher = open_teachers(materials, config, [config.loss], cache)[config.loss]
    result = train(materials, config, teacher, tmp_path / "run")
    assert result.after.bits_per_byte < result.before.bits_per_byte - 0.2

    folder = tmp_path / "run" / "student"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    evaluator = HeldOutEvaluator(materials.held_out.examples, Vocab.from_tokenizer(tokenizer))
    assert evaluator.score(model) == result.after

    assert DistillConfig.load(tmp_path / "run" / "config.json") == config
    projection = Projection.load(tmp_path / "run" / "projection.safetensors")
    assert np.array_equal(projection.weights, materials.projection.weights)
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    records = read_history(tmp_path / "run" / "metrics.jsonl")
    assert records == result.records
    assert [r["step"] for r in records if "ce" in r] == list(range(1, 16))
    assert [r["step"] for r in records if "eval_bits_per_byte" in r] == [0, 5, 10, 15]


def test_a_run_takes_the_loss_of_the_audit_and_keeps_the_projection_that_it_learned(
    materials: PreparedData, cache: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, loss="auto", steps=2)
    teacher = open_teachers(materials, config, [config.loss], cache)[config.loss]
    assert train(materials, config, teacher, tmp_path / "auto").steps == 2
    config = replace(CONFIG, loss="p-kl", steps=3, learnable_projection=True)
    train(materials, config, teacher, tmp_path / "learned")
    saved = Projection.load(tmp_path / "learned" / "projection.safetensors")
    assert np.array_equal(saved.indices, materials.projection.indices)
    assert not np.array_equal(saved.weights, materials.projection.weights)


def test_exact_targets_are_made_once_and_no_step_makes_them_again(
    materials: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, loss="exact-kl", steps=2)
    teacher = open_teachers(materials, config, [config.loss], tmp_path / "cache")[config.loss]
    assert isinstance(teacher, TopKStore)

    def refuse(*_: object) -> None:
        raise AssertionError("a step makes targets")

    monkeypatch.setattr("xtoken.losses.exact_kl.loss.batch_targets", refuse)
    # Nor the weights of their depths, which the collator has made.
    of, ready = DepthWeights.of, []

    def watched(host: HostTargets, *given: object) -> DepthWeights | None:
        ready.append(any("depth weights" in key for key in host.made if isinstance(key, tuple)))
        return of(host, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(DepthWeights, "of", watched)
    first = train(materials, config, teacher, tmp_path / "first")
    files = list((teacher.directory / "targets").rglob("*.safetensors"))
    assert files
    times = [path.stat().st_mtime_ns for path in files]
    again = train(materials, config, teacher, tmp_path / "again")
    assert [path.stat().st_mtime_ns for path in files] == times
    assert first.after == again.after
    assert [record["kd"] > 0 for record in first.records if "kd" in record] == [True, True]
    assert ready
    assert all(ready)


def test_equal_seeds_give_equal_runs_and_other_seeds_others(
    materials: PreparedData, tmp_path: Path
) -> None:
    config = replace(CONFIG, steps=3, loss="ce")
    runs = [
        train(materials, replace(config, seed=seed), None, tmp_path / str(index)).after
        for index, seed in enumerate((0, 0, 1))
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize("loss", ["p-kl", "prefix-kl"])
def test_the_tail_counts_where_columns_are_left_out_of_the_loss(
    materials: PreparedData, loss: str
) -> None:
    batch = DistillCollator()(materials.train.examples[:2])
    generator = torch.Generator().manual_seed(0)
    student_size, teacher_size = materials.projection.shape
    student = torch.randn(*batch.student_ids.shape, student_size, generator=generator)
    teacher = torch.randn(*batch.teacher_ids.shape, teacher_size, generator=generator)

    def kd(**changed: object) -> float:
        config = replace(CONFIG, loss=loss, teacher_top_k=None, **changed)
        output = config.distiller(materials.pair)(student, teacher, batch, totals=Counts(1, 1))
        return float(output.kd)

    assert kd(top_k=8) != pytest.approx(kd(top_k=8, tail_bucket=False), rel=0.1)
    for top_k in (None, teacher_size):
        assert kd(top_k=top_k) == kd(top_k=top_k, tail_bucket=False)


def test_a_loss_with_a_teacher_needs_one(materials: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="loss = 'prefix-kl' needs a teacher"):
        train(materials, CONFIG, None, tmp_path)
    with pytest.raises(ArgumentTypeError, match=r"pair is a NoneType; pass xtoken\.Pair"):
        CONFIG.distiller(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 held-out examples"):
        HeldOutEvaluator([], materials.pair.student_vocab)


def test_predictions_of_another_tokenizer_lie_in_another_folder(tmp_path: Path) -> None:
    keys = [StoreKey("weights", 64, "float32", tokenizer) for tokenizer in ("one", "another")]
    assert len({store_folder(tmp_path, key) for key in keys}) == 2
