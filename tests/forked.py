"""Python programs in processes of their own, forked from one that has imported what they need.

To import the trainer takes 6 s of CPU, and a tiny run one. What is about the start of a process, as
a launcher's, is tested in `test_examples.py`, with processes that start from nothing, and so with
hash seeds of their own, which these share. Triton is there as its interpreter: on the CPU nothing
else of it runs.
"""

from __future__ import annotations

import atexit
import functools
import gc
import multiprocessing
import os
import socket
import sys
import tempfile
import types
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path

import pytest

# Where a process finds the server that another one started.
_SHARED = "XTOKEN_TESTS_FORK_SERVER"

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "hypothesis",
        "triton",
        "triton.experimental.gluon",
        "xtoken.training",
        "xtoken.cli.distill_run",
        "xtoken.cli.teach_run",
        "trl.trainer.sft_trainer",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "pydantic.type_adapter",
        "rich.progress",
        "forked_first",
    ]
)


class Forked:
    """A program that runs; as `subprocess.Popen` with its output kept."""

    def __init__(self, program: str | Path, *arguments: object, **variables: str) -> None:
        code = program if isinstance(program, str) else program.read_text(encoding="utf-8")
        name = "<string>" if isinstance(program, str) else str(program)
        self._said = [_file() for _ in range(2)]
        environment = {**os.environ, **variables}
        argv = [name, *map(str, arguments)]
        self._process = CONTEXT.Process(
            target=_become, args=(code, argv, environment, os.getcwd(), self._said), daemon=False
        )
        start_server()
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """Negative for a signal; None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """End it by kill -9."""
        self._process.kill()

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """What it wrote, once it has ended."""
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            self._process.join()
        output, errors = (path.read_text() for path in self._said)
        for path in self._said:
            path.unlink()
        return output, errors


def fork_two(program: str | Path, *arguments: object, **variables: str) -> list[Forked]:
    """Two processes with the variables that torchrun sets."""
    return [Forked(program, *arguments, **rank, **variables) for rank in rank_variables(2)]


def rank_variables(number: int) -> list[dict[str, str]]:
    """What torchrun sets for each of so many processes on this machine."""
    size, port = str(number), str(free_port())
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size}
    return [
        shared | {"LOCAL_WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank}
        for rank in map(str, range(number))
    ]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@functools.cache
def start_server() -> None:
    """Before the first process; `CONTEXT` alone would start it with another Triton."""
    if _SHARED in os.environ:
        server = forkserver._forkserver
        address, key = os.environ[_SHARED].split()
        server._forkserver_address, server._forkserver_authkey = address, bytes.fromhex(key)
        server._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)  # it lives without us
        server.ensure_running = lambda: None
        return
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        # Tests kill some, and their semaphores would be the last that one reads of.
        patch.setenv("PYTHONWARNINGS", "ignore:resource_tracker")
        patch.setenv("PYTHONPATH", f"{here / 'uncollected'}{os.pathsep}{here}", prepend=os.pathsep)
        forkserver.ensure_running()


def share_server() -> None:
    """Start one for this process and those that it starts."""
    start_server()
    server = forkserver._forkserver
    # Younger versions of Python have a key too.
    key = getattr(server, "_forkserver_authkey", None) or b"\0"
    os.environ[_SHARED] = f"{server._forkserver_address} {key.hex()}"


def _file() -> Path:
    descriptor, path = tempfile.mkstemp(prefix="forked-")
    os.close(descriptor)
    return Path(path)


def _become(
    code: str, argv: list[str], environment: Mapping[str, str], folder: str, said: list[Path]
) -> None:
    for descriptor, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    gc.freeze()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = argv
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__["__file__"] = argv[0]
    try:
        exec(compile(code, argv[0], "exec"), main.__dict__)
    finally:
        atexit._run_exitfuncs()
