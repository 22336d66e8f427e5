"""What the settings of a run mean to the trainer, and where they let it run."""

from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.utils.checkpoint
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils.import_utils import is_liger_kernel_available

from xtoken._files import parse_json
from xtoken.errors import FormatError, OptionError, XTokenError
from xtoken.training.arguments import DistillArguments
from xtoken.training.config import DistillConfig
from xtoken.training.trainer_options import SHARDED

SCHEDULE = {
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}',
}
"""A run's own, by the arguments of the trainer."""


class FollowArguments(TrainerCallback):
    """Evaluates and saves as often as the settings of this session say.

    A resumed Trainer would follow the checkpoint's, and only warn.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # Through Any: transformers declares the method without types.
        cast(Any, state).compute_steps(args, state.max_steps)


def training_arguments(config: DistillConfig, output_dir: Path | str) -> DistillArguments:
    """Return the trainer's arguments for the settings: no bars, one log per step.

    Raises: OptionError if the device cannot do what the settings ask for.
    """
    device = run_device(config)
    if config.mixed_precision == "bf16" and device.type == "cuda":
        # Asked of the device, not of torch, which also says yes where it would emulate.
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8 and torch.version.hip is None:
            raise OptionError(
                f"mixed_precision = 'bf16', but this GPU has compute capability {major}.{minor}, "
                "and bfloat16 needs 8.0; set it to 'no'"
            )
    arguments: dict[str, Any] = dict(
        **cast(dict[str, Any], config.settings()),
        output_dir=str(output_dir),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        save_strategy="steps" if config.checkpoint_every else "no",
        save_steps=config.checkpoint_every or 500,  # 0 is refused, also where it is not used
        save_total_limit=None,  # `MarkCheckpoints` removes the others
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        bf16=config.mixed_precision == "bf16",
        per_device_eval_batch_size=config.eval_batch_size,
    )
    with _naming_arguments(config):
        return DistillArguments(**(arguments | config.trainer | _schedule(config)))


def check_trainer(config: DistillConfig) -> None:
    """Raise what the Trainer will raise of its arguments, before a run has made anything.

    Many are read only when there is an optimizer, a schedule or a loader: here, those of a Trainer
    of one weight.

    Raises: OptionError, which names the arguments.
    """
    for name, variable in (("fsdp", "FSDP"), ("deepspeed", "DEEPSPEED")):
        if os.environ.get(f"ACCELERATE_USE_{variable}", "false").lower() == "true":
            raise OptionError(f"accelerate launches this with {name}, but {SHARDED}")
    if not config.trainer:
        return
    # In an account on the hub nothing is made yet.
    local = replace(
        config,
        trainer={
            name: value if name != "push_to_hub" else False
            for name, value in config.trainer.items()
        },
    )
    with tempfile.TemporaryDirectory() as scratch, _naming_arguments(config):
        arguments = training_arguments(local, scratch)
        rows: Any = [{}]
        trainer = Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=rows, eval_dataset=rows)
        if arguments.optim_target_modules is None:  # of the student, which is not here
            trainer.create_optimizer_and_scheduler(config.steps)
        else:
            with contextlib.suppress(ValueError):  # of modules that this one weight has not
                Trainer.get_optimizer_cls_and_kwargs(arguments, cast(Any, trainer.model))
        trainer.get_train_dataloader()
        _check_compiled(arguments)
        _check_checkpointing(arguments)
        if arguments.use_liger_kernel and not is_liger_kernel_available():
            raise OptionError("use_liger_kernel needs liger-kernel; pip install liger-kernel")


def _check_compiled(arguments: DistillArguments) -> None:
    """Have torch look at the mode, which it does before it compiles anything."""
    if arguments.torch_compile:
        torch.compile(
            torch.nn.Linear(1, 1),
            backend=arguments.torch_compile_backend or "inductor",
            mode=arguments.torch_compile_mode,
        )


def _check_checkpointing(arguments: DistillArguments) -> None:
    """Refuse options of activation checkpointing that torch has not, or that are not read."""
    # The second are the names of transformers before 5.9, and its aliases since then.
    for kind in ("activation_checkpointing", "gradient_checkpointing"):
        given = getattr(arguments, f"{kind}_kwargs", None)
        if not given:
            continue
        if not getattr(arguments, kind, False):
            raise OptionError(f"{kind}_kwargs without {kind}; set it too, or leave them out")
        options = inspect.signature(torch.utils.checkpoint.checkpoint).parameters.values()
        known = {each.name for each in options if each.kind is each.KEYWORD_ONLY}
        known |= {"use_reentrant", "preserve_rng_state", "every_n_layers", "offload"}
        unknown = sorted(set(given) - known)
        if unknown:
            raise OptionError(
                f"{kind}_kwargs has {unknown[0]!r}, expected of {', '.join(sorted(known))}"
            )


def _schedule(config: DistillConfig) -> dict[str, Any]:
    """To a tenth along a cosine, unless another schedule is named, or another end of it."""
    ours = SCHEDULE["lr_scheduler_type"]
    given: Any = config.trainer.get("lr_scheduler_kwargs") or {}
    if config.trainer.get("lr_scheduler_type", ours) != ours:
        return {}
    if isinstance(given, str):
        try:
            given = parse_json(given)
        except FormatError as error:
            raise OptionError(
                f"lr_scheduler_kwargs {error}; pass an object of JSON, or leave it out"
            ) from error
    if isinstance(given, dict) and "min_lr" not in given:
        given = cast("dict[str, Any]", parse_json(SCHEDULE["lr_scheduler_kwargs"])) | given
    return {"lr_scheduler_type": ours, "lr_scheduler_kwargs": given}


@contextlib.contextmanager
def _naming_arguments(config: DistillConfig) -> Iterator[None]:
    """Say which arguments an error is of."""
    try:
        yield
    # transformers raises builtins of many kinds for values that cannot work.
    except (ValueError, TypeError, ImportError, AttributeError, RuntimeError, OSError) as error:
        if isinstance(error, XTokenError) or not config.trainer:
            raise
        raise OptionError(
            f"{', '.join(config.trainer)} of the trainer: {' '.join(str(error).split())[:300]}; "
            "correct or leave out"
        ) from error


def run_device(config: DistillConfig) -> torch.device:
    """Return where student and teacher run.

    Raises: OptionError if CUDA is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise OptionError("device = 'cuda', but torch finds no CUDA device; use 'auto' or 'cpu'")
    if not available or config.device == "cpu":
        return torch.device("cpu")
    # torchrun numbers the processes of a machine, each of which has its own device.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
