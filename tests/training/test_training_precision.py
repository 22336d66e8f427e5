"""bfloat16: of the student's forward pass, and of the teacher's weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_texts, write_pair
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from xtoken.data import split_held_out
from xtoken.training import (
    DistillConfig,
    DistillTrainer,
    HeldOutEvaluator,
    PreparedData,
    load_models,
    open_teachers,
    prepare,
    train,
)
from xtoken.training.config_arguments import training_arguments
from xtoken.training.metrics_log import History, KeepHistory

CONFIG = DistillConfig(
    steps=3,
    batch_size=4,
    top_k=64,
    teacher_top_k=64,
    max_tokens=96,
    learning_rate=3e-3,
    device="cpu",
    curves=False,
)


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    pair = load_models(*write_pair(tmp_path_factory.mktemp("pair")))
    return prepare(pair, split_held_out(tiny_texts(60), 0.2), CONFIG)


class Watch(TrainerCallback):
    """Keeps the dtypes of the logits, and of the gradients that the optimizer is about to use."""

    def __init__(self, model: nn.Module) -> None:
        self.logits: set[torch.dtype] = set()
        self.gradients: set[torch.dtype] = set()
        model.register_forward_hook(lambda _, __, output: self.logits.add(output.logits.dtype))

    def on_pre_optimizer_step(self, args, state, control, model: nn.Module, **_) -> None:
        self.gradients |= {parameter.grad.dtype for parameter in model.parameters()}


def run(materials: PreparedData, config: DistillConfig, folder: Path) -> tuple[History, Watch]:
    student = materials.models.load_student()
    history, watch = History(), Watch(student)
    teacher = open_teachers(materials, config, [config.loss], folder)[config.loss]
    trainer = DistillTrainer(
        student,
        training_arguments(config, folder),
        teachers=[] if teacher is None else [teacher],
        train_dataset=materials.train,
        processing_class=materials.pair,
        callbacks=[watch, KeepHistory(history)],
    )
    trainer.train()
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    return history, watch


@pytest.mark.parametrize("loss", ["prefix-kl", "p-kl", "h-kl", "gold", "uld", "ce"])
def test_a_bf16_run_stays_near_the_float32_run_with_gradients_in_float32(
    materials: PreparedData, tmp_path: Path, loss: str
) -> None:
    config = replace(CONFIG, loss=loss)
    plain, seen = run(materials, config, tmp_path)
    assert seen.logits == {torch.float32}
    mixed, seen = run(materials, replace(config, mixed_precision="bf16"), tmp_path)
    assert seen.logits == {torch.bfloat16}
    assert seen.gradients == {torch.float32}
    for expected, record in zip(plain.records, mixed.records, strict=True):
        for name in expected.keys() & {"ce", "kd", "total"}:
            # bfloat16 has 8 bits: 1/256 of a logit, and the weights drift with the steps.
            assert record[name] == pytest.approx(expected[name], rel=0.02)
    assert mixed.records != plain.records


def test_several_micro_batches_under_bf16_agree_with_one(
    materials: PreparedData, tmp_path: Path
) -> None:
    config = replace(CONFIG, mixed_precision="bf16", steps=1)
    whole, _ = run(materials, config, tmp_path)
    cut, _ = run(materials, replace(config, batch_size=1, accumulation=4), tmp_path)
    for name in ("ce", "kd", "kd_scale", "grad_norm"):
        assert cut.records[0][name] == pytest.approx(whole.records[0][name], rel=0.02)


def test_the_scores_of_a_bf16_run_are_those_of_the_saved_student_in_float32(
    materials: PreparedData, tmp_path: Path
) -> None:
    config = replace(CONFIG, mixed_precision="bf16", loss="ce")
    result = train(materials, config, None, tmp_path)
    evaluator = HeldOutEvaluator(materials.held_out.examples, materials.pair.student_vocab)
    assert evaluator.score(materials.models.load_student()) == result.before
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype="auto")
    assert student.dtype == torch.float32
    assert evaluator.score(student) == result.after


@pytest.mark.parametrize("teacher_top_k", [64, None])
def test_a_teacher_in_bfloat16_takes_half_the_memory_and_teaches_nearly_the_same(
    materials: PreparedData, tmp_path: Path, teacher_top_k: int | None
) -> None:
    config = replace(CONFIG, teacher_top_k=teacher_top_k)
    plain, _ = run(materials, config, tmp_path)
    half, _ = run(materials, replace(config, teacher_dtype="bfloat16"), tmp_path)
    for expected, record in zip(plain.records, half.records, strict=True):
        assert record["kd"] == pytest.approx(expected["kd"], rel=0.02)
    assert half.records != plain.records
    # Predictions of one dtype never stand in for those of another.
    assert len(list(tmp_path.glob("*-top64"))) == (2 if teacher_top_k else 0)


def test_the_teacher_is_loaded_in_the_dtype_that_is_asked_for(
    materials: PreparedData, tmp_path: Path
) -> None:
    cpu = torch.device("cpu")
    models = materials.models
    half = models.load_teacher(cpu, "bfloat16")
    assert next(half.model.parameters()).dtype == torch.bfloat16
    assert half.fingerprint != models.load_teacher(cpu).fingerprint
    half.model.save_pretrained(tmp_path)
    models.pair.teacher_tokenizer.save_pretrained(tmp_path)
    saved = replace(models, teacher_source=str(tmp_path))
    assert saved.load_teacher(cpu, "auto").fingerprint == half.fingerprint
    assert next(saved.load_teacher(cpu).model.parameters()).dtype == torch.float32
