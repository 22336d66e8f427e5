"""W on disk by what it depends on, built once however many processes ask for it at once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path

from xtoken._core import Vocab, __version__
from xtoken.errors import FormatError
from xtoken.projection.arrays import AnyProjection
from xtoken.projection.file import FORMAT_VERSION, load, save
from xtoken.projection.options import ProjectionOptions

try:
    import fcntl
except ImportError:  # not on Windows; renames are atomic there too, only the work is done twice
    fcntl = None  # type: ignore[assignment]

VARIABLE = "XTOKEN_CACHE"


def cache_directory(cache_dir: str | PathLike[str] | bool | None = None) -> Path | None:
    """Where projections are kept; `None` is nowhere.

    Args:
        cache_dir: a directory; `False` for none; `None` or `True` for the environment variable
            `XTOKEN_CACHE` (a directory, or `off`) and, where it is not set, `xtoken` in the user's
            cache directory.
    """
    if cache_dir is False:
        return None
    if cache_dir is not None and cache_dir is not True:
        return Path(cache_dir)
    variable = os.environ.get(VARIABLE)
    if variable is not None and cache_dir is None and variable.lower() in ("", "0", "off"):
        return None
    if variable:
        return Path(variable)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xtoken"


def cache_key(student: Vocab, teacher: Vocab, options: ProjectionOptions) -> str:
    """A hash of everything that W depends on: 32 hexadecimal digits."""
    depends_on = [
        [[v.fingerprint, v.model_fingerprint, sorted(v.roles.items())] for v in (student, teacher)],
        options.to_json(),
        "pieces of both sides",
        FORMAT_VERSION,
        __version__,
    ]
    return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:32]


def build_cached(
    cls: type[AnyProjection],
    student: Vocab,
    teacher: Vocab,
    options: ProjectionOptions,
    directory: Path,
    build: Callable[[], AnyProjection],
) -> AnyProjection:
    """W from `directory`, or from `build` and then kept there.

    A file that is damaged is built again. A directory that cannot be written costs the cache, not
    the call.
    """
    path = directory / f"projection-{cache_key(student, teacher, options)}.safetensors"
    if (found := _read(cls, path, student, teacher)) is not None:
        return found
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            # Another process may have built it while this one waited.
            if (found := _read(cls, path, student, teacher)) is not None:
                return found
            projection = build()
            save(projection, path)
            return projection
    except OSError:
        return build()


def _read(
    cls: type[AnyProjection], path: Path, student: Vocab, teacher: Vocab
) -> AnyProjection | None:
    try:
        projection = load(cls, path)
    except (OSError, FormatError):
        return None
    # The key says that it is this pair's; a foreign file under that name is damage.
    if (projection.student_fingerprint, projection.teacher_fingerprint) != (
        student.fingerprint,
        teacher.fingerprint,
    ):
        return None
    return replace(projection, student=student, teacher=teacher)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock between processes; the lock file stays, as removing it would race."""
    with path.open("a") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
