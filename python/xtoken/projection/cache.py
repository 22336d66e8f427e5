"""W on disk by what it depends on, built once however many processes ask for it at once."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from xtoken._core import Vocab, __version__
from xtoken._files import warn_of_cache, writes
from xtoken._locks import locked
from xtoken.errors import FormatError, ShapeError
from xtoken.projection.arrays import AnyProjection
from xtoken.projection.file import FORMAT_VERSION, load, save
from xtoken.projection.options import ProjectionOptions

# Files of W in a cache directory are called so.
FILE_PREFIX = "projection-"


def cache_key(student: Vocab, teacher: Vocab, options: ProjectionOptions) -> str:
    """A hash of everything that W depends on: 32 hexadecimal digits."""
    depends_on = [
        [
            [v.fingerprint, v.model_fingerprint, sorted(v.roles.items()), v.stops]
            for v in (student, teacher)
        ],
        options.to_json(),
        "pieces and stops of both sides, of even pieces the first",
        FORMAT_VERSION,
        __version__,
    ]
    return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:32]


def cache_file(directory: Path, student: Vocab, teacher: Vocab, options: ProjectionOptions) -> Path:
    """Where W of a pair is kept below a cache directory."""
    return directory / f"{FILE_PREFIX}{cache_key(student, teacher, options)}.safetensors"


def build_cached(
    cls: type[AnyProjection],
    student: Vocab,
    teacher: Vocab,
    options: ProjectionOptions,
    directory: Path,
    build: Callable[[], AnyProjection],
) -> AnyProjection:
    """W from `directory`, or from `build` and then kept there.

    A file that is damaged is built again. A directory that cannot be written, or is full, costs
    the cache and not the call: one warning says so. On a file system without locks two processes
    may build the same W; as files appear whole, each reads a whole one.
    """
    path = cache_file(directory, student, teacher, options)
    if (found := _read(cls, path, student, teacher)) is not None:
        return found
    with contextlib.ExitStack() as held:
        try:
            with writes(directory):
                directory.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(path.with_suffix(".lock"), needed=False))
        except OSError as error:
            warn_of_cache(directory, error)
            return build()
        # Another process may have built it while this one waited.
        if (found := _read(cls, path, student, teacher)) is not None:
            return found
        built = build()
        try:
            save(built, path)
        except OSError as error:
            warn_of_cache(directory, error)
        return built


def _read(
    cls: type[AnyProjection], path: Path, student: Vocab, teacher: Vocab
) -> AnyProjection | None:
    try:
        projection = load(cls, path)
    except (OSError, FormatError, ShapeError):
        return None
    # The key says that it is this pair's; a foreign file under that name is damage.
    if (projection.student_fingerprint, projection.teacher_fingerprint) != (
        student.fingerprint,
        teacher.fingerprint,
    ):
        return None
    return replace(projection, student=student, teacher=teacher)
