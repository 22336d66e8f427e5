"""The Trainer's own checkpoints in a run's folder: which are whole, and of which run they are."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from xtoken._files import (
    json_text,
    path_to_read,
    sealed,
    sha256_of,
    to_disk,
    unsealed,
    write_json,
    write_text,
)
from xtoken.errors import DamagedCheckpointWarning, ResumeError, XTokenError
from xtoken.training.metrics_log import History, records_until
from xtoken.training.processes import on_first_process, wait_for_all
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
_MARK_KEYS = {"run", "step", "seconds", "metrics", "sizes", "sha256"}
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Not by a name that the Trainer takes for a checkpoint's, which it would count and remove.
_SET_ASIDE = re.compile(r"damaged-checkpoint-\d+(-\d+)?")
_ANEW = "start anew (another --out, or --overwrite)"


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
    run = _read_identity(_read_json(folder / RUN_FILE))
    return {} if run is None else run.settings


def _find_start(folder: Path, run: RunIdentity) -> Start:
    values = _read_json(folder / RUN_FILE)
    if values is not None:
        begun = _read_identity(values)
        if begun is None:
            raise ResumeError(
                f"{folder / RUN_FILE} is damaged, or of another release of xtoken; resume with "
                f"that release, or {_ANEW}"
            )
        begun.require(run, folder)
        if _exists(folder / RESULT_FILE):
            return Start(finished=True)
    found = find_checkpoints(folder)
    checkpoint = found.whole
    if checkpoint is None:
        _refuse_damaged(folder, found.damaged)
        return Start(found=found)
    checkpoint.run.require(run, checkpoint.path)
    with _reads(folder / METRICS_FILE):
        records = records_until(folder / METRICS_FILE, checkpoint.step)
    known = [int(record["step"]) for record in records if "ce" in record]
    if known != list(range(1, checkpoint.step + 1)):
        missing = min(set(range(1, checkpoint.step + 1)) - set(known), default="no step")
        raise ResumeError(
            f"{folder / METRICS_FILE} lacks step {missing} of the {checkpoint.step} that "
            f"{checkpoint.path.name} has behind it; put the file back, or {_ANEW}"
        )
    with _reads(folder / METRICS_FILE):
        _check_metrics(folder, checkpoint)
    return Start(found=found, records=records)


def _refuse_damaged(folder: Path, damaged: list[Damaged]) -> None:
    """Refuse to begin anew where there are checkpoints that somebody may still save."""
    if damaged:
        reasons = "; ".join(f"{each.path.name}: {each.reason}" for each in damaged)
        raise ResumeError(
            f"{folder} has no whole checkpoint to resume from ({reasons}), and nothing was "
            "removed; put the files back, remove the folders of these checkpoints to begin at "
            f"step 0, or {_ANEW}"
        )


def _check_metrics(folder: Path, checkpoint: Checkpoint) -> None:
    """Refuse metrics that are not what they were; which steps they lack is told by the caller."""
    path, then = folder / METRICS_FILE, checkpoint.metrics
    if path.is_file() and path.stat().st_size >= then["bytes"]:
        if _prefix(path, then["bytes"]) != then:
            raise ResumeError(
                f"{path} was altered before the end of {checkpoint.path.name}: its checksum "
                f"differs; put the file back, or {_ANEW}"
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
    while _exists(path.parent / name):
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
        if (_read_json(path / "trainer_state.json") or {}).get("global_step") == step:
            return str(path)
    return None


def has_run(folder: Path) -> bool:
    """Return whether a run was begun in a folder."""
    if _exists(folder / RUN_FILE):
        return True
    checkpoints = [*_checkpoint_folders(folder).values(), *_folders(folder, _SET_ASIDE)]
    marks = (_read_json(path / RUN_FILE) for path in checkpoints)
    return any(_read_identity((unsealed(mark) or {}).get("run")) for mark in marks)


def _checkpoint_folders(folder: Path) -> dict[int, Path]:
    return {int(path.name.partition("-")[2]): path for path in _folders(folder, _CHECKPOINT)}


def _folders(folder: Path, names: re.Pattern[str]) -> list[Path]:
    """The folders in a folder that are called so; none where that is none itself.

    Not by `glob`, for which a folder that cannot be read is empty.
    """
    with _reads(folder):
        try:
            found = sorted(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
    paths = [folder / name for name in found if names.fullmatch(name)]
    return [path for path in paths if stat.S_ISDIR(_mode(path))]


def _read_checkpoint(path: Path, step: int, *, sums: bool) -> Checkpoint | Damaged | None:
    """A checkpoint, or what is wrong with it; None where it was not written to its end.

    Args:
        sums: compare the checksums, too.
    """
    written = _read_json(path / RUN_FILE)
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
    reason = _difference(mark["sizes"], _sizes(path))
    if reason is None and sums:
        reason = _difference(mark["sha256"], _checksums(path))
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


@contextlib.contextmanager
def _reads(path: Path) -> Iterator[None]:
    """Tell of what is there and cannot be read: it must not count as absent, which is removed.

    Raises:
        ResumeError: the block raised an error of the system.
    """
    try:
        yield
    except XTokenError:
        raise
    except OSError as error:
        raise ResumeError(
            f"{path} cannot be read ({error.strerror or error}), and nothing was removed; repeat "
            f"the command when it can be, or {_ANEW}"
        ) from error


def _mode(path: Path) -> int:
    """What lies there, as `stat` has it; 0 for nothing.

    Not by `is_file` and the like, for which nothing lies where it cannot be told.
    """
    with _reads(path):
        try:
            return path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return 0


def _exists(path: Path) -> bool:
    return _mode(path) != 0


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file of JSON, an empty one where there is none; None without a file."""
    with _reads(path):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (IsADirectoryError, ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}


def _read_identity(values: Any) -> RunIdentity | None:
    names = {field.name for field in dataclasses.fields(RunIdentity)}
    if not isinstance(values, dict) or set(values) != names:
        return None
    return RunIdentity(**values)


def _sizes(folder: Path) -> dict[str, int]:
    """Of each file of a checkpoint, but for the mark."""
    sizes = {}
    for place, _, names in os.walk(folder, onerror=_refuse_unread):
        for path in (Path(place) / name for name in names if name != RUN_FILE):
            if stat.S_ISREG(_mode(path)):
                with _reads(path):
                    sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    return dict(sorted(sizes.items()))


def _refuse_unread(error: OSError) -> None:
    with _reads(Path(error.filename)):
        raise error


def _checksums(folder: Path) -> dict[str, str]:
    sums = {}
    for name in _sizes(folder):
        with _reads(folder / name):
            sums[name] = sha256_of(folder / name)
    return sums


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
    if not stat.S_ISREG(_mode(path)):
        return None
    with _reads(path):
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
        with _reads(path):
            same = stat.S_ISREG(_mode(path)) and sums.get(name) == sha256_of(path)
        if not same:
            raise ResumeError(
                f"{path} is missing or was altered: its checksum is not that of {SUMS_FILE}; put "
                f"the file back, or {_ANEW}"
            )


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
        sizes = _sizes(path)
        for name in sizes:
            to_disk(path / name)
        self.history.to_disk()
        mark = {
            "run": dataclasses.asdict(self.run),
            "step": step,
            "seconds": self.seconds(),
            "metrics": _prefix(self.folder / METRICS_FILE),
            "sizes": sizes,
            "sha256": _checksums(path),
        }
        write_text(path / RUN_FILE, sealed(mark))
