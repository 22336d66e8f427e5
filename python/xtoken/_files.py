"""Files: written whole or not at all, checksums, locks between processes, JSON, the cache folder.

Every file that the package writes goes through `write_atomically`, `temporary_beside` or
`folder_beside`; one that grows, through `writes`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from xtoken.errors import (
    ArgumentTypeError,
    FailedWriteError,
    FormatError,
    MissingFileError,
    UnavailableCacheWarning,
    XTokenError,
)

CACHE_VARIABLE = "XTOKEN_CACHE"

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]

# Names of unfinished files say which process writes them: .NAME.HOST-PID-RANDOM.xtoken-tmp
_WRITER = r"\..*\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.xtoken-"
_UNFINISHED = re.compile(_WRITER + "tmp")
# A folder that is about to be replaced lies under its own name in one of these.
_SET_ASIDE = re.compile(_WRITER + "old")
_CHECKSUM = "checksum"
_LONGEST_SHOWN = 1000
# Older than any write that still runs; for files of other machines, whose processes we cannot see.
_ABANDONED_SECONDS = 24 * 3600
# What torch, safetensors and tokenizers say of a write that failed, each in a class of its own.
_FAILED_WRITES = (
    *("inline_container", "PytorchStreamWriter", "iostream", "I/O error", "IoError", "os error"),
)
# Errors of a write itself, which may name no file; and what helps.
_NO_ROOM = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EROFS: "pass a path that can be written",
    errno.EIO: "pass a path on another disk",
}
_REMEDIES = {
    **_NO_ROOM,
    errno.ENOENT: "make the folder first",
    errno.EACCES: "pass a path that you may write to",
    errno.EPERM: "pass a path that you may write to",
}


def as_path(what: str, value: object, hint: str = "pass a text or a pathlib.Path") -> Path:
    """What a caller gave as a path.

    Args:
        what: the argument, for the message.

    Raises:
        ArgumentTypeError: it is none.
    """
    try:
        return Path(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise ArgumentTypeError(
            f"{what} is a {type(value).__name__}, expected a path; {hint}"
        ) from error


def path_to_read(
    what: str, value: object, hint: str = "pass the path of a file that can be read"
) -> Path:
    """What a caller gave as a path, which the system can look at; there may be nothing.

    Raises:
        ArgumentTypeError: it is none.
        MissingFileError: no file can have that name, or a folder above it may not be read.
    """
    path = as_path(what, value, hint)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise _not_looked_at(what, path, error.strerror or str(error), hint) from error
    except ValueError as error:  # a NUL, or half a character
        raise _not_looked_at(what, path, str(error), hint) from error
    return path


def _not_looked_at(what: str, path: Path, reason: str, hint: str) -> MissingFileError:
    return MissingFileError(f"{what} {shown_path(path)} cannot be looked at ({reason}); {hint}")


def shown_path(path: Path | str) -> str:
    """A path in a message: as it is, or quoted where that cannot be printed, or is too long."""
    text = str(path)
    if len(text) > _LONGEST_SHOWN:
        return f"{text[:40]!r}… of {len(text)} characters"
    return text if text.isprintable() else repr(text)


def write_atomically(path: Path | str, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that appears at `path` whole or not at all.

    Raises:
        FailedWriteError: the folder does not exist, cannot be written or is full; `path` is as it
            was.
    """
    with temporary_beside(path) as temporary, temporary.open("wb") as file:
        write(file)


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text to a file that appears whole or not at all; bytes of a path that are no
    character are escaped."""
    content = text.encode(errors="backslashreplace")
    write_atomically(path, lambda file: file.write(content))


def write_json(path: Path | str, values: object) -> None:
    """Write JSON for people and programs to a file that appears whole or not at all."""
    write_text(path, json_text(values))


def json_text(values: object) -> str:
    """JSON for people and programs; a number that is not finite is null, as JSON has no NaN."""
    return json.dumps(_finite(values), indent=2, allow_nan=False) + "\n"


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


@contextmanager
def writes(path: Path | str, then: str = "") -> Iterator[None]:
    """Tell of a write into a file or folder that fails in one way, whoever wrote.

    An error that names a file elsewhere is of no write here.

    Args:
        then: what follows the remedy, such as ", and pass --resume".

    Raises:
        ArgumentTypeError: `path` is none.
        FailedWriteError: it could not be written; the message says why, and what helps.
    """
    fault = _fault_of_name(as_path("path", path))
    if fault is not None:
        message = f"{shown_path(path)} cannot be written ({fault}); pass another path{then}"
        raise FailedWriteError(message, fault)
    try:
        yield
    except FailedWriteError as error:
        if str(error).endswith(then):
            raise
        raise FailedWriteError(f"{error}{then}", error.reason) from error
    except (XTokenError, BrokenPipeError):
        raise
    # tokenizers raises Exception itself.
    except Exception as error:
        found = _failed_write(error, path)
        if found is None:
            raise
        reason, remedy, named = found
        message = f"{shown_path(named)} cannot be written ({reason}); {remedy}{then}"
        raise FailedWriteError(message, reason) from error


def _failed_write(error: Exception, path: Path | str) -> tuple[str, str, Path | str] | None:
    """What a failed write says, what helps, and where; None where it is another error."""
    text, named = str(error), path
    if isinstance(error, OSError) and error.errno is not None:
        number, reason = error.errno, error.strerror or text
        if not _is_of(error.filename, Path(path)):
            if number not in _NO_ROOM:
                return None
            # A full disk may be that of temporary files.
            named = error.filename if isinstance(error.filename, str) else path
    elif any(mark in text for mark in _FAILED_WRITES):
        reason, of_system = text.splitlines()[0], re.search(r"os error (\d+)", text)
        if of_system is None:
            return reason, "the disk is full, or a limit is reached: free space there", named
        number = int(of_system[1])
        if number not in _NO_ROOM:
            return None
    else:
        return None
    return reason, _REMEDIES.get(number, "pass another path"), named


def _fault_of_name(path: Path) -> str | None:
    """Why no file can be called so, where Python says it in a ValueError; None where one can."""
    try:
        return "its name has a NUL" if b"\0" in os.fsencode(path) else None
    except UnicodeEncodeError:
        return "its name has half a character"


def _is_of(named: object, path: Path) -> bool:
    """Whether a file that an error names is one that is written to make `path`."""
    if not isinstance(named, str | PathLike):
        return False
    found, path = Path(os.path.abspath(named)), Path(os.path.abspath(path))
    if found == path or path in found.parents or found in path.parents:
        return True
    inside = found.relative_to(path.parent).parts if path.parent in found.parents else ()
    return bool(inside) and _UNFINISHED.fullmatch(inside[0]) is not None


@contextmanager
def temporary_beside(path: Path | str) -> Iterator[Path]:
    """Give the path of an empty file that becomes `path` when the block ends without an error.

    For writers that want a path. The content is on the disk before the name is, and the mode is
    that of any new file. A device or a pipe is written as it is.

    Raises:
        FailedWriteError: it could not be written.
    """
    with writes(path), _temporary_beside(path) as temporary:
        yield temporary


@contextmanager
def _temporary_beside(path: Path | str) -> Iterator[Path]:
    # Through a link, what it points to is replaced.
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path  # a device or a pipe, which must not be replaced by a file
        return
    remove_unfinished(path.parent)
    temporary = _name_beside(path)
    try:
        # As open() does it, the mode is 0666 less the umask; never a file that is there.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        of_new = temporary.stat().st_mode
        yield temporary
        _open_as(temporary, of_new)
        to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _folder_to_disk(path.parent)


@contextmanager
def folder_beside(path: Path | str) -> Iterator[Path]:
    """Give the path of an empty folder that becomes `path` when the block ends without an error.

    For writers of several files, whose own temporary ones go with the folder where they are killed.
    A folder that is there is replaced. Modes are those of any new file and folder.

    Raises:
        FailedWriteError: it could not be written; what was there is as it was.
    """
    with writes(path), _folder_beside(path) as temporary:
        yield temporary


@contextmanager
def _folder_beside(path: Path | str) -> Iterator[Path]:
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path.parent)
    temporary, aside = _name_beside(path), _name_beside(path, "old")
    temporary.mkdir()
    of_new = temporary.stat().st_mode
    try:
        yield temporary
        _finish(temporary, of_new)
        if path.exists():
            aside.mkdir()
            path.rename(aside / path.name)
        # A process that is killed here has its folder put back by the next one that writes.
        temporary.rename(path)
    except BaseException as error:
        _put_back(aside)
        _give_up(temporary, path, error)
    _folder_to_disk(path.parent)
    _put_back(aside)


@contextmanager
def parts_beside(folder: Path | str, names: Collection[str]) -> Iterator[Path]:
    """Give the path of an empty folder whose content takes the place of these names in `folder`
    when the block ends without an error; what else is in `folder` stays.

    Args:
        names: of files and folders in `folder`; one that the block does not make is removed.

    Raises:
        FailedWriteError: it could not be written; what was there is as it was.
    """
    folder = Path(folder)
    with writes(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        temporary, aside = (_name_beside(folder / "parts", end) for end in ("tmp", "old"))
        temporary.mkdir()
        of_new = temporary.stat().st_mode
        placed: list[Path] = []
        try:
            yield temporary
            _finish(temporary, of_new)
            aside.mkdir()
            for name in names:
                if os.path.lexists(folder / name):
                    (folder / name).rename(aside / name)
            for made in sorted(temporary.iterdir()):
                made.rename(folder / made.name)
                placed.append(folder / made.name)
        except BaseException as error:
            for path in placed:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            _put_back(aside)
            _give_up(temporary, folder, error)
        temporary.rmdir()
        _folder_to_disk(folder)
        shutil.rmtree(aside, ignore_errors=True)


def _give_up(temporary: Path, path: Path, error: BaseException) -> NoReturn:
    """Remove a new folder that takes no place, and raise what ended it, by the name it was for."""
    shutil.rmtree(temporary, ignore_errors=True)
    if isinstance(error, FailedWriteError):
        message = str(error).replace(str(temporary), str(path))
        raise FailedWriteError(message, error.reason) from error
    raise error


def _finish(temporary: Path, of_new: int) -> None:
    """Give all in a new folder the modes of new files, and have it on the disk."""
    for made in (temporary, *temporary.rglob("*")):
        _open_as(made, of_new)
        if made.is_file():
            to_disk(made)


def _open_as(path: Path, of_new: int) -> None:
    """Let others read and write a file or folder as one that was just made.

    safetensors makes files for their owner alone, and so is a folder that `tempfile` made.
    """
    mode = path.lstat().st_mode
    bits = 0o777 if stat.S_ISDIR(mode) else 0o666
    wanted = mode & ~bits | of_new & bits
    if wanted != mode and not stat.S_ISLNK(mode):
        # Some file systems have one mode for all.
        with contextlib.suppress(OSError):
            path.chmod(stat.S_IMODE(wanted))


def _put_back(aside: Path) -> None:
    """Give a folder that was set aside its place again, unless another has it, and end with it."""
    with contextlib.suppress(OSError):
        for old in aside.iterdir():
            if not (aside.parent / old.name).exists():
                old.rename(aside.parent / old.name)
        shutil.rmtree(aside)


def _name_beside(path: Path, ending: str = "tmp") -> Path:
    """A name of this process alone, in the same file system, that `unfinished` knows again."""
    # A short part of the name, as names may have 255 bytes.
    name = f".{path.name[:40]}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.xtoken-{ending}"
    return path.parent / name


def remove_unfinished(folder: Path | str) -> int:
    """Remove what writers that were killed left in a folder; see `unfinished`.

    A folder that one had set aside and not replaced has its place again.

    Returns: the number of files and folders removed.
    """
    for aside in _left(folder, _SET_ASIDE):
        _put_back(aside)
    removed = 0
    for path in unfinished(folder):
        with contextlib.suppress(OSError):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            removed += 1
    return removed


def unfinished(folder: Path | str) -> list[Path]:
    """What writers that were killed left in a folder.

    One counts if its process ran on this machine and is dead, or if it is older than a day.
    """
    return _left(folder, _UNFINISHED)


def _left(folder: Path | str, names: re.Pattern[str]) -> list[Path]:
    left = []
    with contextlib.suppress(OSError, ValueError):  # such as a name that no folder has
        for name in sorted(os.listdir(folder)):
            found = names.fullmatch(name)
            if found is None:
                continue
            path = Path(folder) / name
            with contextlib.suppress(OSError):
                own = found["host"] == _host() and os.name == "posix"
                dead = own and not _is_running(int(found["pid"]))
                if dead or time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    left.append(path)
    return left


def _host() -> str:
    """Eight digits that name the machine, and within it the container, that a process id is of."""
    namespace = Path("/proc/self/ns/pid")
    space = namespace.stat().st_ino if namespace.exists() else 0
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # another user's, or a number that no system gives
    return True


def to_disk(path: Path) -> None:
    """Return once what was written to a file would survive a crash of the machine."""
    # Windows refuses to flush what is open for reading alone.
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    """Flush the names of a folder, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256_of(path: Path | str) -> str:
    """The SHA-256 of a file's content: 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(values: Mapping[str, object]) -> str:
    """An object as JSON text with a checksum of its own, which `unsealed` compares."""
    return json.dumps({**values, _CHECKSUM: _seal(values)}, indent=2) + "\n"


def unsealed(value: object) -> dict[str, Any] | None:
    """The values that `sealed` wrote, without the checksum; None where they were altered."""
    if not isinstance(value, dict):
        return None
    values = {name: part for name, part in value.items() if name != _CHECKSUM}
    return values if value.get(_CHECKSUM) == _seal(values) else None


def _seal(values: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_json(path: Path | str, purpose: str) -> JsonValue:
    """Read a file of JSON.

    Args:
        path: the file.
        purpose: what it is, for the messages, as in "configuration file".

    Raises:
        MissingFileError: there is no such file.
        FormatError: it is not UTF-8, not JSON, or nested too deeply.
    """
    path = path_to_read(purpose, path)
    if not path.is_file():
        raise MissingFileError(f"{purpose} {path} does not exist; pass a file of JSON")
    try:
        return parse_json(path.read_bytes())
    except FormatError as error:
        raise FormatError(f"{purpose} {path} {error}") from error


def parse_json(content: bytes | str) -> JsonValue:
    """Read JSON.

    Raises:
        FormatError: it is not UTF-8, not JSON, or nested too deeply; the message has no subject.
    """
    try:
        if isinstance(content, bytes):
            content = content.decode("utf-8-sig")
        value: JsonValue = json.loads(content)
        return value
    except UnicodeDecodeError as error:
        raise FormatError(f"is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except RecursionError as error:
        raise FormatError("is nested too deeply to be read; write it again") from error
    # Besides syntax, a number of more than 4,300 digits.
    except ValueError as error:
        raise FormatError(f"is not JSON ({error}); write it again") from error


def cache_directory(cache_dir: str | PathLike[str] | bool | None = None) -> Path | None:
    """Where W, stored predictions and the like are kept; `None` is nowhere.

    Args:
        cache_dir: a directory; `False` for none; `None` or `True` for the environment variable
            `XTOKEN_CACHE` (a directory, or `off`) and, where it is not set, `xtoken` in the user's
            cache directory.

    Raises:
        ArgumentTypeError: it is none of these.
    """
    if cache_dir is False:
        return None
    if cache_dir is not None and cache_dir is not True:
        hint = "pass a directory, None for the user's cache folder, or False for nowhere"
        return as_path("cache_dir", cache_dir, hint)
    variable = os.environ.get(CACHE_VARIABLE)
    if variable is not None and cache_dir is None and variable.lower() in ("", "0", "off"):
        return None
    if variable:
        return Path(variable)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xtoken"


_warned: set[str] = set()


def warn_of_cache(folder: Path | str, error: Exception) -> None:
    """Say once per folder that a cache cannot be used; the caller does without it."""
    if str(folder) not in _warned:
        _warned.add(str(folder))
        reason = error.reason if isinstance(error, FailedWriteError) else error
        warnings.warn(
            f"the cache {folder} cannot be used ({reason}); the result is computed and not kept. "
            f"Free space there, or set {CACHE_VARIABLE} to another directory or to off",
            UnavailableCacheWarning,
            stacklevel=3,
        )
