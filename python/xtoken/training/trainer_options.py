"""Which of transformers' arguments a run takes by their names, and what decides the others."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NoReturn, cast, get_args, get_type_hints

from xtoken._files import JsonValue
from xtoken.errors import OptionError

ALIASES: dict[str, str] = {
    "max_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "eval_steps": "eval_every",
    "per_device_eval_batch_size": "eval_batch_size",
    "save_steps": "checkpoint_every",
    "max_depth": "prefix_max_depth",
    "end": "prefix_end",
}
"""Settings of a run by the names that `DistillArguments` has for them."""

SHARDED = (
    "the command trains with data parallel alone; DistillTrainer shards, see examples/trainer.py"
)

OWNED: dict[str, str] = {
    "output_dir": "the run's folder: --out",
    "num_train_epochs": "a run has steps: pass steps",
    "bf16": "mixed_precision says it",
    "fp16": "mixed_precision says it, and losses need the range of bf16",
    "use_cpu": "device says it",
    "eval_strategy": "eval_every says it",
    "save_strategy": "checkpoint_every says it",
    "save_total_limit": "the newest two checkpoints are kept",
    "load_best_model_at_end": "the student of the last step is written",
    "metric_for_best_model": "the student of the last step is written",
    "greater_is_better": "the student of the last step is written",
    "save_only_model": "a run is resumed from its checkpoints",
    "restore_callback_states_from_checkpoint": "a run is resumed by --resume",
    "resume_from_checkpoint": "a run is resumed by --resume",
    "logging_strategy": "metrics.jsonl has a line per step",
    "logging_steps": "metrics.jsonl has a line per step",
    "logging_nan_inf_filter": "a loss that is NaN ends the run",
    "disable_tqdm": "the command has its own bars",
    "remove_unused_columns": "examples are prepared before",
    "label_smoothing_factor": "the cross-entropy is that of the losses",
    "do_train": "a run trains and evaluates",
    "do_eval": "a run trains and evaluates",
    "do_predict": "a run trains and evaluates",
    "hub_token": "it would be written to disk: set HF_TOKEN",
    "teacher_column": "--teacher-column says it",
    "pad_multiple": "batches are padded to their longest",
    "padding_side": "batches are padded on the right",
    "local_rank": "torchrun sets it",
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config"), SHARDED),
}
"""Arguments that a run decides itself, each with what decides it."""

# What changes no weight: a resumed run may have others.
REPORTING = frozenset(
    {
        *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id"),
        *("trackio_static_space_id", "log_level", "log_level_replica", "log_on_each_node"),
        *("logging_first_step", "dataloader_num_workers", "dataloader_pin_memory"),
        *("dataloader_persistent_workers", "dataloader_prefetch_factor", "skip_memory_metrics"),
    }
)


def trainer_fields(known: frozenset[str]) -> dict[str, dataclasses.Field[Any]]:
    """The fields of `DistillArguments` that a run takes beside the settings `known` to it."""
    from xtoken.training.arguments import DistillArguments

    taken = known | ALIASES.keys() | OWNED.keys()
    return {
        each.name: each
        for each in dataclasses.fields(DistillArguments)
        if each.name not in taken and each.init
    }


def check_trainer_options(values: Mapping[str, JsonValue], known: frozenset[str]) -> None:
    """Refuse what is no argument, or one that the run decides.

    Raises:
        OptionError: names the argument and what decides it.
    """
    fields = trainer_fields(known) if values else {}
    for name in values:
        if name in OWNED:
            raise OptionError(f"{name} cannot be set here: {OWNED[name]}")
        if name in ALIASES or name in known:
            raise OptionError(f"{name} under 'trainer'; pass {ALIASES.get(name, name)} beside it")
        if name not in fields:
            raise OptionError(
                f"trainer has {name!r}, which is no argument of transformers' TrainingArguments or "
                "of DistillSettings; look into xtoken distill --help"
            )


def parse_trainer_option(name: str, text: str) -> JsonValue:
    """The value of an argument as a command line spells it; `none` where it may be None.

    Raises:
        OptionError: it is none.
    """
    if text.lower() in ("none", "null") and type(None) in get_args(_hints()[name]):
        return None
    values: list[str] = [text]
    action = next(each for each in _parser()._actions if each.dest == name)
    if action.nargs == "+":
        values = text.split(",")
    parsed = vars(_parser().parse_args([f"--{name}", *values]))[name]
    value: JsonValue = getattr(parsed, "value", parsed)  # of an enumeration
    return value


@functools.cache
def _hints() -> dict[str, Any]:
    from xtoken.training.arguments import DistillArguments

    return get_type_hints(DistillArguments)


@functools.cache
def _parser() -> argparse.ArgumentParser:
    from transformers import HfArgumentParser

    from xtoken.training.arguments import DistillArguments

    class Parser(HfArgumentParser):
        """Says what is wrong instead of ending the process."""

        def error(self, message: str) -> NoReturn:
            raise OptionError(f"{message.removeprefix('argument ')}; see xtoken distill --help")

    parser: argparse.ArgumentParser = Parser(cast(Any, DistillArguments))
    return parser
