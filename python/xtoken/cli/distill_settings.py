"""What can be set in a run, as its help says it, kept between calls of the command."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from xtoken._files import cache_directory, read_json, sealed, unsealed, warn_of_cache, write_text
from xtoken.errors import FormatError, MissingFileError

# What the settings are read off: packages by their versions, and these files.
_PACKAGES = ("transformers", "accelerate", "torch")
_SOURCES = ("cli/distill*.py", "training/*.py")
# In the cache.
SETTINGS_FOLDER = "cli"


@dataclass(frozen=True)
class Setting:
    """A setting that the command's function does not name; without a panel it is not shown."""

    name: str
    flags: list[str]
    help: str | None
    default: str | None
    panel: str | None


@dataclass(frozen=True)
class Settings:
    """All of them, the defaults of those that the function names, and their other names."""

    further: list[Setting]
    defaults: dict[str, str]
    aliases: dict[str, str]


def kept_settings(find: Callable[[], Settings]) -> Settings:
    """The settings, found once per installation: later calls read them from the cache.

    Raises:
        MissingExtraError: a package that they come from is not installed.
    """
    directory = cache_directory()
    key = None if directory is None else _key()
    if directory is None or key is None:
        return find()
    path = directory / SETTINGS_FOLDER / f"distill-{key}.json"
    kept = _read(path)
    if kept is None:
        kept = find()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, sealed(dataclasses.asdict(kept)))
        except OSError as error:
            warn_of_cache(directory, error)
    return kept


def _read(path: Path) -> Settings | None:
    """What is kept; None where nothing is, or it is damaged."""
    try:
        values = unsealed(read_json(path, "settings of a command"))
    except (FormatError, MissingFileError, OSError):
        return None
    if values is None:
        return None
    further = [Setting(**each) for each in values.pop("further")]
    return Settings(further, **values)


def _key() -> str | None:
    """Of all that the settings are read off; None where a package is missing."""
    found = hashlib.sha256(sys.version.encode())
    try:
        for package in _PACKAGES:
            found.update(f"{package} {version(package)}\0".encode())
    except PackageNotFoundError:
        return None
    root = Path(__file__).parent.parent
    for pattern in _SOURCES:
        for source in sorted(root.glob(pattern)):
            found.update(source.read_bytes())
    return found.hexdigest()[:16]
