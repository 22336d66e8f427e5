"""The files of a run: their names, how they are read, and the checksums of a finished one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xtoken._files import json_text, sha256_of, write_text
from xtoken.errors import ResumeError, XTokenError

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
ANEW = "start anew (another --out, or --overwrite)"


@contextlib.contextmanager
def reads(path: Path) -> Iterator[None]:
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
            f"the command when it can be, or {ANEW}"
        ) from error


def mode_of(path: Path) -> int:
    """What lies there, as `stat` has it; 0 for nothing.

    Not by `is_file` and the like, for which nothing lies where it cannot be told.
    """
    with reads(path):
        try:
            return path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return 0


def exists(path: Path) -> bool:
    """Whether anything lies there; as `mode_of`."""
    return mode_of(path) != 0


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a file of JSON, an empty one where there is none; None without a file."""
    with reads(path):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (IsADirectoryError, ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}


def sizes_of(folder: Path) -> dict[str, int]:
    """Of each file of a checkpoint, but for the mark."""
    sizes = {}
    for place, _, names in os.walk(folder, onerror=_refuse_unread):
        for path in (Path(place) / name for name in names if name != RUN_FILE):
            if stat.S_ISREG(mode_of(path)):
                with reads(path):
                    sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    return dict(sorted(sizes.items()))


def _refuse_unread(error: OSError) -> None:
    with reads(Path(error.filename)):
        raise error


def checksums_of(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint, but for the mark."""
    sums = {}
    for name in sizes_of(folder):
        with reads(folder / name):
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
    if not stat.S_ISREG(mode_of(path)):
        return None
    with reads(path):
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
        with reads(path):
            same = stat.S_ISREG(mode_of(path)) and sums.get(name) == sha256_of(path)
        if not same:
            raise ResumeError(
                f"{path} is missing or was altered: its checksum is not that of {SUMS_FILE}; put "
                f"the file back, or {ANEW}"
            )
