"""What a run will take, before it begins: memory by part, and time from a few measured steps."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback

from xtoken.data import ExampleSet
from xtoken.teachers import LiveTeacher, TeacherSource, TopKStore
from xtoken.teachers.served import PrefetchedTeacher
from xtoken.teachers.store import is_store
from xtoken.training.config import DistillConfig
from xtoken.training.config_arguments import run_device, training_arguments
from xtoken.training.prepare import (
    PreparedData,
    closing_teachers,
    open_teachers,
    store_folder,
    taught_sequences,
)
from xtoken.training.run import taught_by
from xtoken.training.signals import FusedTeacher, is_fused
from xtoken.training.trainer import DistillTrainer

# The first step is slower than the others, and not counted.
MEASURED_STEPS = 4


@dataclass(frozen=True)
class DryRun:
    """What a run takes; sizes in bytes, on each process.

    Attributes:
        weights, gradients, optimizer: of the student; measured on its tensors after a step.
        logits: of the student, for its longest micro-batch; none are made where the head is fused,
            see `DistillSettings.fused`.
        logits_gradient: that the losses write, beside them.
        teacher_weights: of teachers that run beside the student.
        filling_weights: of the largest teacher that fills a store, before the student is there.
        teacher_signal: of the longest micro-batch: kept columns, or a live teacher's logits.
        store: on the disk, of the training texts that no earlier run has stored; 0 where
            predictions are not stored here.
        store_seconds: to compute it.
        seconds_per_step: the mean of the measured steps.
        steps: of the run.
        evaluation_seconds: of the evaluations, before, during and after.
        peak: of memory on the device in the measured steps; None on the CPU.
    """

    weights: int
    gradients: int
    optimizer: int
    logits: int
    logits_gradient: int
    teacher_weights: int
    filling_weights: int
    teacher_signal: int
    store: int
    store_seconds: float
    seconds_per_step: float
    steps: int
    evaluation_seconds: float
    peak: int | None

    @property
    def memory(self) -> int:
        """The most that is held at once; activations come on top."""
        training = (
            self.weights
            + self.gradients
            + self.optimizer
            + self.logits
            + self.logits_gradient
            + self.teacher_weights
            + self.teacher_signal
        )
        return max(training, self.filling_weights)

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.store_seconds + self.steps * self.seconds_per_step + self.evaluation_seconds


def dry_run(
    materials: PreparedData, config: DistillConfig, cache_dir: Path | None = None
) -> DryRun:
    """Take a few steps of a run on some of its examples, and write nothing that stays.

    Args:
        materials: from `prepare`.
        config: the settings.
        cache_dir: where the run keeps predictions: what is there already takes no time.

    Raises: as `train`.
    """
    part, longest = _some_examples(materials, config)
    steps = min(MEASURED_STEPS, config.steps)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        began = time.perf_counter()
        sources = [
            open_teachers(each, config, [config.loss], Path(scratch) / "teachers")[config.loss]
            for each in part.teachers
        ]
        stack.enter_context(closing_teachers(sources))
        opened = time.perf_counter() - began
        store, store_seconds, filling_weights = _stored(
            materials, part, config, sources, opened, cache_dir
        )
        # Nothing leaves this machine either.
        local = {**config.trainer, "report_to": "none", "push_to_hub": False}
        short = replace(config, steps=steps, eval_every=0, checkpoint_every=0, trainer=local)
        student = materials.models.load_student()
        clock = _StepClock()
        trainer = DistillTrainer(
            student,
            training_arguments(short, Path(scratch) / "run"),
            teachers=taught_by(part, config, sources),
            train_dataset=part.rows("train"),
            eval_dataset=part.rows("held_out"),
            processing_class=part.pair,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        device = run_device(config)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        trainer.train()
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        began = time.perf_counter()
        trainer.evaluate()
        evaluation = time.perf_counter() - began
    logits = longest[0] * _columns(student) * 4
    fused = trainer._fused_head(cast(nn.Module, trainer.model)) is not None
    evaluations = 2 + (config.steps // config.eval_every if config.eval_every else 0)
    signal = sum(
        longest[1][at] * _signal_bytes(source, trainer.teaching.fused_teacher)
        for at, source in enumerate(sources)
    )
    return DryRun(
        weights=_bytes(student.parameters()),
        gradients=_bytes(each for each in student.parameters() if each.requires_grad),
        optimizer=_bytes(
            value
            for state in trainer.optimizer.state.values()  # type: ignore[union-attr]
            for value in state.values()
            if isinstance(value, Tensor)
        ),
        logits=0 if fused else logits,
        logits_gradient=0 if fused else logits,
        teacher_weights=sum(
            _bytes(source.model.parameters())
            for source in sources
            if isinstance(source, LiveTeacher)
        ),
        filling_weights=filling_weights,
        teacher_signal=signal,
        store=store,
        store_seconds=store_seconds,
        seconds_per_step=clock.mean,
        steps=config.steps,
        evaluation_seconds=evaluations * evaluation * len(materials.held_out) / len(part.held_out),
        peak=peak,
    )


class _StepClock(TrainerCallback):
    """Times the steps but the first, unless there is no other."""

    def __init__(self) -> None:
        self._began = 0.0
        self._seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read it, once the device has done its work."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds.append(time.perf_counter() - self._began)

    @property
    def mean(self) -> float:
        """Seconds per step."""
        counted = self._seconds[1:] or self._seconds
        return sum(counted) / len(counted)


def _some_examples(
    materials: PreparedData, config: DistillConfig
) -> tuple[PreparedData, tuple[int, list[int]]]:
    """Enough examples for the measured steps, of all lengths; and the padded tokens of the longest
    micro-batch, of the student and of each teacher."""
    count = min(MEASURED_STEPS * config.batch_size * config.accumulation, len(materials.train))
    lengths = [len(each.student_ids) for each in materials.train.examples]
    order = sorted(range(len(lengths)), key=lambda at: lengths[at])
    picked = [order[at * len(order) // count] for at in range(count)]
    held_out = min(len(materials.held_out), 2 * config.eval_batch_size)

    def some(each: PreparedData) -> PreparedData:
        train = ExampleSet([each.train.examples[at] for at in picked], cut=0)
        scored = ExampleSet(each.held_out.examples[:held_out], cut=0)
        return replace(each, train=train, held_out=scored, others=(), stream=None)

    rows = min(config.batch_size, len(lengths))
    most = [
        rows * max(len(example.teacher_ids) for example in each.train.examples)
        for each in materials.teachers
    ]
    part = replace(some(materials), others=tuple(map(some, materials.others)))
    return part, (rows * max(lengths), most)


def _stored(
    materials: PreparedData,
    part: PreparedData,
    config: DistillConfig,
    sources: Sequence[TeacherSource | None],
    seconds: float,
    cache_dir: Path | None,
) -> tuple[int, float, int]:
    """Size and time of what the stores lack, and the weights of the largest teacher that fills
    one."""
    size, weights, share = 0, 0, 0.0
    for source, whole, some in zip(sources, materials.teachers, part.teachers, strict=True):
        if isinstance(source, TopKStore) and whole.models.store is None:
            files = source.directory.glob("*.safetensors")
            own = sum(map(len, taught_sequences(some)))
            lacking = sum(map(len, _lacking(whole, source, cache_dir)))
            size += int(sum(path.stat().st_size for path in files) / own * lacking)
            share = max(share, lacking / own)
            weights = max(weights, _weight_bytes(whole.models.teacher_source, config))
    return size, seconds * share, weights


def _lacking(
    materials: PreparedData, source: TopKStore, cache_dir: Path | None
) -> list[NDArray[np.int64]]:
    """What is not among the predictions that earlier runs have kept."""
    sequences = taught_sequences(materials)
    folder = None if cache_dir is None else store_folder(cache_dir, source.key)
    if folder is None or not is_store(folder):
        return sequences
    kept = TopKStore(folder, source.key, required=False)
    return [ids for ids in sequences if ids not in kept]


def _weight_bytes(source: str, config: DistillConfig) -> int:
    """Of a teacher that is not loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    described = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        # Through Any: transformers declares the method without types.
        model: nn.Module = cast(Any, AutoModelForCausalLM).from_config(described)
    dtype = getattr(torch, config.teacher_dtype, None) or described.dtype or torch.float32
    return sum(each.numel() for each in model.parameters()) * dtype.itemsize


def _signal_bytes(source: TeacherSource | None, fused: FusedTeacher) -> int:
    """Bytes per token: ids of 8 and log-probabilities of 4, or logits or, where these are never
    whole, hidden states in the teacher's dtype."""
    if isinstance(source, TopKStore):
        if source.key.is_spread:  # 28 for where a row lies
            return round(source.columns_per_token * 8) + 28
        return source.key.top_k * 12
    if isinstance(source, PrefetchedTeacher):
        return source.source.width * 12
    if isinstance(source, LiveTeacher):
        head: Any = source.model.get_output_embeddings()  # type: ignore[operator]
        rows, features = head.weight.shape
        kept = features if is_fused(source, fused) else rows
        return int(kept) * next(source.model.parameters()).element_size()
    return 0


def _columns(model: nn.Module) -> int:
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return int(head.weight.shape[0])


def _bytes(tensors: Any) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)
