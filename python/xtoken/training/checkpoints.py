"""The Trainer's own checkpoints in a run's folder: which are whole, and of which run they are."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from xtoken._files import (
    json_text,
    path_to_read,
    read_json,
    sealed,
    sha256_of,
    to_disk,
    unsealed,
    write_json,
    write_text,
)
from xtoken.errors import FormatError, ResumeError
from xtoken.training.metrics_log import History, records_until
from xtoken.training.processes import is_main_process, wait_for_all
from xtoken.training.run_identity import RunIdentity

# In the folder of a run from its start; in a checkpoint as the last file of it, so that a
# checkpoint without one was not written to its end.
RUN_FILE = "run.json"
RESULT_FILE = "result.json"
METRICS_FILE = "metrics.jsonl"
SUMS_FILE = "SHA256SUMS"
# What the result of a run consists of, besides `result.json`.
_WRITTEN = ("student", "projection.safetensors", "config.json", METRICS_FILE)
CURVES_FILE = "curves.png"
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
        metrics: what `metrics.jsonl` was as far as it was written, see `_prefix`.
    """

    path: Path
    step: int
    seconds: float
    run: RunIdentity
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Start:
    """Where a session begins.

    Args:
        finished: nothing is left to do.
        checkpoint: to go on from; None for the beginning.
        records: the lines of `metrics.jsonl` until there.
    """

    finished: bool
    checkpoint: Checkpoint | None
    records: list[dict[str, float]]


def begin(folder: Path, run: RunIdentity, resume: bool) -> Start:
    """Decide where a session begins, and make the folder ready for it; for one process alone.

    Args:
        folder: of the run, exists.
        run: what is to be trained.
        resume: resume what is in the folder, if it holds anything of a run; else clear it.
    Raises: ResumeError if the folder is of another run, its metrics lack a step, or its checkpoints
        are not ours to remove.
    """
    start = Start(False, None, [])
    if resume:
        start = _find_start(folder, run)
    if not start.finished:
        if start.checkpoint is None:
            clear_run(folder)
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
            f"{folder / RUN_FILE} is damaged, or of another release of xtoken; resume with that "
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
    _check_metrics(folder, checkpoint)
    return Start(False, checkpoint, records)


def _check_metrics(folder: Path, checkpoint: Checkpoint) -> None:
    """Refuse metrics that are not what they were; which steps they lack is told by the caller."""
    path, then = folder / METRICS_FILE, checkpoint.metrics
    if path.is_file() and path.stat().st_size >= then["bytes"]:
        if _prefix(path, then["bytes"]) != then:
            raise ResumeError(
                f"{path} was altered before the end of {checkpoint.path.name}: its checksum "
                "differs; put the file back, or start anew (another --out, or --overwrite)"
            )


def _prefix(path: Path, length: int | None = None) -> dict[str, Any]:
    """The length and SHA-256 of a file's first bytes, or of all of them."""
    content = path.read_bytes()[:length] if path.is_file() else b""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def clear_run(folder: Path) -> None:
    """Remove the checkpoints of a folder and what says that a run was finished there.

    Raises: ResumeError if the folder has checkpoints, and no run of ours was begun in it.
    """
    folders = _checkpoint_folders(folder)
    if folders and not has_run(folder):
        raise ResumeError(
            f"{folders[max(folders)]} is no checkpoint of a run of xtoken; pass another directory, "
            "or remove it"
        )
    for name in (RESULT_FILE, SUMS_FILE, RUN_FILE):
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


def last_whole_checkpoint(folder: Path | str) -> str | None:
    """The newest checkpoint of a Trainer that it wrote to its end, to resume from.

    A Trainer that was killed leaves a checkpoint whose last file, the state, is missing or cut off,
    and `resume_from_checkpoint=True` would take it.

    Args:
        folder: the `output_dir` of the Trainer.

    Returns: its path, for `train(resume_from_checkpoint=...)`; None where there is none.
    """
    place = path_to_read("folder", folder, "pass the output_dir of a Trainer")
    for step, path in sorted(_checkpoint_folders(place).items(), reverse=True):
        with contextlib.suppress(FormatError, OSError):
            state = read_json(path / "trainer_state.json", "state of a Trainer")
            if isinstance(state, dict) and state.get("global_step") == step:
                return str(path)
    return None


def has_run(folder: Path) -> bool:
    """Return whether a run was begun in a folder."""
    return (folder / RUN_FILE).is_file() or newest_checkpoint(folder) is not None


def _checkpoint_folders(folder: Path) -> dict[int, Path]:
    matches = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("*"))
    return {int(match[1]): path for match, path in matches if match and path.is_dir()}


def _read_checkpoint(path: Path, step: int) -> Checkpoint | None:
    mark = unsealed(_read_json(path / RUN_FILE)) or {}
    run = _read_identity(mark.get("run"))
    # Sizes first, as they cost nothing.
    if run is None or mark.get("step") != step or mark.get("sizes") != _sizes(path):
        return None
    if mark.get("sha256") != _checksums(path):
        return None
    return Checkpoint(path, step, float(mark["seconds"]), run, mark["metrics"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
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


def _checksums(folder: Path) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in _sizes(folder)}


def write_result(folder: Path, values: dict[str, Any]) -> None:
    """Write the checksums of what a run left behind and, last, that it is finished."""
    text = json_text(values)
    sums = {RESULT_FILE: hashlib.sha256(text.encode()).hexdigest()}
    others = sorted(path.name for path in folder.glob("projection-*.safetensors"))
    if (folder / CURVES_FILE).exists():
        others.append(CURVES_FILE)
    for name in (*_WRITTEN, *others):
        inside = [path for path in (folder / name).rglob("*") if path.is_file()]
        for path in inside or [folder / name]:
            sums[path.relative_to(folder).as_posix()] = sha256_of(path)
    _write_sums(folder, sums)
    write_text(folder / RESULT_FILE, text)


def add_sum(folder: Path, name: str) -> None:
    """Add to the checksums of a finished run that of a file which was written after it."""
    sums = _read_sums(folder)
    if sums is not None:
        _write_sums(folder, sums | {name: sha256_of(folder / name)})


def _write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    lines = (f"{checksum}  {name}\n" for name, checksum in sorted(sums.items()))
    write_text(folder / SUMS_FILE, "".join(lines))


def _read_sums(folder: Path) -> dict[str, str] | None:
    """The checksums of a run by file; None of a run of a release that wrote none."""
    path = folder / SUMS_FILE
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}


def check_sums(folder: Path) -> None:
    """Refuse a finished run of which a file is missing or not as it was written; its picture may be
    missing, as it is drawn anew.

    Raises: ResumeError that names the file.
    """
    sums = _read_sums(folder)
    if sums is None:
        return
    for name in (RESULT_FILE, METRICS_FILE, *sums):
        path = folder / name
        if name == CURVES_FILE and not path.exists():
            continue
        if not path.is_file() or sums.get(name) != sha256_of(path):
            raise ResumeError(
                f"{path} is missing or was altered: its checksum is not that of {SUMS_FILE}; put "
                "the file back, or start anew (another --out, or --overwrite)"
            )


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
            "metrics": _prefix(self.folder / METRICS_FILE),
            "sizes": sizes,
            "sha256": _checksums(path),
        }
        write_text(path / RUN_FILE, sealed(mark))
