"""The Trainer's own checkpoints in a run's folder: which are whole, and of which run they are."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import shutil
import stat
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from xtoken._files import (
    path_to_read,
    sealed,
    to_disk,
    unsealed,
    write_json,
    write_text,
)
from xtoken.errors import DamagedCheckpointWarning, ResumeError
from xtoken.training.metrics_log import History, records_until
from xtoken.training.processes import on_first_process, wait_for_all
from xtoken.training.run_files import (
    ANEW,
    METRICS_FILE,
    RESULT_FILE,
    RUN_FILE,
    SUMS_FILE,
    checksums_of,
    exists,
    mode_of,
    read_object,
    reads,
    sizes_of,
)
from xtoken.training.run_identity import RunIdentity

# Checkpoints on the disk: the newest, to go on from, and the one before, until the newest is known
# to be whole.
KEPT = 2
_MARK_KEYS = {"run", "step", "seconds", "metrics", "sizes", "sha256"}
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Not by a name that the Trainer takes for a checkpoint's, which it would count and remove.
_SET_ASIDE = re.compile(r"damaged-checkpoint-\d+(-\d+)?")


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
class Damaged:
    """A checkpoint that was written to its end, and is not what it was then.

    Args:
        path: its folder.
        reason: a file of it, and what is wrong with that.
    """

    path: Path
    reason: str


@dataclass(frozen=True)
class Found:
    """The checkpoints of a folder.

    Args:
        whole: the newest that is whole.
        damaged: newest first; of those older than `whole` the sizes alone are looked at.
        unfinished: the folders of those that were not written to their end.
    """

    whole: Checkpoint | None = None
    damaged: list[Damaged] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Start:
    """Where a session begins.

    Args:
        finished: nothing is left to do.
        found: its whole checkpoint is to go on from; without one, from the beginning.
        records: the lines of `metrics.jsonl` until there.
    """

    finished: bool = False
    found: Found = field(default_factory=Found)
    records: list[dict[str, float]] = field(default_factory=list)

    @property
    def checkpoint(self) -> Checkpoint | None:
        """To go on from; None for the beginning."""
        return self.found.whole


def begin(folder: Path, run: RunIdentity, resume: bool) -> Start:
    """Decide where a session begins, and make the folder ready for it; for one process alone.

    Args:
        folder: of the run, exists.
        run: what is to be trained.
        resume: resume what is in the folder, if it holds anything of a run; else clear it.
    A checkpoint that is damaged is set aside, and said, where an older one is whole.

    Raises: ResumeError if the folder is of another run, its metrics lack a step, its checkpoints
        are not ours to remove or none is whole and some are damaged, or if a file cannot be read;
        all is then as it was.
    """
    start = _find_start(folder, run) if resume else Start()
    if start.finished:
        return start
    if not resume:
        clear_run(folder)
    elif start.checkpoint is None:
        _clear(folder, start.found.unfinished)
    else:
        _remove(start.found.unfinished)
        for each in start.found.damaged:
            _set_aside(each, start.checkpoint)
    write_json(folder / RUN_FILE, dataclasses.asdict(run))
    return start


def saved_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run that was begun in a folder; none where there was none."""
    run = _read_identity(read_object(folder / RUN_FILE))
    return {} if run is None else run.settings


def _find_start(folder: Path, run: RunIdentity) -> Start:
    values = read_object(folder / RUN_FILE)
    if values is not None:
        begun = _read_identity(values)
        if begun is None:
            raise ResumeError(
                f"{folder / RUN_FILE} is damaged, or of another release of xtoken; resume with "
                f"that release, or {ANEW}"
            )
        begun.require(run, folder)
        if exists(folder / RESULT_FILE):
            return Start(finished=True)
    found = find_checkpoints(folder)
    checkpoint = found.whole
    if checkpoint is None:
        _refuse_damaged(folder, found.damaged)
        return Start(found=found)
    checkpoint.run.require(run, checkpoint.path)
    with reads(folder / METRICS_FILE):
        records = records_until(folder / METRICS_FILE, checkpoint.step)
    known = [int(record["step"]) for record in records if "ce" in record]
    if known != list(range(1, checkpoint.step + 1)):
        missing = min(set(range(1, checkpoint.step + 1)) - set(known), default="no step")
        raise ResumeError(
            f"{folder / METRICS_FILE} lacks step {missing} of the {checkpoint.step} that "
            f"{checkpoint.path.name} has behind it; put the file back, or {ANEW}"
        )
    with reads(folder / METRICS_FILE):
        _check_metrics(folder, checkpoint)
    return Start(found=found, records=records)


