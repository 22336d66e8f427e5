"""Locks between processes, which some file systems do not have."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from xtoken._files import shown_path
from xtoken.errors import HeldLockError, NoLockError, XTokenError

# What flock(2) says where the file system has no locks, or those of a network have no server.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextmanager
def locked(path: Path | str, timeout: float = -1, *, needed: bool = True) -> Iterator[None]:
    """Hold a lock between processes while the block runs.

    Args:
        path: of the lock file, which stays: removing it would race.
        timeout: seconds to wait for another holder; negative for as long as it takes.
        needed: whether a file system without locks is refused. Otherwise the block runs without
            one there, for work that is right in two processes at once, and only done twice.

    Raises:
        HeldLockError: another process still held it.
        NoLockError: the file system has no locks.
        OSError: the folder cannot be written.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(_lock(path, timeout))
        except NoLockError:
            if needed:
                raise
        # Outside: what the block raises is no failure of the lock.
        yield


@contextmanager
def locked_alone(path: Path | str, refused: XTokenError) -> Iterator[None]:
    """Hold a lock while the block runs, or raise `refused` where another process holds it now.

    Raises:
        NoLockError: the file system has no locks.
        OSError: the folder cannot be written.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(path, timeout=0))
        except HeldLockError as error:
            raise refused from error
        yield


def check_locks(folder: Path) -> None:
    """Refuse a folder in which no file can be locked, before any work is done; it stays as it was.

    Raises:
        NoLockError: its file system has no locks.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _try_lock(file.fileno())
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise _no_locks(folder, error) from error
        # Whatever else it is stands in the way of the files themselves, too.


def _lock(path: Path | str, timeout: float) -> AbstractContextManager[object]:
    """A lock that is held until the context is left."""
    # Here, as it takes longer to import than most calls take.
    from filelock import FileLock, Timeout

    try:
        # Made beforehand with the mode of any file, so that users of a shared cache can wait for
        # one another: FileLock would set the one that it is given.
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            mode = os.fstat(handle).st_mode & 0o777
            _try_lock(handle)
        finally:
            os.close(handle)
        return FileLock(path, timeout=timeout, mode=mode).acquire()
    except Timeout as error:
        raise HeldLockError(
            f"another process holds {shown_path(path)}; wait for its end"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise _no_locks(path, error) from error


def _try_lock(handle: int) -> None:
    """Raise what the file system says where it has no locks.

    FileLock would take a file that is there for the lock of another process where flock(2) is
    missing, and wait for its end.
    """
    if os.name != "posix":
        return
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Not by closing it, as a process that was forked meanwhile has it open, too. Of several
        # that try at once, the last one gets the lock.
        fcntl.flock(handle, fcntl.LOCK_UN)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise


def _no_locks(path: Path | str, error: OSError) -> NoLockError:
    return NoLockError(
        f"{shown_path(path)} cannot be locked ({error.strerror}): its file system has no locks "
        "between processes (flock); use a folder on another file system, or mount it with them"
    )
