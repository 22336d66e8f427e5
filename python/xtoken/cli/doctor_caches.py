"""The folders that xtoken and the hub's client fill: where, how large, and what is in them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xtoken._core import __version__
from xtoken._files import CACHE_VARIABLE, cache_directory, unfinished
from xtoken.cli.distill_settings import SETTINGS_FOLDER
from xtoken.cli.doctor_findings import Finding, one_line
from xtoken.cli.outputs import nearest
from xtoken.errors import XTokenError
from xtoken.projection.cache import FILE_PREFIX
from xtoken.projection.file import read_arrays

# Where `xtoken distill` keeps what teachers predict.
_TEACHERS = "teachers"
_SCARCE_BYTES = 1 << 30


@dataclass(frozen=True)
class Kept:
    """What a folder holds of one kind.

    Attributes:
        what: as in "projections".
        count: of them.
        size: in bytes, all together.
        note: what else there is to say; empty for nothing.
    """

    what: str
    count: int
    size: int
    note: str = ""


@dataclass(frozen=True)
class CacheFolder:
    """A folder that is filled without being asked for.

    Attributes:
        name: whose it is.
        path: None where nothing is kept.
        free: bytes that its disk has left; None where it does not exist.
        kept: by kind.
        stale: temporary files that writers which were killed left.
        stale_size: of those, in bytes.
    """

    name: str
    path: Path | None
    free: int | None
    kept: tuple[Kept, ...]
    stale: int = 0
    stale_size: int = 0


def caches(findings: list[Finding]) -> tuple[CacheFolder, ...]:
    """The cache of xtoken and that of the hub's client; what is wrong goes to `findings`."""
    return (_own(findings), _hub())


def _own(findings: list[Finding]) -> CacheFolder:
    path = cache_directory()
    if path is None:
        return CacheFolder("xtoken", None, None, ())
    findings += _usable(path)
    files = sorted(path.glob(f"{FILE_PREFIX}*.safetensors"))
    damaged, older = [], 0
    for file in files:
        try:
            _, entries = read_arrays(file)
            older += entries.get("library_version") != __version__
        except (XTokenError, OSError) as error:
            damaged.append(file)
            findings.append(
                Finding("warning", "cache", f"{one_line(error)} (xtoken builds this W again)")
            )
    notes = [f"{older} of another version of xtoken, which is not read"] if older else []
    notes += [f"{len(damaged)} damaged"] if damaged else []
    stores = _folders(path / _TEACHERS)
    settings = sorted((path / SETTINGS_FOLDER).glob("*.json"))
    folders = (path, path / _TEACHERS, path / SETTINGS_FOLDER, *stores)
    left = [file for folder in folders for file in unfinished(folder)]
    size = sum(map(_size, left))
    if left:
        findings.append(
            Finding(
                "note",
                "cache",
                f"{len(left)} temporary files of writers that were killed, {megabytes(size)}; the "
                "next write in their folder removes them",
            )
        )
    return CacheFolder(
        "xtoken",
        path,
        _free(path),
        (
            Kept("projections", len(files), sum(map(_size, files)), "; ".join(notes)),
            Kept("teachers' stored predictions", len(stores), sum(map(_size, stores))),
            Kept("settings that --help shows", len(settings), sum(map(_size, settings))),
        ),
        len(left),
        size,
    )


def _usable(path: Path) -> Iterator[Finding]:
    """What keeps xtoken from writing there; each costs the cache and not the call."""
    existing = nearest(path)
    if not existing.is_dir():
        yield Finding(
            "broken",
            "cache",
            f"{existing} is a file, expected a directory; remove it, or set {CACHE_VARIABLE} to "
            "another directory or to off",
        )
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield Finding(
            "broken",
            "cache",
            f"{existing} cannot be written, so every W is built again; set {CACHE_VARIABLE} to a "
            "directory that can, or to off",
        )
    elif shutil.disk_usage(existing).free < _SCARCE_BYTES:
        yield Finding(
            "warning",
            "cache",
            f"{existing} has {megabytes(shutil.disk_usage(existing).free)} left; free space there, "
            f"or set {CACHE_VARIABLE} to another directory",
        )


def _hub() -> CacheFolder:
    from huggingface_hub.constants import HF_HUB_CACHE

    path = Path(HF_HUB_CACHE)
    models = [folder for folder in _folders(path) if folder.name.startswith("models--")]
    tokenizers = [folder for folder in models if any(folder.glob("snapshots/*/tokenizer.json"))]
    kept = Kept(
        "models", len(models), sum(map(_size, models)), f"{len(tokenizers)} with a tokenizer.json"
    )
    return CacheFolder("hub", path, _free(path), (kept,))


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(item for item in path.iterdir() if item.is_dir())
    except OSError:
        return []


def _free(path: Path) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links count as nothing."""
    try:
        if not path.is_dir():
            return path.stat().st_size
    except OSError:
        return 0
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder) / name
            if not file.is_symlink():
                total += _size(file)
    return total


def megabytes(size: int) -> str:
    """A size for people: in MB, from 10 GB on in GB."""
    return f"{size / 1e6:,.1f} MB" if size < 1e10 else f"{size / 1e9:,.1f} GB"
