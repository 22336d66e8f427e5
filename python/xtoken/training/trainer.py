"""`transformers.Trainer` with teachers, on texts and conversations as they come."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)

from xtoken.distillation.collate import DistillCollator, pad_id
from xtoken.errors import ArgumentTypeError, OptionError
from xtoken.pair import Pair
from xtoken.teachers import TopKStore
from xtoken.teachers.forward import positions_of
from xtoken.training.arguments import DistillArguments
from xtoken.training.batches import ExampleCollator, rows_of
from xtoken.training.evaluate import HeldOutEvaluator
from xtoken.training.mixin import DistillMixin
from xtoken.training.on_policy import (
    GeneratingSampler,
    OnPolicy,
    Sampler,
    without_cross_entropy,
)
from xtoken.training.rows import ExampleRows, is_stream, prepare_rows
from xtoken.training.served_sampler import ServedSampler
from xtoken.training.student_checks import check_left_padding
from xtoken.training.teaching import AnyTeacher
from xtoken.training.trainer_rows import check_rows_given


class DistillTrainer(DistillMixin, Trainer):
    """Trains a student on cross-entropy and on what its teachers say.

        trainer = DistillTrainer(model, DistillArguments("out"), teachers=["teacher"],
                                 train_dataset=dataset, processing_class=tokenizer)
        trainer.train()

    A gradient does not depend on how a batch is cut into micro-batches and processes. The balance
    `sg(CE / KD)` is taken over the whole step: where that has several micro-batches or processes,
    it costs one more forward pass of student and teacher; a fixed `kd_weight` does not.

    Evaluation scores the student alone: bits per byte and cross-entropy over all tokens, and what
    `compute_metrics` says.

    Args:
        model: the student, a causal language model.
        args: Trainer's and ours; None for the defaults.
        teachers: see `DistillMixin`.
        train_dataset, eval_dataset: texts, conversations or rows (see `document_of`), as a list, a
            `datasets.Dataset` or (unless they are to be evaluated on) a stream; or what was
            tokenized before: rows of `Pair.tokenize`, which stay on disk, or an `ExampleSet`. What
            cannot be used is left out with a warning.
        processing_class: the student's tokenizer, or the `Pair` of all teachers that name none.
        data_collator: a `DistillCollator`, or one that makes the teachers' side itself.
        sampler: answers the prompts of `on_policy_fraction` in place of the student's own generate.
        compute_metrics, callbacks, optimizers, more: as `Trainer`.

    Raises:
        OptionError: the loss needs a teacher and there is none; see `DistillMixin`.
        DataError: no row of a dataset can be used.
    """

    _makes_rows = True

    def __init__(
        self,
        model: nn.Module | None = None,
        args: DistillArguments | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | Pair | None = None,
        *,
        teachers: Sequence[AnyTeacher] | AnyTeacher | None = (),
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: Any = (None, None),
        sampler: Sampler | None = None,
        **more: Any,
    ) -> None:
        args = DistillArguments() if args is None else args
        if isinstance(model, str | Path):
            raise ArgumentTypeError(
                f"model = {str(model)!r} is a name; pass AutoModelForCausalLM.from_pretrained(...) "
                "of it"
            )
        # By what they score, as long as that is there: another may come to lie where it was.
        self._evaluators: weakref.WeakKeyDictionary[ExampleRows, HeldOutEvaluator]
        self._evaluators = weakref.WeakKeyDictionary()
        self._on_policy: OnPolicy | None = None
        # What it raises ends an evaluation.
        self._before_scored_batch: Callable[[], None] | None = None
        super().__init__(
            model,
            args,
            data_collator=cast(Any, data_collator) or _unset_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            teachers=cast(Any, teachers),
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            sampler=sampler,
            **more,
        )
        if data_collator is None:
            self.data_collator = ExampleCollator(self.teaching, keep=self._on_policy is not None)
        elif isinstance(data_collator, DistillCollator):
            self.data_collator = ExampleCollator(
                self.teaching, [data_collator], keep=self._on_policy is not None
            )
        made = self.data_collator
        if isinstance(made, ExampleCollator) and made.pads_left and not self._rows_tried:
            check_left_padding(cast(nn.Module, self.model))
        if data_collator is None or isinstance(data_collator, DistillCollator):
            self.train_dataset = self._prepared(train_dataset)
            self.eval_dataset = self._held_out(eval_dataset)

    def _bind_data(self) -> None:
        """The rows are made below, once the teachers are known."""

    def _positions(self) -> int | None:
        """The fewest positions of the models that run here."""
        models = [self.model, *(getattr(each, "model", None) for each in self.teaching.sources)]
        limits = [positions_of(model) for model in models if isinstance(model, nn.Module)]
        return min((limit for limit in limits if limit is not None), default=None)

    def _bind_sampler(self, sampler: Sampler | None) -> None:
        settings = self.distill_settings
        fraction = f"on_policy_fraction = {settings.on_policy_fraction}"
        if not self._own_ce:
            raise OptionError(
                f"{fraction} beside a loss of the Trainer's own (label_smoothing_factor, "
                "compute_loss_func), which would learn the samples by heart; leave that out"
            )
        stored = [each for each in self.teaching.sources if isinstance(each, TopKStore)]
        if stored:
            raise OptionError(
                f"{fraction}: the store {stored[0].directory} has no predictions of what the "
                "student will say; pass a teacher that runs or is served"
            )
        own = self.data_collator is _unset_collator or isinstance(
            self.data_collator, DistillCollator
        )
        if not own:
            raise OptionError(
                f"{fraction}: of what {type(self.data_collator).__name__} makes no prompt is "
                "known; leave data_collator out, or pass a DistillCollator"
            )
        pairs = self.teaching.pairs
        if sampler is None and settings.on_policy_url is not None:
            sampler = ServedSampler(settings.on_policy_url, pairs[0].student_vocab)
        if sampler is None:
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            pad = pad_id(pairs[0].student.source)
            # Asked for each time: model_init makes another one.
            sampler = GeneratingSampler(
                lambda: cast(nn.Module, self.model),
                pad,
                sharded=sharded,
                vocab_size=len(pairs[0].student_vocab),
            )
        self._on_policy = OnPolicy(
            settings,
            pairs,
            sampler,
            seed=self.args.seed,
            process=self.accelerator.process_index,
            positions=self._positions(),
        )

    def _step_batches(self, batches: list[Any]) -> list[Any]:
        """Let the student answer some of the examples.

        Its random numbers are its own, so that a resumed run samples what an uninterrupted one did.
        """
        collator = self.data_collator
        if self._on_policy is None or not isinstance(collator, ExampleCollator):
            return batches
        groups = [rows_of(inputs).examples for inputs in batches]
        made = []
        tokens = 0
        replaced = self._on_policy.replaced(groups, self.state.global_step)
        for inputs, group in zip(batches, replaced, strict=True):
            sampled = [row for row, (_, is_sampled) in enumerate(group) if is_sampled]
            if not sampled:
                made.append(inputs)
                continue
            batch = collator.batch([examples for examples, _ in group])
            made.append(collator.inputs(without_cross_entropy(batch, sampled), rows_of(inputs)))
            tokens += sum(int(group[row][0][0].student_loss_mask.sum()) for row in sampled)
        name = "sampled_tokens"
        self._step_metrics[name] = self._step_metrics.get(name, 0.0) + tokens
        return made

    def _prepared(self, dataset: Any, *, scored: bool = False) -> Any:
        if dataset is None:
            return None
        return prepare_rows(dataset, self.teaching, self.args, scored=scored)

    def _held_out(self, dataset: Any) -> Any:
        """What can be scored again and again; of a dictionary each part."""
        if isinstance(dataset, dict):
            return {name: self._held_out(part) for name, part in dataset.items()}
        if dataset is not None and is_stream(dataset):
            raise OptionError(
                f"eval_dataset: a {type(dataset).__name__} cannot be scored more than once; pass a "
                "list, a datasets.Dataset or an ExampleSet"
            )
        return self._prepared(dataset, scored=True)

    def _get_collator_with_removed_columns(
        self, data_collator: Any, *more: Any, **named: Any
    ) -> Any:
        # Of rows that are made here every column is used, whatever remove_unused_columns says.
        if isinstance(data_collator, ExampleCollator):
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, *more, **named)

    # ---- Precision ----

    def _build_accelerator_args(self, **named: Any) -> dict[str, Any]:
        made: dict[str, Any] = super()._build_accelerator_args(**named)
        sharded = named.get("fsdp_plugin") is not None or self.args.deepspeed is not None
        # Beside a loss of the Trainer's own the forward pass is the Trainer's.
        ours = self._own_ce and not sharded
        self._own_bf16 = ours and made.get("mixed_precision") == "bf16"
        if self._own_bf16:
            # Ours is around the student's forward pass alone: accelerate copies the logits
            # [B, T, V] to float32, which the losses do by row blocks, and evaluates in bfloat16
            # once training has begun.
            made["mixed_precision"] = "no"
        return made

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self._own_bf16:
            return torch.autocast(self.args.device.type, torch.bfloat16)
        return super()._precision()

    def _autocast_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self._own_bf16 else super()._autocast_dtype()

    # ---- Evaluation ----

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *more: Any, **named: Any
    ) -> Any:
        """The Trainer's own; the objective is `eval_loss` where none is given: all scores added up,
        which the Trainer takes, are none."""
        objective = compute_objective or (lambda metrics: metrics["eval_loss"])
        return super().hyperparameter_search(hp_space, objective, *more, **named)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Score the student.

        Returns: the scores of `HeldOutScore` by name and `loss`, in nats per text token, each with
            the prefix; what `compute_metrics` gives.
        Raises: OptionError if there is no dataset to evaluate on.
        """
        if eval_dataset is None:
            # Another one may have been set since.
            dataset = self.eval_dataset = self._held_out(self.eval_dataset)
        else:
            dataset = eval_dataset
        if isinstance(dataset, str):
            parts = self.eval_dataset
            if not isinstance(parts, dict) or dataset not in parts:
                known = f"one of {sorted(parts)}" if isinstance(parts, dict) else "a dataset"
                raise OptionError(
                    f"eval_dataset = {dataset!r}, expected {known}; names are those of a dict that "
                    "the trainer was given as eval_dataset"
                )
            dataset, metric_key_prefix = parts[dataset], f"eval_{dataset}"
        if isinstance(dataset, dict):
            found: dict[str, float] = {}
            for name, part in dataset.items():
                found |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return found
        if dataset is None:
            raise OptionError("no examples to evaluate on; pass eval_dataset= to the trainer")
        check_rows_given("eval_dataset", dataset)
        dataset = self._held_out(dataset)
        metrics: dict[str, float] = {}
        if self.compute_metrics is not None:
            output = self.evaluation_loop(
                self.get_eval_dataloader(dataset),
                description="Evaluation",
                ignore_keys=ignore_keys,
                metric_key_prefix=metric_key_prefix,
            )
            metrics |= cast("dict[str, float]", output.metrics)
        metrics |= self._scores(dataset, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _scores(self, rows: ExampleRows, prefix: str) -> dict[str, float]:
        if rows not in self._evaluators:
            self._evaluators[rows] = HeldOutEvaluator(
                rows.of_first(),
                self.teaching.first.pair.student_vocab,
                batch_size=self.args.per_device_eval_batch_size,
            )
        score = self._evaluators[rows].score(
            cast(nn.Module, self.model), before_batch=self._before_scored_batch
        )
        nats = score.bits_per_byte * math.log(2) * score.bytes / max(score.tokens, 1)
        return {f"{prefix}_loss": nats, **score.metrics(f"{prefix}_")}


def _unset_collator(rows: list[Any]) -> Any:
    """Stands in until the teachers are known."""
    raise NotImplementedError