def _refuse_damaged(folder: Path, damaged: list[Damaged]) -> None:
    """Refuse to begin anew where there are checkpoints that somebody may still save."""
    if damaged:
        reasons = "; ".join(f"{each.path.name}: {each.reason}" for each in damaged)
        raise ResumeError(
            f"{folder} has no whole checkpoint to resume from ({reasons}), and nothing was "
            "removed; put the files back, remove the folders of these checkpoints to begin at "
            f"step 0, or {ANEW}"
        )


def _check_metrics(folder: Path, checkpoint: Checkpoint) -> None:
    """Refuse metrics that are not what they were; which steps they lack is told by the caller."""
    path, then = folder / METRICS_FILE, checkpoint.metrics
    if path.is_file() and path.stat().st_size >= then["bytes"]:
        if _prefix(path, then["bytes"]) != then:
            raise ResumeError(
                f"{path} was altered before the end of {checkpoint.path.name}: its checksum "
                f"differs; put the file back, or {ANEW}"
            )


def _prefix(path: Path, length: int | None = None) -> dict[str, Any]:
    """The length and SHA-256 of a file's first bytes, or of all of them."""
    content = path.read_bytes()[:length] if path.is_file() else b""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def clear_run(folder: Path) -> None:
    """Remove the checkpoints of a folder and what says that a run was finished there.

    Raises: ResumeError if the folder has checkpoints, and no run of ours was begun in it.
    """
    _clear(folder, [*_checkpoint_folders(folder).values(), *_folders(folder, _SET_ASIDE)])


def _clear(folder: Path, checkpoints: list[Path]) -> None:
    if checkpoints and not has_run(folder):
        newest = max(_checkpoint_folders(folder).items(), default=(0, checkpoints[0]))[1]
        raise ResumeError(
            f"{newest} is no checkpoint of a run of xtoken; pass another directory, or remove it"
        )
    for name in (RESULT_FILE, SUMS_FILE):
        (folder / name).unlink(missing_ok=True)
    _remove(checkpoints)
    # Last: it says that what an interruption leaves is ours.
    (folder / RUN_FILE).unlink(missing_ok=True)


def _remove(checkpoints: Iterable[Path]) -> None:
    for path in checkpoints:
        # First: half of a checkpoint is an unfinished one, and no damaged one.
        with contextlib.suppress(IsADirectoryError):
            (path / RUN_FILE).unlink(missing_ok=True)
        shutil.rmtree(path)


def _set_aside(damaged: Damaged, taken: Checkpoint) -> None:
    """Keep a damaged checkpoint where nothing writes into it or removes it."""
    path = damaged.path
    name, number = f"damaged-{path.name}", 1
    while exists(path.parent / name):
        number += 1
        name = f"damaged-{path.name}-{number}"
    path.rename(path.parent / name)
    warnings.warn(
        f"{path} is damaged ({damaged.reason}): it is passed over, and kept as {name}; the run "
        f"goes on from {taken.path.name}",
        DamagedCheckpointWarning,
        stacklevel=4,
    )


def find_checkpoints(folder: Path) -> Found:
    """What checkpoints a folder has, and in which state they are.

    Raises: ResumeError if a file of one cannot be read.
    """
    whole: Checkpoint | None = None
    damaged, unfinished = [], []
    for step, path in sorted(_checkpoint_folders(folder).items(), reverse=True):
        found = _read_checkpoint(path, step, sums=whole is None)
        if found is None:
            unfinished.append(path)
        elif isinstance(found, Damaged):
            damaged.append(found)
        else:
            whole = whole or found
    return Found(whole, damaged, unfinished)


def last_whole_checkpoint(folder: Path | str) -> str | None:
    """The newest checkpoint of a Trainer that it wrote to its end, to resume from.

    A Trainer that was killed leaves a checkpoint whose last file, the state, is missing or cut off,
    and `resume_from_checkpoint=True` would take it.

    Args:
        folder: the `output_dir` of the Trainer.

    Returns: its path, for `train(resume_from_checkpoint=...)`; None where there is none.
    Raises:
        ResumeError: a state is there and cannot be read.
    """
    place = path_to_read("folder", folder, "pass the output_dir of a Trainer")
    for step, path in sorted(_checkpoint_folders(place).items(), reverse=True):
        if (read_object(path / "trainer_state.json") or {}).get("global_step") == step:
            return str(path)
    return None


