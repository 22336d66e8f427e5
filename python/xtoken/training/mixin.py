"""Distillation over any `transformers.Trainer`: one step, whatever stands around it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.deepspeed import (
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)
from transformers.trainer_pt_utils import LabelSmoother

from xtoken._checks import expect
from xtoken.distillation import Counts, DistillOutput
from xtoken.errors import ArgumentTypeError, OptionError
from xtoken.losses.output import balance
from xtoken.pair import Pair
from xtoken.teachers import LiveTeacher
from xtoken.teachers.forward import check_ids, check_positions
from xtoken.training.batches import rows_of, split
from xtoken.training.fixed_settings import FixedSettings
from xtoken.training.kept_counts import counts_kept
from xtoken.training.learned_projection import KeepProjection, LearnsProjection
from xtoken.training.processes import shard_frozen
from xtoken.training.read_ahead import ReadAhead
from xtoken.training.settings import DistillSettings
from xtoken.training.shared_weights import check_teachers_apart
from xtoken.training.student_checks import check_student, warn_of_rows
from xtoken.training.student_forward import ForwardsStudent
from xtoken.training.teaching import AnyBatch, AnyTeacher, Teaching, teach
from xtoken.training.trainer_log import BeginLog, LogsParts
from xtoken.training.trainer_rows import TakesTeacherSide, check_rows_given

if TYPE_CHECKING:
    from xtoken.training.on_policy import Sampler

    _Base = Trainer
else:
    _Base = object


class _ShiftedSmoother(LabelSmoother):
    """Smooths the label of the token that follows: a student is causal whatever its class is
    called, by which the Trainer decides (a compiled one is called otherwise)."""

    def __call__(self, *given: Any, shift_labels: bool = True, **named: Any) -> Any:
        # Through Any: transformers declares it without types.
        return cast(Any, super()).__call__(*given, shift_labels=True, **named)


class DistillMixin(LearnsProjection, LogsParts, TakesTeacherSide, ForwardsStudent, _Base):
    """Adds teachers to a Trainer: `class MyTrainer(DistillMixin, SFTTrainer)`.

    The loss of a step is a sum over all its tokens and chunks, divided by their number over all
    micro-batches and processes: how a batch is cut changes memory and speed, and the gradient only
    by rounding; only the routers' loss of a mixture of experts is a mean over the micro-batches.
    Where the Trainer below has a loss of its own (`SFTTrainer`), that loss stands in for
    cross-entropy, with all that it logs; the hidden states that it was made of go into the
    distillation loss, with no second forward pass and no logits. Else cross-entropy is ours.
    Evaluation is that of the Trainer, without teachers.

    Args:
        model, args: as the Trainer takes them, and all else it takes.
        teachers: a `Teacher`, a `LiveTeacher`, a filled `TopKStore`, a `ServedTeacher`, a model, or
            its directory or hub name; several make a weighted sum. None for the loss `ce`.
        distill: the losses; those of `args` where it is a `DistillArguments`.
        processing_class: the student's tokenizer, or the `Pair` with the teacher's.

    Raises:
        OptionError, PairError: the settings or teachers do not fit.
    """

    teaching: Teaching
    # Whether we tokenize and pad the rows, and not the Trainer below.
    _makes_rows = False

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *more: Any,
        teachers: Sequence[AnyTeacher] | AnyTeacher | None = (),
        distill: DistillSettings | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        sampler: Sampler | None = None,
        **named: Any,
    ) -> None:
        if args is not None:
            expect(args, TrainingArguments, "args", "pass DistillArguments(output_dir=...)")
        if distill is not None:
            expect(distill, DistillSettings, "distill", "pass DistillSettings(loss=...)")
        if teachers is None:
            teachers = ()
        if isinstance(teachers, str | Path) or not isinstance(teachers, Sequence):
            teachers = [teachers]
        self.distill_settings = distill or (
            args if isinstance(args, DistillSettings) else DistillSettings()
        )
        for name in ("train_dataset", "eval_dataset"):
            check_rows_given(name, named.get(name))
        student: Any = processing_class
        if isinstance(processing_class, str | Path):
            raise ArgumentTypeError(
                f"processing_class = {str(processing_class)!r} is a name; pass "
                "AutoTokenizer.from_pretrained(...) of it"
            )
        if isinstance(processing_class, Pair):
            processing_class = processing_class.student_tokenizer
        if student is None:
            student = processing_class = _tokenizer_of(model)
        device = args.device if args is not None else TrainingArguments().device
        # A teacher that will be sharded need not fit on one device.
        sharded = _asks_for_fsdp(args)
        smoothed = args is not None and args.label_smoothing_factor != 0
        self._own_ce = not smoothed and _loss_is_plain(type(self), named)
        if not self._makes_rows:
            self._check_settings()
        with _outside_of_deepspeed(args):
            self.teaching = teach(
                teachers,
                student,
                self.distill_settings,
                torch.device("cpu") if sharded else device,
                own_cross_entropy=self._own_ce,
            ).to(device)
        if args is not None:
            # Each process collates its own rows: accelerate would send batches of tensors from the
            # first one, and no chunks.
            cast(Any, args.accelerator_config).dispatch_batches = False
        pairs = [each.fingerprint for each in self.teaching.pairs]
        self._fixed = FixedSettings(self.distill_settings, pairs)
        self._begin_log()
        # Weight of the distillation loss in this step; None while it is still to be found, from
        # the micro-batches below or, where there are none, from the one that is the whole step.
        self._kd_scale: float | None = None
        self._to_balance: list[Any] = []
        self._totals: tuple[Counts, ...] | None = None
        self._micro_batches = 1
        self._ahead = ReadAhead()
        cast(Any, super()).__init__(
            model,
            args,
            *more,
            processing_class=processing_class,
            callbacks=[
                self._fixed,
                *(callbacks or ()),
                KeepProjection(self),
                BeginLog(self),
            ],
            **named,
        )
        if self.args.n_gpu > 1:
            raise OptionError(
                f"one process sees {self.args.n_gpu} GPUs, and DataParallel cannot split chunks; "
                "start one process per GPU with torchrun, or set CUDA_VISIBLE_DEVICES"
            )
        if self.label_smoother is not None:
            self.label_smoother = _ShiftedSmoother(self.label_smoother.epsilon)
        whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        check_student(cast(nn.Module, self.model), whole=whole)
        self._rows_tried = not whole
        check_teachers_apart(self.teaching.sources, cast(nn.Module, self.model))
        if sharded:
            self._place_teachers()
        self._place_tensorboard()
        self._bind_data()
        if self.distill_settings.on_policy_fraction > 0:
            self._bind_sampler(sampler)
        # The loss below is already divided by the totals of the step. Older releases ask the first
        # attribute whether to divide by the number of micro-batches again, newer ones the second.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        # transformers 5.3 has accelerate divide as well. DeepSpeed's own division is turned off by
        # the Trainer.
        if not self.is_deepspeed_enabled:
            self.accelerator.gradient_accumulation_steps = 1
        if self._learned() and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise OptionError(
                "learnable_projection = True is not sharded; train with data parallel alone, or "
                "leave W fixed"
            )

    def _check_settings(self) -> None:
        """Refuse settings that would do nothing here.

        Raises:
            OptionError: names the setting, and what does it.
        """
        self.distill_settings.check_rows()
        if not self._own_ce and self.distill_settings.fused is False:
            raise OptionError(
                f"fused = False beside a loss of the Trainer's own ({type(self).__name__}), which "
                "makes no logits: the head is distilled; leave it out"
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._fixed.compare(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        # A search over hyperparameters has a folder for each trial.
        folder = Path(cast(Any, self)._get_output_dir(trial=trial))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and checkpoint.is_dir():
            self._fixed.keep(checkpoint)

    def init_hf_repo(self, *given: Any, **named: Any) -> None:
        """The Trainer's own; what stands in its way is one line.

        Raises:
            OptionError: the hub cannot be reached, or refuses.
        """
        try:
            super().init_hf_repo(*given, **named)
        # Errors of the hub's client, of its transport, and builtins.
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise OptionError(
                f"push_to_hub = True, but the hub refuses or cannot be reached ({reason}); log in "
                "with hf auth login, check hub_model_id and the network, or leave push_to_hub out"
            ) from error

    def _place_teachers(self) -> None:
        """Shard the teachers that run here as the student is; without FSDP2 each device has them
        whole."""
        for source in self.teaching.sources:
            if not isinstance(source, LiveTeacher):
                continue
            if self.is_fsdp_enabled and self.accelerator.is_fsdp2:
                shard_frozen(source.model, self.args.device)
            else:
                source.model.to(self.args.device)

    def _bind_sampler(self, sampler: Sampler | None) -> None:
        """Prepare for `on_policy_fraction`."""
        raise OptionError(
            f"on_policy_fraction = {self.distill_settings.on_policy_fraction}: "
            f"{type(self).__name__} has rows of its own, of which no prompt is known; use "
            "DistillTrainer"
        )

    # ---- One step ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Collect the micro-batches of one step and count what the step will divide by."""
        announces = self.teaching.announces
        source = self._ahead.over(epoch_iterator) if announces else epoch_iterator
        batches, items = super().get_batch_samples(source, num_batches, device)
        batches = self._step_batches(batches)
        sides = _sides(batches)
        if announces:
            self._announce(sides, num_batches)
        self._totals, self._to_balance = None, []
        self._micro_batches = max(len(batches), 1)
        self.rows_left_out += sum(rows_of(batch).left_out for batch in batches)
        self.rows_not_distilled += sum(rows_of(batch).not_distilled for batch in batches)
        if not sides:
            return batches, items
        self._steps_in_window += 1
        self._totals = self._count(sides)
        self._kd_scale = self._fixed_scale()
        whole = len(batches) == 1 and self.accelerator.num_processes == 1
        balanced = self._kd_scale is None and self.teaching.needs_teacher
        # Found in the first micro-batch and not here: a resumed run restores its random numbers,
        # which dropout draws, only after this.
        self._to_balance = batches if balanced and not whole else []
        return batches, items

    def _announce(self, sides: Sequence[AnyBatch], num_batches: int) -> None:
        """Have served teachers asked for what this step needs, and then for the next one."""
        self.teaching.announce(sides)
        if self.state.global_step + 1 >= self.state.max_steps:
            self._ahead.close()
        # What the student will say in the next step is not known yet.
        elif self.distill_settings.on_policy_fraction == 0:
            self.teaching.announce(_sides(self._ahead.peek(num_batches)))

    def _step_batches(self, batches: list[Any]) -> list[Any]:
        """The micro-batches of a step as it takes them."""
        return batches

    def _count(self, sides: Sequence[AnyBatch]) -> tuple[Counts, ...]:
        counted = [self.teaching.counts(side) for side in sides]
        sums = [sum(of_one, Counts(0, 0)) for of_one in zip(*counted, strict=True)]
        flat = self._over_processes(
            torch.tensor(
                [[each.tokens, each.chunks] for each in sums], dtype=torch.float64, device="cpu"
            )
        )
        return tuple(
            Counts(tokens, chunks) for tokens, chunks in zip(flat[::2], flat[1::2], strict=True)
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
            inputs: the student's inputs, with the teachers' side under `TEACHER_SIDE`.
            num_items_in_batch: what the Trainer below divides its own loss by.
        """
        student, batch = split(inputs)
        self._check_student(model, student)
        if batch is None and model.training:
            self._check_no_side()
        if batch is None or not model.training:
            return super().compute_loss(model, student, return_outputs, num_items_in_batch)
        totals, kd_scale = self._totals, self._kd_scale
        if totals is None:
            totals, kd_scale = self.teaching.counts(batch), self._fixed_scale()
        elif self._to_balance:
            batches, self._to_balance = self._to_balance, []
            kd_scale = self._kd_scale = self._balance(batches, totals, num_items_in_batch)
        if self._own_ce:
            output = self._output(model, student, batch, totals, kd_scale)
            # Data parallel averages gradients over processes; the totals are those of all.
            loss = output.loss * self.accelerator.num_processes
        else:
            output, loss = self._beside(model, student, batch, totals, kd_scale, num_items_in_batch)
        self._record(output, batch, totals)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _check_student(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Refuse what the student has no positions or no embedding for."""
        bare = self.accelerator.unwrap_model(model)
        if model.training and not self._rows_tried:
            self._rows_tried = True
            warn_of_rows(bare, inputs)
        check_positions(bare, inputs, "student")
        check_ids(bare, inputs, "student", self.teaching.first.pair.sizes[0])

    def _output(
        self,
        model: nn.Module,
        student: dict[str, Any],
        batch: AnyBatch,
        totals: Sequence[Counts],
        kd_scale: float | None,
    ) -> DistillOutput:
        """Our own forward pass, and all losses of it."""
        logits, routers = self._student(model, student)
        signals = self.teaching.signals(batch)
        output: DistillOutput = self.teaching(logits, signals, batch, totals, kd_scale)
        if routers is None:
            return output
        # A mean over tokens and experts of the micro-batch already, and no sum: the step has the
        # mean over micro-batches and processes.
        share = routers.value.float() / (self._micro_batches * self.accelerator.num_processes)
        name = "aux_loss"
        self._step_metrics[name] = self._step_metrics.get(name, 0.0) + float(share.detach())
        return replace(output, loss=output.loss + routers.weight * share.to(output.loss.device))

    def _beside(
        self,
        model: nn.Module,
        student: dict[str, Any],
        batch: AnyBatch,
        totals: Sequence[Counts],
        kd_scale: float | None,
        num_items: Any,
    ) -> tuple[DistillOutput, Tensor]:
        """The loss of the Trainer below, and ours of the hidden states that it was made of."""
        weight = self.distill_settings.ce_weight
        if not self.teaching.needs_teacher:
            base = self._base_loss(model, student, num_items)
            ce = self._share(base)
            zero = torch.zeros((), device=base.device)
            plain = DistillOutput(weight * ce, None, ce, zero, zero.long(), 0)
            return plain, weight * base
        pure, base = self._both(model, student, batch, totals, num_items)
        ce = self._share(base)
        processes = self.accelerator.num_processes
        assert pure.kd is not None
        scale = balance(pure.kd, ce) if kd_scale is None else torch.tensor(kd_scale)
        scale = scale.to(pure.kd.device)
        loss = scale * pure.kd * processes + weight * base
        output = DistillOutput(
            loss.detach() / processes, pure.kd, ce, scale, pure.num_chunks, 0, pure.metrics
        )
        return output, loss

    def _both(
        self,
        model: nn.Module,
        student: dict[str, Any],
        batch: AnyBatch,
        totals: Sequence[Counts],
        num_items: Any,
    ) -> tuple[DistillOutput, Tensor]:
        """The pure distillation loss, and the loss of the Trainer below, of one forward pass."""
        head = self._checked_head(model, student)
        if isinstance(head, str):
            if _loss_is_plain(type(self), {}):
                raise OptionError(
                    f"{head}, and beside a loss of the Trainer's own only the head is distilled; "
                    "leave out label_smoothing_factor and compute_loss_func"
                )
            raise OptionError(
                f"{head}, and {type(self).__name__} makes its own loss without logits; distil with "
                "DistillTrainer, which takes the model's logits"
            )
        with head.capture() as hidden:
            base = self._base_loss(model, student, num_items)
        states = head.hidden(hidden, student["input_ids"])
        if isinstance(states, str):
            raise ArgumentTypeError(
                f"{type(self).__name__}.compute_loss ran no forward pass of the student that can "
                f"be distilled: {states}"
            )
        signals = self.teaching.signals(batch)
        rows = self._head_of(head, states, model)
        pure: DistillOutput = self.teaching(rows, signals, batch, totals, 1.0)
        return pure, base

    def _base_loss(self, model: nn.Module, student: dict[str, Any], num_items: Any) -> Tensor:
        found = super().compute_loss(model, student, num_items_in_batch=num_items)
        if not isinstance(found, Tensor) or found.numel() != 1:
            given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ArgumentTypeError(
                f"the loss of compute_loss_func or of {type(self).__name__} is {given}, expected a "
                "tensor of one number with its graph; return that"
            )
        return found

    def _share(self, base: Tensor) -> Tensor:
        """What the Trainer's own loss of a micro-batch adds to that of the step."""
        # Data parallel takes the mean over processes, whatever it was divided by.
        share: Tensor = base.detach() / self.accelerator.num_processes
        return share

    # ---- The balance ----

    def _fixed_scale(self) -> float | None:
        weight = self.distill_settings.kd_weight
        return None if weight == "balanced" else float(weight)

    def _balance(self, batches: list[Any], totals: Sequence[Counts], num_items: Any) -> float:
        """Find CE / KD over the whole step by a pass without gradients, with the same dropout."""
        values = torch.zeros(2, dtype=torch.float64, device="cpu")
        with torch.no_grad(), self._same_random_numbers(), counts_kept(self):
            for inputs in batches:
                student, batch = split(self._prepare_inputs(inputs))
                if batch is None:
                    continue
                model = cast(nn.Module, self.model)
                self._check_student(model, student)
                ce, kd = self._parts(model, student, batch, totals, num_items)
                values += torch.tensor([ce, kd], dtype=torch.float64, device="cpu")
        ce, kd = self._over_processes(values)
        return self.teaching.first.balance(ce, kd)

    def _parts(
        self,
        model: nn.Module,
        student: dict[str, Any],
        batch: AnyBatch,
        totals: Sequence[Counts],
        num_items: Any,
    ) -> tuple[float, float]:
        """Cross-entropy, or what stands in for it, and distillation loss of a micro-batch, both as
        its share in the step."""
        if not self._own_ce:
            pure, base = self._both(model, student, batch, totals, num_items)
            assert pure.kd is not None
            return float(self._share(base)), float(pure.kd)
        logits, _ = self._student(model, student)
        signals = self.teaching.signals(batch)
        output: DistillOutput = self.teaching(logits, signals, batch, totals, 1.0)
        assert output.kd is not None
        assert output.ce is not None
        return float(output.ce), float(output.kd)


def _sides(batches: Sequence[Any]) -> list[AnyBatch]:
    """The teachers' sides of those micro-batches that have one."""
    return [side for side in (split(batch)[1] for batch in batches) if side is not None]


def _asks_for_fsdp(args: TrainingArguments | None) -> bool:
    """Whether the arguments, or the launcher of accelerate, ask for FSDP."""
    return bool(getattr(args, "fsdp", None)) or os.environ.get("ACCELERATE_USE_FSDP") == "true"


@contextlib.contextmanager
def _outside_of_deepspeed(args: TrainingArguments | None) -> Iterator[None]:
    """Load models as without DeepSpeed: under its third stage `from_pretrained` makes parts of
    weights, which only the engine of the student puts together."""
    config = getattr(args, "hf_deepspeed_config", None)
    if config is None:
        yield
        return
    # Through Any: transformers declares both without types.
    cast(Any, unset_hf_deepspeed_config)()
    try:
        yield
    finally:
        cast(Any, set_hf_deepspeed_config)(config)


def _loss_is_plain(cls: type, named: dict[str, Any]) -> bool:
    """Whether the Trainer below the mixin has no loss of its own."""
    if named.get("compute_loss_func") is not None:
        return False
    below = [each for each in cls.__mro__ if not issubclass(each, DistillMixin)]
    return all("compute_loss" not in vars(each) or each is Trainer for each in below)


def _tokenizer_of(model: Any) -> Any:
    from xtoken.vocab.load import load_tokenizer

    name = model if isinstance(model, str) else getattr(model, "name_or_path", "")
    if not name:
        raise OptionError(
            "processing_class is None, and the model does not say where its tokenizer is; pass the "
            "student's tokenizer, or an xtoken.Pair"
        )
    return load_tokenizer(str(name))
