"""What a run has logged, as `xtoken distill` or transformers' Trainer keeps it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from xtoken._files import read_json
from xtoken.errors import FormatError, MissingFileError, OptionError

METRICS_FILE = "metrics.jsonl"
_STATE_FILE = "trainer_state.json"
# Settings that a reader compares.
_SETTINGS = ("loss", "kd_weight", "learning_rate", "batch_size", "seed")
# What the Trainer says of its clock, and once at the end.
_CLOCK = ("runtime", "samples_per_second", "steps_per_second", "train_loss", "total_flos", "epoch")


class LoggedRun(NamedTuple):
    """Records of a run, as `metrics.jsonl` holds them, and the settings that are known."""

    records: list[dict[str, float]]
    settings: dict[str, object]


def read_run(folder: Path) -> LoggedRun:
    """Read a run's `metrics.jsonl`, or the newest `trainer_state.json` of a Trainer's output.

    Args:
        folder: the directory, or either file itself.

    Raises:
        MissingFileError: it holds neither.
        FormatError: a file is damaged.
    """
    file = _log_file(folder)
    if file.suffix == ".jsonl":
        from xtoken.training.metrics_log import read_history

        return LoggedRun(read_history(file), _settings(file.parent / "config.json"))
    return LoggedRun(_trainer_records(file), {})


def run_names(folders: list[Path]) -> list[str]:
    """Of each the last part of its path, and as many before it as tell all apart.

    Raises:
        OptionError: a run is named twice.
    """
    parts = [(folder if folder.is_dir() else folder.parent).resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    whole = ["/".join(part) for part in parts]
    twice = next(name for name in whole if whole.count(name) > 1)
    raise OptionError(f"{twice} is named twice; name each run once")


def _log_file(folder: Path) -> Path:
    if folder.is_file():
        return folder
    for file in (folder / METRICS_FILE, folder / _STATE_FILE):
        if file.is_file():
            return file
    states = list(folder.glob(f"checkpoint-*/{_STATE_FILE}"))
    if not states:
        raise MissingFileError(
            f"{folder} has no {METRICS_FILE} and no {_STATE_FILE}; name a directory that "
            "xtoken distill writes to with --out, or a Trainer's output_dir with a checkpoint"
        )
    return max(states, key=_step)


def _step(state: Path) -> int:
    number = state.parent.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def _trainer_records(file: Path) -> list[dict[str, float]]:
    content = read_json(file, "Trainer's state")
    logs = content.get("log_history") if isinstance(content, dict) else None
    if not isinstance(logs, list):
        raise FormatError(f"{file} has no log_history; name the state of a Trainer")
    records = []
    for log in logs:
        if not isinstance(log, dict) or not isinstance(log.get("step"), int):
            raise FormatError(f"{file} holds {str(log)[:40]!r} in its log_history, expected a step")
        # As the record of `xtoken distill` calls it.
        named = {"total" if name == "loss" else name: value for name, value in log.items()}
        try:
            record = {
                name: float(value)
                for name, value in named.items()
                if isinstance(value, int | float) and not name.endswith(_CLOCK)
            }
        except OverflowError as error:  # an integer of more than 308 digits
            raise FormatError(
                f"{file} holds a number that is too large in its log_history; put the file back"
            ) from error
        if len(record) > 1:
            records.append({n: v if math.isfinite(v) else math.nan for n, v in record.items()})
    return records


def _settings(file: Path) -> dict[str, object]:
    config = read_json(file, "run's settings") if file.is_file() else None
    if not isinstance(config, dict):
        return {}
    return {name.replace("_", " "): config[name] for name in _SETTINGS if name in config}
