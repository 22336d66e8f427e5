"""What the settings of a run mean to the trainer, and where they let it run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from xtoken.errors import OptionError, XTokenError
from xtoken.training.arguments import DistillArguments
from xtoken.training.config import DistillConfig

# Checkpoints on the disk: the newest, to go on from, and the one before, until the newest is known
# to be whole.
KEPT = 2


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
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        save_strategy="steps" if config.checkpoint_every else "no",
        save_steps=config.checkpoint_every or 500,  # 0 is refused, also where it is not used
        save_total_limit=KEPT,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        bf16=config.mixed_precision == "bf16",
        per_device_eval_batch_size=config.eval_batch_size,
    )
    try:
        return DistillArguments(**(arguments | config.trainer))
    # transformers raises builtins of many kinds for values that cannot work.
    except (ValueError, TypeError, ImportError, AttributeError) as error:
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
