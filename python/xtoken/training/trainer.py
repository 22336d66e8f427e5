"""`transformers.Trainer` with a distillation loss whose gradient ignores how a batch is cut."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from xtoken.data.collate import DistillBatch, DistillCollator
from xtoken.data.examples import ExampleSet
from xtoken.teachers.forward import causal_logits
from xtoken.training.config import ConfigError, DistillConfig
from xtoken.training.evaluate import HeldOutEvaluator
from xtoken.training.history import History
from xtoken.training.objective import Objective, Parts, TeacherSource


@dataclass(frozen=True)
class StepTotals:
    """What one optimizer step divides by, over all its micro-batches and processes.

    Args:
        tokens: predicted tokens, the normalizer of the cross-entropy.
        chunks: usable chunks, the normalizer of the distillation loss.
        kd_scale: weight of the distillation loss; None while one micro-batch is the whole step, and
            the loss finds it from its own values.
    """

    tokens: float
    chunks: float
    kd_scale: float | None


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
    Raises: ConfigError if the loss needs a teacher and there is none.
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
            raise ConfigError(
                f"loss = {config.loss!r} needs a teacher, and none was given; pass teacher= or 'ce'"
            )
        args = args or training_arguments(config, output_dir)
        if args.n_gpu > 1:
            raise ConfigError(
                f"one process sees {args.n_gpu} GPUs, and DataParallel cannot split chunks; "
                "start one process a GPU with torchrun, or set CUDA_VISIBLE_DEVICES"
            )
        # Not through `args.bf16`: accelerate then copies the logits [B, T, V] to float32, which the
        # losses do by row blocks, and evaluates in bfloat16 once training has begun.
        self._autocast = config.mixed_precision == "bf16"
        self.distill_config: DistillConfig = config
        self.objective: Objective = objective
        self.teacher = teacher
        self.evaluator = evaluator
        self.history = history
        self.on_step = on_step
        self._step_metrics: dict[str, float] = {}
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
        self.remove_callback(PrinterCallback)

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
        totals = StepTotals(tokens, chunks, self._fixed_scale())
        whole = len(batches) == 1 and self.accelerator.num_processes == 1
        if totals.kd_scale is None and self.objective.needs_teacher and not whole:
            totals = self._balanced(batches, totals)
        return batches, totals

    def _fixed_scale(self) -> float | None:
        weight = self.distill_config.kd_weight
        return None if weight == "balanced" else float(weight)

    def _balanced(self, batches: list[Any], totals: StepTotals) -> StepTotals:
        """Find CE / KD over the whole step by a pass without gradients."""
        values = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in batches:
                batch = cast(DistillBatch, self._prepare_inputs(batch))
                parts = self._parts(cast(nn.Module, self.model), batch, totals)
                metrics = parts.metrics()
                values += torch.tensor([metrics["ce"], metrics["kd"]], dtype=torch.float64)
        ce, kd = self._over_processes(values)
        return StepTotals(totals.tokens, totals.chunks, self.objective.balance(ce, kd))

    def _over_processes(self, values: Tensor) -> list[float]:
        if self.accelerator.num_processes == 1:
            return [float(value) for value in values]
        # float32 on devices that have no float64; counts stay exact up to 2^24 a process.
        local = values.to(self.args.device, torch.float32)
        gathered: Tensor = self.accelerator.gather(local[None])
        return [float(value) for value in gathered.double().sum(0)]

    def _parts(self, model: nn.Module, batch: DistillBatch, totals: StepTotals) -> Parts:
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self._autocast):
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
        totals = num_items_in_batch
        if totals is None:
            tokens, chunks = self.objective.counts(inputs)
            totals = StepTotals(tokens, chunks, self._fixed_scale())
        parts = self._parts(model, inputs, totals)
        loss, kd_scale = self.objective.combine(parts, totals.kd_scale)
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
        Raises: ConfigError if the trainer has no evaluator.
        """
        if self.evaluator is None:
            raise ConfigError("no held-out examples to evaluate on; pass evaluator= to the trainer")
        metrics = self.evaluator.score(cast(nn.Module, self.model)).metrics(f"{metric_key_prefix}_")
        if self.history is not None:
            self.history.add({"step": self.state.global_step, **metrics})
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def training_arguments(config: DistillConfig, output_dir: Path | str) -> TrainingArguments:
    """Return the Trainer's arguments for the settings: no checkpoints, no bars, one log a step."""
    device = run_device(config)
    if config.mixed_precision == "bf16" and device.type == "cuda":
        # Asked of the device, not of torch, which also says yes where it would emulate.
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8 and torch.version.hip is None:
            raise ConfigError(
                f"mixed_precision = 'bf16', but this GPU has compute capability {major}.{minor}, "
                "and bfloat16 needs 8.0; set it to 'no'"
            )
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
    )


def run_device(config: DistillConfig) -> torch.device:
    """Return where student and teacher run.

    Raises: ConfigError if CUDA is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("device = 'cuda', but torch finds no CUDA device; use 'auto' or 'cpu'")
    if not available or config.device == "cpu":
        return torch.device("cpu")
    # torchrun numbers the processes of a machine, each of which has its own device.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
