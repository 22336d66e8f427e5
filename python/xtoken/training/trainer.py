"""`transformers.Trainer` with a distillation loss whose gradient ignores how a batch is cut."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from xtoken.data.examples import ExampleSet
from xtoken.distillation import Counts, Distiller, DistillOutput
from xtoken.distillation.batch import Batch
from xtoken.distillation.collate import DistillCollator
from xtoken.errors import NonFiniteError, OptionError
from xtoken.teachers import TeacherSource
from xtoken.teachers.forward import causal_logits
from xtoken.training.arguments import FollowArguments, teacher_needed, training_arguments
from xtoken.training.config import DistillConfig
from xtoken.training.evaluate import HeldOutEvaluator
from xtoken.training.metrics_log import History


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
        distiller: the losses of a batch; `config.distiller(pair)`.
        teacher: a `LiveTeacher` or a filled `TopKStore`; None where the loss needs none.
        train_examples: what to train on.
        collator: pads them; the distiller's own if None.
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
        distiller: Distiller,
        teacher: TeacherSource | None,
        train_examples: ExampleSet,
        collator: DistillCollator | None = None,
        output_dir: Path | str,
        args: TrainingArguments | None = None,
        evaluator: HeldOutEvaluator | None = None,
        history: History | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        if teacher is None and distiller.needs_teacher:
            raise teacher_needed(config)
        args = args or training_arguments(config, output_dir)
        if args.n_gpu > 1:
            raise OptionError(
                f"one process sees {args.n_gpu} GPUs, and DataParallel cannot split chunks; "
                "start one process a GPU with torchrun, or set CUDA_VISIBLE_DEVICES"
            )
        self.distill_config: DistillConfig = config
        self.distiller: Distiller = distiller.to(args.device)
        self.teacher = teacher
        self.evaluator = evaluator
        self.history = history
        self.on_step = on_step
        # Sums over the optimizer steps since the last log, and how many steps they are.
        self._step_metrics: dict[str, float] = {}
        self._steps_in_window = 0
        # Weight of the distillation loss in this step; None while it is still to be found, from
        # the micro-batches below or, where there are none, from the one that is the whole step.
        self._kd_scale: float | None = None
        self._to_balance: list[Any] = []
        self._kd_scales: list[float] = []
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_examples,
            eval_dataset=evaluator.examples if evaluator is not None else None,
            data_collator=cast(Any, collator or distiller.collator),
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
        self._steps_in_window += 1
        counts = sum((self.distiller.counts(batch) for batch in batches), Counts(0, 0))
        tokens, chunks = self._over_processes(
            torch.tensor([counts.tokens, counts.chunks], dtype=torch.float64)
        )
        self._kd_scale = self._fixed_scale()
        whole = len(batches) == 1 and self.accelerator.num_processes == 1
        balanced = self._kd_scale is None and self.distiller.needs_teacher
        # Found in the first micro-batch and not here: a resumed run restores its random numbers,
        # which dropout draws, only after this.
        self._to_balance = batches if balanced and not whole else []
        return batches, Counts(tokens, chunks)

    def _fixed_scale(self) -> float | None:
        weight = self.distill_config.kd_weight
        return None if weight == "balanced" else float(weight)

    def _balance(self, batches: list[Any], totals: Counts) -> float:
        """Find CE / KD over the whole step by a pass without gradients, with the same dropout."""
        values = torch.zeros(2, dtype=torch.float64)
        device = self.args.device
        devices = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            for batch in batches:
                batch = self._prepare_inputs(batch)
                output = self._output(cast(nn.Module, self.model), batch, totals, 1.0)
                assert output.ce is not None
                assert output.kd is not None
                values += torch.tensor([float(output.ce), float(output.kd)], dtype=torch.float64)
        ce, kd = self._over_processes(values)
        return self.distiller.balance(ce, kd)

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

    def _prepare_inputs(self, inputs: Any) -> Any:
        if isinstance(inputs, Batch):
            return inputs.to(self.args.device, non_blocking=True)
        return super()._prepare_inputs(inputs)

    def floating_point_ops(self, inputs: Any) -> int:
        """The Trainer's estimate, from the student's side."""
        return super().floating_point_ops(inputs.student if isinstance(inputs, Batch) else inputs)

    def _output(
        self, model: nn.Module, batch: Batch, totals: Counts, kd_scale: float | None
    ) -> DistillOutput:
        with self._precision():
            logits = causal_logits(model, batch.student_ids, batch.student["attention_mask"])
        signal = None
        if self.teacher is not None and self.distiller.needs_teacher:
            signal = self.teacher.signal(batch.teacher_ids, batch.teacher["attention_mask"])
        output: DistillOutput = self.distiller(
            logits, signal, batch, totals=totals, kd_scale=kd_scale
        )
        return output

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the share of one micro-batch in the loss of its step.

        Args:
            inputs: a `Batch`.
            num_items_in_batch: the `Counts` of `get_batch_samples`; None counts this batch.
        """
        totals, kd_scale = num_items_in_batch, self._kd_scale
        if totals is None:
            totals, kd_scale = self.distiller.counts(inputs), self._fixed_scale()
        elif self._to_balance:
            batches, self._to_balance = self._to_balance, []
            kd_scale = self._kd_scale = self._balance(batches, totals)
        output = self._output(model, inputs, totals, kd_scale)
        self._record(output, totals)
        # Data parallel averages gradients over processes; the totals are already those of all.
        loss = output.loss * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def _record(self, output: DistillOutput, totals: Counts) -> None:
        # Each divided by the totals of the step, so that micro-batches and processes add up.
        metrics = {"total": float(output.loss.detach())}
        if output.ce is not None:
            metrics["ce"] = float(output.ce.detach())
        if output.kd is not None:
            metrics["kd"] = float(output.kd.detach())
            metrics["chunks"] = float(output.num_chunks)
            share = metrics["chunks"] / max(totals.chunks, 1.0)
            metrics |= {name: float(value) * share for name, value in output.metrics.items()}
        metrics.pop("kd_scale", None)
        if not math.isfinite(metrics["total"]):
            raise NonFiniteError(
                f"the loss of step {self.state.global_step + 1} is {metrics['total']}: the student "
                f"diverged; lower learning_rate ({self.args.learning_rate}), or raise warmup_steps "
                "or max_grad_norm's clipping"
            )
        for name, value in metrics.items():
            self._step_metrics[name] = self._step_metrics.get(name, 0.0) + value
        self._kd_scales.append(float(output.kd_scale))

    def _window(self) -> dict[str, float]:
        """The metrics of the steps since the last log: means over them, over all processes."""
        names = list(self._step_metrics)
        values = torch.tensor([self._step_metrics[name] for name in names], dtype=torch.float64)
        steps = max(self._steps_in_window, 1)
        # The shares of micro-batches and processes add up to a step; chunks are counted, and so is
        # their mean per step.
        sums = self._over_processes(values)
        means = {name: value / steps for name, value in zip(names, sums, strict=True)}
        scales = self._kd_scales or [0.0]  # the same in every process
        self._step_metrics, self._steps_in_window, self._kd_scales = {}, 0, []
        return means | {"kd_scale": sum(scales) / len(scales)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the parts of the loss, as means over the window; hand them to the history.

        Raises:
            NonFiniteError: the norm of the gradient is NaN or infinite: the weights are lost.
        """
        step = self.state.global_step
        window = self._window() if "loss" in logs and self._step_metrics else None
        if window is not None:
            logs |= {name: value for name, value in window.items() if name != "total"}
        super().log(logs, start_time)
        norm = logs.get("grad_norm")
        if norm is not None and not math.isfinite(norm):
            raise NonFiniteError(
                f"the gradient of step {step} has norm {norm}: the student diverged; lower "
                f"learning_rate ({self.args.learning_rate}); checkpoints before it are whole"
            )
        if window is not None:
            record = {"step": step, **window}
            record |= {name: logs[name] for name in ("learning_rate", "grad_norm") if name in logs}
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
