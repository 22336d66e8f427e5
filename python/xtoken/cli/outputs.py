"""Where a command writes to, looked at before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

from xtoken._locks import check_locks
from xtoken.errors import OptionError


def check_out(out: Path, option: str = "--out") -> None:
    """Refuse a place that no file can be written to, before any work is done.

    Raises:
        OptionError: it is a directory, or its directory is not there or may not be written to.
    """
    if out.is_dir():
        raise OptionError(f"{option} {out} is a directory; name a file in it")
    if not out.parent.is_dir():
        raise OptionError(f"{option} {out}: there is no directory {out.parent}; make it first")
    if out.is_file() or not out.exists():  # a device or a pipe is written as it is
        _check_writable(out, out.parent, option)


def check_out_folder(out: Path, option: str = "--out", *, locked: bool = False) -> None:
    """Refuse a folder that cannot be made or written into, before any work is done.

    Args:
        locked: whether the command locks it.

    Raises:
        OptionError: it or one above it is a file, or may not be written to.
        NoLockError: its file system has no locks.
    """
    existing = nearest(out)
    if not existing.is_dir():
        where = "" if existing == out else f": {existing}"
        raise OptionError(
            f"{option} {out}{where} is a file, expected a directory; pass another path"
        )
    _check_writable(out, existing, option)
    if locked:
        check_locks(existing)


def check_empty(out: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        OptionError: names it.
    """
    if out.is_dir() and any(out.iterdir()):
        raise OptionError(f"--out {out} is not empty; pass a new directory")


def nearest(path: Path) -> Path:
    """What is there of a path: it, or the nearest above it."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def _check_writable(out: Path, folder: Path, option: str) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OptionError(
            f"{option} {out}: nothing may be written to {folder}; pass a path that you may write to"
        )
