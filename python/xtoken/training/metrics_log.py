"""The record of a run: one JSON object a line, written as the run goes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from xtoken._files import parse_json, path_to_read, to_disk, write_atomically, writes
from xtoken.errors import FormatError, MissingFileError


class History:
    """Records of a run, kept in memory and appended to a file.

    Args:
        path: a line is written and flushed with each record. None keeps no file.
        records: of an earlier session; the file is replaced by these, and emptied by default.
    """

    def __init__(
        self, path: Path | str | None = None, records: Sequence[dict[str, float]] = ()
    ) -> None:
        self.path = None if path is None else Path(path)
        self.records: list[dict[str, float]] = list(records)
        if self.path is not None:
            text = "".join(map(_line, self.records))
            write_atomically(self.path, lambda file: file.write(text.encode()))

    def add(self, record: dict[str, float]) -> None:
        """Append a record; a value that is not finite is written as null, as JSON has no NaN."""
        self.records.append(record)
        if self.path is None:
            return
        with writes(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))

    def to_disk(self) -> None:
        """Return once the file would survive a crash of the machine."""
        if self.path is not None:
            to_disk(self.path)


class KeepHistory(TrainerCallback):
    """Adds what a trainer logs to a history: a record per step or window, one per evaluation.

    Args:
        history: receives the records.
        on_step: called with the number of steps done, after each record of steps.
    """

    def __init__(self, history: History, on_step: Callable[[int], None] | None = None) -> None:
        self.history = history
        self.on_step = on_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add a record, unless it is the Trainer's summary of its time."""
        logs = dict(logs or {})
        logs.pop("epoch", None)
        if "loss" in logs:
            record = {"step": state.global_step, "total": logs.pop("loss"), **logs}
            self.history.add(record)
            if self.on_step is not None:
                self.on_step(state.global_step)
        elif any(name.startswith("eval_") for name in logs):
            self.history.add({"step": state.global_step, **logs})


def _line(record: dict[str, float]) -> str:
    finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
    return json.dumps(finite) + "\n"


def read_history(path: Path | str) -> list[dict[str, float]]:
    """Read the records of a file that `History` wrote; null becomes NaN.

    A last line without its end, as of a run that is being written or was killed, is left out.

    Raises:
        MissingFileError: there is no such file.
        FormatError: a line is no record.
    """
    place = path_to_read("metrics file", path, "pass the metrics.jsonl of a run")
    if not place.is_file():
        raise MissingFileError(
            f"metrics file {path} does not exist; pass the metrics.jsonl of a run"
        )
    lines = place.read_bytes().split(b"\n")[:-1]
    return [_record(line, f"{path} line {number}") for number, line in enumerate(lines, 1)]


def _record(line: bytes, where: str) -> dict[str, float]:
    try:
        found = parse_json(line)
    except FormatError as error:
        raise FormatError(f"{where} {error}") from error
    fields = found if isinstance(found, dict) else {}
    numbers = {
        name: math.nan if value is None else value
        for name, value in fields.items()
        if value is None or isinstance(value, int | float)
    }
    try:
        whole = math.isfinite(numbers.get("step", math.nan))
        _ = [float(value) for value in numbers.values()]
    except OverflowError:  # an integer of more than 308 digits
        whole = False
    if not whole or len(numbers) != len(fields):
        raise FormatError(f"{where} is no record of a run: {line[:40]!r}; put the file back")
    return numbers


def records_until(path: Path | str, step: int) -> list[dict[str, float]]:
    """Return the records of a file up to a step, included; none where there is no file."""
    if not Path(path).is_file():
        return []
    return [record for record in read_history(path) if record["step"] <= step]
