"""Where a command writes to, looked at before any work is done."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
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


# What models, tokenizers, stores and texts lie in; a page or scores beside them replace nothing.
_READ = re.compile(
    r"(.*config|tokenizer|vocab|added_tokens|special_tokens_map|.*\.index|store|pair)\.json"
    r"|.*\.(safetensors|bin|gguf|pt|model|jinja|jsonl|parquet|csv|txt)"
)


def check_apart(
    out: Path, sources: Iterable[tuple[str, object]], option: str = "--out", *, folder: bool = False
) -> None:
    """Refuse to write over what is read.

    Args:
        sources: options with what each names: a path, the name of a model or dataset on the hub,
            which is no path here, or None.
        folder: whether `out` is a folder, which must not lie over a source either.

    Raises:
        OptionError: names the option whose source would be lost.
    """
    for name, source in sources:
        given = _path(source)
        if given is None:
            continue
        # As it is named, too: what is replaced may be a link to it.
        places = [given.resolve(), Path(os.path.abspath(given))]
        above = [each for place in places for each in (place, *place.parents)]
        if folder and any(_same(out, each) for each in above):
            what = f"is what {name} reads" if _same(out, given) else f"lies over {name} {given}"
        elif not folder and (
            _same(out, given) or (_READ.fullmatch(out.name) and _inside(out, given))
        ):
            what = f"is read by {name} {given}"
        else:
            continue
        raise OptionError(f"{option} {out} {what}, which would be lost; pass another path")


def _path(source: object) -> Path | None:
    """What lies where a source says; None where nothing does."""
    try:
        path = Path(str(source))
        return path if source is not None and path.exists() else None
    except (OSError, ValueError):  # a text that is longer than a name can be
        return None


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _inside(file: Path, folder: Path) -> bool:
    return file.exists() and any(_same(folder, each) for each in file.resolve().parents)


def nearest(path: Path) -> Path:
    """What is there of a path: it, or the nearest above it."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def _check_writable(out: Path, folder: Path, option: str) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OptionError(
            f"{option} {out}: nothing may be written to {folder}; pass a path that you may write to"
        )