def has_run(folder: Path) -> bool:
    """Return whether a run was begun in a folder."""
    if exists(folder / RUN_FILE):
        return True
    checkpoints = [*_checkpoint_folders(folder).values(), *_folders(folder, _SET_ASIDE)]
    marks = (read_object(path / RUN_FILE) for path in checkpoints)
    return any(_read_identity((unsealed(mark) or {}).get("run")) for mark in marks)


def _checkpoint_folders(folder: Path) -> dict[int, Path]:
    return {int(path.name.partition("-")[2]): path for path in _folders(folder, _CHECKPOINT)}


def _folders(folder: Path, names: re.Pattern[str]) -> list[Path]:
    """The folders in a folder that are called so; none where that is none itself.

    Not by `glob`, for which a folder that cannot be read is empty.
    """
    with reads(folder):
        try:
            found = sorted(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
    paths = [folder / name for name in found if names.fullmatch(name)]
    return [path for path in paths if stat.S_ISDIR(mode_of(path))]


def _read_checkpoint(path: Path, step: int, *, sums: bool) -> Checkpoint | Damaged | None:
    """A checkpoint, or what is wrong with it; None where it was not written to its end.

    Args:
        sums: compare the checksums, too.
    """
    written = read_object(path / RUN_FILE)
    if written is None:
        return None
    mark = unsealed(written)
    if mark is None:
        return Damaged(path, f"{RUN_FILE} was altered")
    run = _read_identity(mark.get("run"))
    if run is None or not set(mark) >= _MARK_KEYS:
        return Damaged(path, f"{RUN_FILE} is of another release of xtoken")
    if mark["step"] != step:
        return Damaged(path, f"{RUN_FILE} is that of step {mark['step']}")
    # Sizes first, as they cost nothing.
    reason = _difference(mark["sizes"], sizes_of(path))
    if reason is None and sums:
        reason = _difference(mark["sha256"], checksums_of(path))
    if reason is not None:
        return Damaged(path, reason)
    return Checkpoint(path, step, float(mark["seconds"]), run, mark["metrics"])


def _difference(then: Mapping[str, object], now: Mapping[str, object]) -> str | None:
    """The first file of which something is not as it was."""
    for name in sorted({*then, *now}):
        if name not in now:
            return f"{name} is missing"
        if name not in then:
            return f"{name} is not of it"
        if then[name] != now[name]:
            return f"{name} was altered"
    return None


def _read_identity(values: Any) -> RunIdentity | None:
    names = {field.name for field in dataclasses.fields(RunIdentity)}
    if not isinstance(values, dict) or set(values) != names:
        return None
    return RunIdentity(**values)


class MarkCheckpoints(TrainerCallback):
    """Marks a checkpoint as whole once all processes have written their part of it.

    Args:
        folder: of the run.
        run: what the checkpoints are of.
        history: its lines are on the disk before the checkpoint counts.
        seconds: gives the wall time of the training until now.
        newest: step of the newest checkpoint that is there before, 0 for none.

    Attributes:
        newest: step of the newest one that is whole, the same in all processes.
    """

    def __init__(
        self,
        folder: Path,
        run: RunIdentity,
        history: History,
        seconds: Callable[[], float],
        newest: int = 0,
    ) -> None:
        self.folder = folder
        self.run = run
        self.history = history
        self.seconds = seconds
        self.newest = newest

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write the mark, after all else is on the disk."""
        wait_for_all()
        on_first_process(lambda: self._mark(state.global_step))
        self.newest = state.global_step

    def _mark(self, step: int) -> None:
        path = self.folder / f"checkpoint-{step}"
        sizes = sizes_of(path)
        for name in sizes:
            to_disk(path / name)
        self.history.to_disk()
        mark = {
            "run": dataclasses.asdict(self.run),
            "step": step,
            "seconds": self.seconds(),
            "metrics": _prefix(self.folder / METRICS_FILE),
            "sizes": sizes,
            "sha256": checksums_of(path),
        }
        write_text(path / RUN_FILE, sealed(mark))
        # Here and not by the Trainer, of whose removal a kill leaves what looks damaged.
        older = sorted(_checkpoint_folders(self.folder).items(), reverse=True)[KEPT:]
        _remove(each for _, each in older)
