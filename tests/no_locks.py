"""A file system without locks between processes, as some mounts of Lustre and NFS are."""

from __future__ import annotations

import fcntl
import os

import pytest


def refuse_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let flock(2) answer with an error of the system, as such a file system does."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
