"""What a run is said to take is what it takes."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_texts, write_pair
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations.integration_utils import TensorBoardCallback

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


def prepared(folder: Path, config: DistillConfig, texts: int = 40) -> PreparedData:
    models = load_models(folder / "student", folder / "teacher")
    return prepare(models, split_held_out(tiny_texts(texts), 0.2), config)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made under it, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._most = 0  # bytes that live, or more: only beyond the peak is it worth a look
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, given: Any = (), named: Any = None
    ) -> Any:
        made = function(*given, **(named or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                self._held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self._most += storage.nbytes()
        if self._most > self.peak:
            self._most = self.now
            self.peak = max(self.peak, self._most)
        return made

    @property
    def now(self) -> int:
        self._held = {key: it for key, it in self._held.items() if not it[0].expired()}
        return sum(size for _, size in self._held.values())


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


# Of the losses' working memory on a CPU: some blocks of float32 numbers; see `block_rows`.
BLOCKS = 4 * 2**20 * 4


@pytest.mark.parametrize("teacher_top_k", [None, 32])
def test_the_sum_is_what_lives_at_once_beside_activations_and_a_few_blocks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher_top_k: int | None
) -> None:
    config = DistillConfig(
        steps=2, batch_size=48, top_k=32, teacher_top_k=teacher_top_k, max_tokens=90, device="cpu",
        trainer={"block_size": 64},
    )  # fmt: skip
    materials = prepared(folder, config, texts=60)
    found = dry_run(materials, config)
    measured: list[int] = []
    inner = DistillTrainer.training_step

    def step(trainer: DistillTrainer, model: torch.nn.Module, *rest: Any) -> torch.Tensor:
        student = {name: rest[0][name] for name in ("input_ids", "attention_mask")}
        with LiveBytes() as forward:
            logits = model(**student, use_cache=False).logits
            activations = forward.now - logits.numel() * logits.element_size()
        del logits
        with LiveBytes() as live:
            loss = inner(trainer, model, *rest)
        measured.append(live.peak - activations)
        return loss

    monkeypatch.setattr(DistillTrainer, "training_step", step)
    sources = open_teachers(materials, config, [config.loss], tmp_path / "cache")
    train(materials, config, sources[config.loss], tmp_path / "run")
    parts = dataclasses.asdict(found)
    names = ("weights", "gradients", "optimizer", "logits", "logits_gradient", "teacher_weights")
    assert found.memory == sum(parts[name] for name in (*names, "teacher_signal"))
    # The first batch has the longest rows. Gradients come when those of the logits go.
    held = found.weights + found.optimizer + found.teacher_weights
    total = held + max(measured)
    assert 0.95 * (found.memory - found.gradients) < total < found.memory + BLOCKS
    assert found.memory > 3 * BLOCKS


def test_a_teacher_that_only_fills_a_store_is_not_held_beside_the_student(folder: Path) -> None:
    config = DistillConfig(steps=2, top_k=32, teacher_top_k=32, max_tokens=90, device="cpu")
    found = dry_run(prepared(folder, config), config)
    assert found.teacher_weights == 0
    assert found.filling_weights == sum(
        each.numel() * each.element_size()
        for each in load_models(folder / "student", folder / "teacher")
        .load_teacher(torch.device("cpu"))
        .model.parameters()
    )
    large = dataclasses.replace(found, filling_weights=10**12)
    assert large.memory == 10**12
    assert found.memory > found.filling_weights


def test_the_time_is_that_of_a_run_within_a_factor_of_three(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the time of the processor, as the machine may be busy."""
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    config = DistillConfig(
        steps=40, eval_every=20, top_k=32, teacher_top_k=32, max_tokens=90, device="cpu"
    )
    materials = prepared(folder, config)
    found = dry_run(materials, config)
    began = time.process_time()
    sources = open_teachers(materials, config, [config.loss], tmp_path / "cache")
    opened = time.process_time() - began
    result = train(materials, config, sources[config.loss], tmp_path / "run")
    assert found.seconds / 3 < opened + result.seconds < 3 * found.seconds


def test_a_dry_run_takes_a_few_steps_and_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    steps: list[int] = []
    inner = DistillTrainer.training_step

    def step(trainer: DistillTrainer, *rest: object) -> torch.Tensor:
        steps.append(trainer.state.max_steps)
        told = [type(each) for each in trainer.callback_handler.callbacks]
        assert TensorBoardCallback not in told
        return inner(trainer, *rest)

    monkeypatch.setattr(DistillTrainer, "training_step", step)
    config = DistillConfig(
        steps=1000, eval_every=100, teacher_top_k=None, top_k=32, device="cpu",
        trainer={"report_to": "tensorboard", "push_to_hub": True},
    )  # fmt: skip
    found = dry_run(prepared(folder, config), config)
    assert steps == [MEASURED_STEPS] * MEASURED_STEPS
    assert not list(tmp_path.iterdir())
    assert (found.store, found.store_seconds) == (0, 0.0)
    assert found.teacher_weights > 0  # it runs beside the student
    assert found.seconds >= 1000 * found.seconds_per_step > 0
    assert isinstance(found, DryRun)
