"""What a run is said to take is what it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_texts, write_pair

from xtoken.data import split_held_out
from xtoken.training import DistillConfig, DistillTrainer, load_models, prepare
from xtoken.training.dry_run import MEASURED_STEPS, DryRun, dry_run
from xtoken.training.prepare import PreparedData, open_teachers
from xtoken.training.run import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dry-run")
    write_pair(path)
    return path


def prepared(folder: Path, config: DistillConfig) -> PreparedData:
    models = load_models(folder / "student", folder / "teacher")
    return prepare(models, split_held_out(tiny_texts(40), 0.2), config)


def test_the_memory_is_that_of_the_tensors_of_a_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DistillConfig(steps=6, top_k=32, teacher_top_k=32, max_tokens=90, device="cpu")
    materials = prepared(folder, config)
    found = dry_run(materials, config)
    measured: dict[str, int] = {}
    inner = DistillTrainer.training_step

    def step(trainer: DistillTrainer, model: torch.nn.Module, *rest: object) -> torch.Tensor:
        def largest(module: object, inputs: object, output: object) -> None:
            size = output.logits.numel() * output.logits.element_size()
            measured["logits"] = max(measured.get("logits", 0), size)

        handle = model.register_forward_hook(largest)
        loss = inner(trainer, model, *rest)
        handle.remove()
        grads = [each.grad for each in model.parameters() if each.grad is not None]
        measured["gradients"] = sum(each.numel() * each.element_size() for each in grads)
        measured["weights"] = sum(each.numel() * each.element_size() for each in model.parameters())
        states = trainer.optimizer.optimizer.state.values()
        measured["optimizer"] = sum(
            value.numel() * value.element_size()
            for state in states
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )
        return loss

    monkeypatch.setattr(DistillTrainer, "training_step", step)
    sources = open_teachers(materials, config, [config.loss], tmp_path / "cache")
    train(materials, config, sources[config.loss], tmp_path / "run")
    assert found.weights == measured["weights"]
    assert found.gradients == measured["gradients"]
    assert found.optimizer == measured["optimizer"]
    # That of the longest examples together, which no batch need have drawn.
    assert 0.5 * found.logits < measured["logits"] <= found.logits
    files = (tmp_path / "cache").rglob("*.safetensors")
    assert found.store == pytest.approx(sum(path.stat().st_size for path in files), rel=0.15)
    again = dry_run(materials, config, tmp_path / "cache")
    assert (again.store, again.store_seconds) == (0, 0.0)  # it is there


def test_a_dry_run_takes_a_few_steps_and_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    steps: list[int] = []
    inner = DistillTrainer.training_step

    def step(trainer: DistillTrainer, *rest: object) -> torch.Tensor:
        steps.append(trainer.state.max_steps)
        return inner(trainer, *rest)

    monkeypatch.setattr(DistillTrainer, "training_step", step)
    config = DistillConfig(steps=1000, eval_every=100, teacher_top_k=None, top_k=32, device="cpu")
    found = dry_run(prepared(folder, config), config)
    assert steps == [MEASURED_STEPS] * MEASURED_STEPS
    assert not list(tmp_path.iterdir())
    assert (found.store, found.store_seconds) == (0, 0.0)
    assert found.teacher_weights > 0  # it runs beside the student
    assert found.seconds >= 1000 * found.seconds_per_step > 0
    assert isinstance(found, DryRun)
