"""`transformers.Trainer` with a distillation loss whose gradient ignores how a batch is cut."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from xtoken.data.collate import DistillBatch, DistillCollator
from xtoken.data.examples import ExampleSet
from xtoken.errors import OptionError
from xtoken.teachers.forward import causal_logits
from xtoken.training.arguments import FollowArguments, teacher_needed, training_arguments
from xtoken.training.config import DistillConfig
from xtoken.training.evaluate import HeldOutEvaluator
from xtoken.training.metrics_log import History
from xtoken.training.step_loss import Objective, Parts, TeacherSource


@dataclass(frozen=True)
class StepTotals:
    """What one optimizer step divides by, over all its micro-batches and processes.

    Args:
        tokens: predicted tokens, the normalizer of the cross-entropy.
        chunks: usable chunks, the normalizer of the distillation loss.
    """

    tokens: float
    chunks: float


class DistillTrainer(Trainer):
    """Trains a student on cross-entropy and distillation.

    The loss of a step is a sum over all its tokens and chunks, divided by their number over all
    micro-batches and processes. So `batch_size`, `accumulation` and the number of processes change
    memory and speed, and the gradient only by rounding. The balance `sg(CE / KD)` is taken over
    the same whole: where a step has several micro-batches or processes, this costs one more forward
    pass of student and teacher; a fixed `kd_weight` does not.

    Args:
        model: the student, a causal language model.
        config: the settings.
        objective: the losses of a batch.
        teacher: a `LiveTeacher` or a filled `TopKStore`; None where the loss needs none.
        train_examples: what to train on.
        collator: pads them.
        output_dir: of the Trainer's own files; nothing is written there unless `args` asks for it.
        args: replaces the arguments that `training_arguments` would make from the settings.
        evaluator: scores the held-out part in `evaluate`.
        history: receives one record a step and one an evaluation.
        on_step: called with the number of steps done, after each.
    Raises: OptionError if the loss needs a teacher and there is none.
    """

    def __init__(
        self,
        model: nn.Module,
        config: DistillConfig,
        *,
        objective: Objective,
        teacher: TeacherSource | None,
        train_examples: ExampleSet,
        collator: DistillCollator,
        output_dir: Path | str,
        args: TrainingArguments | None = None,
        evaluator: HeldOutEvaluator | None = None,
        history: History | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        if teacher is None and objective.needs_teacher:
            raise teacher_needed(config)
        args = args or training_arguments(config, output_dir)
        if args.n_gpu > 1:
            raise OptionError(
                f"one process sees {args.n_gpu} GPUs, and DataParallel cannot split chunks; "
                "start one process a GPU with torchrun, or set CUDA_VISIBLE_DEVICES"
            )
        self.distill_config: DistillConfig = config
        self.objective: Objective = objective
        self.teacher = teacher
        self.evaluator = evaluator
        self.history = history
        self.on_step = on_step
        self._step_metrics: dict[str, float] = {}
        # Weight of the distillation loss in this step; None while it is still to be found, from
        # the micro-batches below or, where there are none, from the one that is the whole step.
        self._kd_scale: float | None = None
        self._to_balance: list[Any] = []
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_examples,
            eval_dataset=evaluator.examples if evaluator is not None else None,
            data_collator=cast(Any, collator),
        )
        # The loss below is already divided by the totals of the step. Older releases ask the first
        # attribute whether to divide by the number of micro-batches again, newer ones the second.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        # transformers 5.3 has accelerate divide as well. DeepSpeed's own division is turned off by
        # the Trainer.
        if not self.is_deepspeed_enabled:
            self.accelerator.gradient_accumulation_steps = 1
        self.remove_callback(PrinterCallback)
        self.add_callback(FollowArguments())

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Collect the micro-batches of one step and count what the step will divide by."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        counts = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            counts += torch.tensor(self.objective.counts(batch), dtype=torch.float64)
        tokens, chunks = self._over_processes(counts)
        self._kd_scale = self._fixed_scale()
        whole = len(batches) == 1 and self.accelerator.num_processes == 1
        balanced = self._kd_scale is None and self.objective.needs_teacher
        # Found in the first micro-batch and not here: a resumed run restores its random numbers,
        # which dropout draws, only after this.
        self._to_balance = batches if balanced and not whole else []
        return batches, StepTotals(tokens, chunks)

    def _fixed_scale(self) -> float | None:
        weight = self.distill_config.kd_weight
        return None if weight == "balanced" else float(weight)

    def _balance(self, batches: list[Any], totals: StepTotals) -> float:
        """Find CE / KD over the whole step by a pass without gradients, with the same dropout."""
        values = torch.zeros(2, dtype=torch.float64)
        device = self.args.device
        devices = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            for batch in batches:
                batch = cast(DistillBatch, self._prepare_inputs(batch))
                parts = self._parts(cast(nn.Module, self.model), batch, totals)
                metrics = parts.metrics()
                values += torch.tensor([metrics["ce"], metrics["kd"]], dtype=torch.float64)
        ce, kd = self._over_processes(values)
        return self.objective.balance(ce, kd)

    def _over_processes(self, values: Tensor) -> list[float]:
        if self.accelerator.num_processes == 1:
            return [float(value) for value in values]
        # float32 on devices that have no float64; counts stay exact up to 2^24 a process.
        local = values.to(self.args.device, torch.float32)
        gathered: Tensor = self.accelerator.gather(local[None])
        return [float(value) for value in gathered.double().sum(0)]

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        # Not through `args.bf16`: accelerate then copies the logits [B, T, V] to float32, which the
        # losses do by row blocks, and evaluates in bfloat16 once training has begun.
        if self.distill_config.mixed_precision == "bf16":
            return torch.autocast(self.args.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _parts(self, model: nn.Module, batch: DistillBatch, totals: StepTotals) -> Parts:
        with self._precision():
            logits = causal_logits(model, batch["student_ids"], batch["student_attention_mask"])
        signal = None
        if self.teacher is not None and self.objective.needs_teacher:
            signal = self.teacher.signal(batch["teacher_ids"], batch["teacher_attention_mask"])
        return self.objective(
            logits, signal, batch, token_total=totals.tokens, chunk_total=totals.chunks
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the share of one micro-batch in the loss of its step.

        Args:
            inputs: a `DistillBatch`.
            num_items_in_batch: the `StepTotals` of `get_batch_samples`; None counts this batch.
        """
        totals, kd_scale = num_items_in_batch, self._kd_scale
        if totals is None:
            totals, kd_scale = StepTotals(*self.objective.counts(inputs)), self._fixed_scale()
        elif self._to_balance:
            batches, self._to_balance = self._to_balance, []
            kd_scale = self._kd_scale = self._balance(batches, totals)
        parts = self._parts(model, inputs, totals)
        loss, kd_scale = self.objective.combine(parts, kd_scale)
        self._record(loss, parts, kd_scale)
        # Data parallel averages gradients over processes; the totals are already those of all.
        loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def _record(self, loss: Tensor, parts: Parts, kd_scale: float) -> None:
        metrics = {"total": float(loss.detach()), **parts.metrics()}
        for name, value in metrics.items():
            self._step_metrics[name] = self._step_metrics.get(name, 0.0) + value
        self._step_metrics["kd_scale"] = kd_scale

    def _whole_step(self) -> dict[str, float]:
        """Return the metrics of the step over all processes, whose shares add up."""
        scale = self._step_metrics.pop("kd_scale")  # the same everywhere
        names = list(self._step_metrics)
        values = torch.tensor([self._step_metrics[name] for name in names], dtype=torch.float64)
        whole = dict(zip(names, self._over_processes(values), strict=True))
        return whole | {"kd_scale": scale}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand what was logged to the history, with the parts of the loss."""
        super().log(logs, start_time)
        step = self.state.global_step
        if "loss" in logs:
            record = {"step": step, **self._whole_step()}
            record |= {name: logs[name] for name in ("learning_rate", "grad_norm") if name in logs}
            self._step_metrics = {}
            if self.history is not None:
                self.history.add(record)
            if self.on_step is not None:
                self.on_step(step)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Score the student on the held-out part.

        Returns: the scores of `HeldOutScore` by name, each with the prefix.
        Raises: OptionError if the trainer has no evaluator.
        """
        if self.evaluator is None:
            raise OptionError("no held-out examples to evaluate on; pass evaluator= to the trainer")
        metrics = self.evaluator.score(cast(nn.Module, self.model)).metrics(f"{metric_key_prefix}_")
        if self.history is not None:
            self.history.add({"step": self.state.global_step, **metrics})
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics
