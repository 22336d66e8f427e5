"""Runs one command after another, as the shell would, in a process that has imported it all."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from multiprocessing.connection import Connection

from xtoken.cli import main


def serve(questions: Connection) -> None:
    """Answer until the other end is closed: a command's exit code, and what it said."""
    os.environ["TERM"] = "dumb"
    with contextlib.suppress(EOFError):
        while True:
            questions.send(run(questions.recv()))


def run(arguments: list[str], errors: str = "strict") -> tuple[int, bytes, bytes]:
    """A command's exit code, and what it said on both streams."""
    sys.argv = ["xtoken", *arguments]
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", errors=errors) for _ in "oe"]
    code: object = 0
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            print(f"Traceback of {error!r}", file=sys.stderr)
    for stream in streams:
        stream.flush()
    output, said = (stream.buffer.getvalue() for stream in streams)
    return code or 0, output, said
