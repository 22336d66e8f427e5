"""What a Trainer with teachers logs: the parts of its loss as means over steps and processes."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import TensorBoardCallback, default_logdir

from xtoken.distillation import Counts, DistillOutput
from xtoken.errors import NonFiniteError
from xtoken.training.teaching import AnyBatch, Teaching

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class BeginLog(TrainerCallback):
    """Lets no sum of an earlier or an abandoned training go into the first log of the next."""

    def __init__(self, trainer: LogsParts) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Begin anew."""
        self._trainer._begin_window()


class LogsParts(_Base):
    """The part of `DistillMixin` that adds up what micro-batches say until the next log."""

    teaching: Teaching

    def _begin_log(self) -> None:
        self._begin_window()
        # Of this process since training began, of streams alone: else it is said beforehand.
        self.rows_left_out = 0
        # The same, of rows that another Trainer made.
        self.rows_not_distilled = 0

    def _begin_window(self) -> None:
        # Sums over the optimizer steps since the last log, and how many steps they are.
        self._step_metrics: dict[str, float] = {}
        self._steps_in_window = 0
        self._kd_scales: list[float] = []

    def _place_tensorboard(self) -> None:
        """Have TensorBoard's files below `output_dir`: its callback learns of that once training
        begins, and would write an evaluation before, and all behind it, into the working directory.
        """
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = os.path.join(self.args.output_dir or ".", default_logdir())

    def _record(self, output: DistillOutput, batch: AnyBatch, totals: Sequence[Counts]) -> None:
        # Each divided by the totals of the step, so that micro-batches and processes add up.
        total = float(output.loss.detach())
        if not math.isfinite(total):
            raise NonFiniteError(
                f"the loss of step {self.state.global_step + 1} is {total}: the student "
                f"diverged; {self._when_diverged()}"
            )
        metrics: dict[str, float] = {}
        if output.ce is not None:
            metrics["ce"] = float(output.ce.detach())
        if output.kd is not None:
            metrics["kd"] = float(output.kd.detach())
            metrics |= self.teaching.metrics(output, batch, totals)
        for name, value in metrics.items():
            self._step_metrics[name] = self._step_metrics.get(name, 0.0) + value
        self._kd_scales.append(float(output.kd_scale))

    def _window(self) -> dict[str, float]:
        """The metrics of the steps since the last log: means over them, over all processes."""
        names = list(self._step_metrics)
        found = [self._step_metrics[name] for name in names]
        counts = {
            "rows_left_out": self.rows_left_out,
            "rows_not_distilled": self.rows_not_distilled,
        }
        values = torch.tensor([*found, *counts.values()], dtype=torch.float64, device="cpu")
        steps = max(self._steps_in_window, 1)
        # The shares of micro-batches and processes add up to a step; chunks are counted, and so is
        # their mean per step.
        sums = dict(zip([*names, *counts], self._over_processes(values), strict=True))
        counted = {name: count for name in counts if (count := sums.pop(name))}
        exact, aligned = (sums.pop(name, 0.0) for name in ("_exact_tokens", "_aligned_tokens"))
        means = {name: value / steps for name, value in sums.items()}
        if aligned:
            means["coverage"] = exact / aligned
        means |= counted
        scales = self._kd_scales or [0.0]  # the same in every process
        self._step_metrics, self._steps_in_window, self._kd_scales = {}, 0, []
        return means | {"kd_scale": sum(scales) / len(scales)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the parts of the loss, as means over the window.

        Raises:
            NonFiniteError: the norm of the gradient is NaN or infinite: the weights are lost.
        """
        if "loss" in logs and self._step_metrics:
            logs |= self._window()
        super().log(logs, start_time)
        norm = logs.get("grad_norm")
        # A scaler of float16 gradients leaves such a step out, and halves what it multiplies them
        # with; below 1 they are not finite by themselves.
        scaler = getattr(self.accelerator, "scaler", None)
        skipped = scaler is not None and scaler.get_scale() >= 1
        if norm is not None and not math.isfinite(norm) and not skipped:
            raise NonFiniteError(
                f"the gradient of step {self.state.global_step} has norm {norm}: the student "
                f"diverged; {self._when_diverged()}"
            )

    def _when_diverged(self) -> str:
        # A checkpoint has the rate in its optimizer and its schedule.
        return (
            f"begin anew with a learning_rate below {self.args.learning_rate}, more warmup_steps "
            "or a lower max_grad_norm: a run that is resumed keeps its own"
        )

    def _over_processes(self, values: Tensor) -> list[float]:
        if self.accelerator.num_processes == 1:
            return [float(value) for value in values.flatten()]
        # float32 on devices that have no float64; counts stay exact up to 2^24 per process.
        local = values.flatten().to(self.args.device, torch.float32)
        gathered: Tensor = self.accelerator.gather(local[None])
        return [float(value) for value in gathered.double().sum(0)]
