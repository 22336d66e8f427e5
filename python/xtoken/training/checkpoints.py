"""The Trainer's own checkpoints in a run's folder: which are whole, and of which run they are."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from xtoken._files import to_disk, write_atomically
from xtoken.errors import ResumeError
from xtoken.training.metrics_log import History, records_until
from xtoken.training.processes import is_main_process, wait_for_all
from xtoken.training.run_identity import RunIdentity

# In the folder of a run from its start; in a checkpoint as the last file of it, so that a
# checkpoint without one was not written to its end.
RUN_FILE = "run.json"
RESULT_FILE = "result.json"
METRICS_FILE = "metrics.jsonl"
LOCK_FILE = ".lock"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was written to its end.

    Args:
        path: its folder, which `Trainer.train(resume_from_checkpoint=...)` and, for the student
            alone, `from_pretrained` read.
        step: optimizer steps done.
        seconds: wall time of the training until then.
        run: what it is a checkpoint of.
    """

    path: Path
    step: int
    seconds: float
    run: RunIdentity


@dataclass(frozen=True)
class Start:
    """Where a sitting begins.

    Args:
        finished: nothing is left to do.
        checkpoint: to go on from; None for the beginning.
        records: the lines of `metrics.jsonl` until there.
    """

    finished: bool
    checkpoint: Checkpoint | None
    records: list[dict[str, float]]


def begin(folder: Path, run: RunIdentity, resume: bool) -> Start:
    """Decide where a sitting begins, and make the folder ready for it; for one process alone.

    Args:
        folder: of the run, exists.
        run: what is to be trained.
        resume: go on with what is in the folder, if it holds anything of a run; else forget it.
    Raises: ResumeError if the folder is of another run, its metrics lack a step, or its checkpoints
        are not ours to remove.
    """
    start = Start(False, None, [])
    if resume:
        start = _find_start(folder, run)
    if not start.finished:
        if start.checkpoint is None:
            forget(folder)
        else:
            _remove_broken(folder)
        write_json(folder / RUN_FILE, dataclasses.asdict(run))
    return start


def saved_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run that was begun in a folder; none where there was none."""
    run = _read_identity(_read_json(folder / RUN_FILE))
    return {} if run is None else run.settings


def _find_start(folder: Path, run: RunIdentity) -> Start:
    found = _read_identity(_read_json(folder / RUN_FILE))
    if found is None and (folder / RUN_FILE).is_file():
        raise ResumeError(
            f"{folder / RUN_FILE} is damaged, or of another release of xtoken; go on with that "
            "release, or start anew (another --out, or --overwrite)"
        )
    if found is not None:
        found.require(run, folder)
        if (folder / RESULT_FILE).is_file():
            return Start(True, None, [])
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        return Start(False, None, [])
    checkpoint.run.require(run, checkpoint.path)
    records = records_until(folder / METRICS_FILE, checkpoint.step)
    known = [int(record["step"]) for record in records if "ce" in record]
    if known != list(range(1, checkpoint.step + 1)):
        missing = min(set(range(1, checkpoint.step + 1)) - set(known), default="no step")
        raise ResumeError(
            f"{folder / METRICS_FILE} lacks step {missing} of the {checkpoint.step} that "
            f"{checkpoint.path.name} has behind it; put the file back, or start anew "
            "(another --out, or --overwrite)"
        )
    return Start(False, checkpoint, records)


def forget(folder: Path) -> None:
    """Remove the checkpoints of a folder and what says that a run was finished there.

    Raises: ResumeError if the folder has checkpoints, and no run of ours was begun in it.
    """
    folders = _checkpoint_folders(folder)
    if folders and not has_run(folder):
        raise ResumeError(
            f"{folders[max(folders)]} is no checkpoint of a run of xtoken; pass another directory, "
            "or remove it"
        )
    for name in (RESULT_FILE, RUN_FILE):
        (folder / name).unlink(missing_ok=True)
    for path in folders.values():
        shutil.rmtree(path)


def _remove_broken(folder: Path) -> None:
    for step, path in _checkpoint_folders(folder).items():
        if _read_checkpoint(path, step) is None:
            shutil.rmtree(path)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint of a folder that is whole, if there is one."""
    for step, path in sorted(_checkpoint_folders(folder).items(), reverse=True):
        checkpoint = _read_checkpoint(path, step)
        if checkpoint is not None:
            return checkpoint
    return None


def has_run(folder: Path) -> bool:
    """Return whether a run was begun in a folder."""
    return (folder / RUN_FILE).is_file() or newest_checkpoint(folder) is not None


def _checkpoint_folders(folder: Path) -> dict[int, Path]:
    matches = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("*"))
    return {int(match[1]): path for match, path in matches if match and path.is_dir()}


def _read_checkpoint(path: Path, step: int) -> Checkpoint | None:
    mark = _read_json(path / RUN_FILE)
    run = _read_identity(mark.get("run"))
    if run is None or mark.get("step") != step or mark.get("files") != _sizes(path):
        return None
    return Checkpoint(path, step, float(mark["seconds"]), run)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_identity(values: Any) -> RunIdentity | None:
    names = {field.name for field in dataclasses.fields(RunIdentity)}
    if not isinstance(values, dict) or set(values) != names:
        return None
    return RunIdentity(**values)


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in files
        if path.name != RUN_FILE
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write an object as a file that is there whole or not at all."""
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


class MarkCheckpoints(TrainerCallback):
    """Marks a checkpoint as whole once all processes have written their part of it.

    Args:
        folder: of the run.
        run: what the checkpoints are of.
        history: its lines are on the disk before the checkpoint counts.
        seconds: gives the wall time of the training until now.
    """

    def __init__(
        self, folder: Path, run: RunIdentity, history: History, seconds: Callable[[], float]
    ) -> None:
        self.folder = folder
        self.run = run
        self.history = history
        self.seconds = seconds

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write the mark, after all else is on the disk."""
        wait_for_all()
        if not is_main_process():
            return
        path = self.folder / f"checkpoint-{state.global_step}"
        sizes = _sizes(path)
        for name in sizes:
            to_disk(path / name)
        self.history.to_disk()
        mark = {
            "run": dataclasses.asdict(self.run),
            "step": state.global_step,
            "seconds": self.seconds(),
            "files": sizes,
        }
        write_json(path / RUN_FILE, mark)
