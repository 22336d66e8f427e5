"""What all commands share: options given once, whole numbers in range, errors of one line."""

from __future__ import annotations

import gc
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

import typer
from rich.text import Text
from typer.core import TyperCommand

from xtoken._extras import missing_extra
from xtoken.cli.plain_console import plain_console
from xtoken.errors import InterruptedRunError, OptionError, XTokenError, page_of

# Shows where an error was raised, for reports of bugs.
TRACEBACK_VARIABLE = "XTOKEN_TRACEBACK"


@contextmanager
def without_collection() -> Iterator[None]:
    """Where files and modules are read, none of which is garbage: to look for it takes a tenth of
    the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class Command(TyperCommand):
    """A command whose options are given once, unless they may be repeated."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Parse the arguments.

        Raises:
            OptionError: an option is given twice, or a whole number is beyond 64 bits.
        """
        # What the parser leaves of `args` is for the parser below.
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        counts = Counter(param.name for param in given if param.param_type_name == "option")
        for param in given:
            repeatable = getattr(param, "multiple", False) or getattr(param, "count", False)
            if counts[param.name] > 1 and not repeatable:
                raise OptionError(
                    f"{param.opts[0]} is given {counts[param.name]} times, and only the last would "
                    "count; pass it once"
                )
        rest = super().parse_args(ctx, args)
        for name, value in ctx.params.items():
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise OptionError(
                    f"--{name.replace('_', '-')} {value} is out of range; expected a number of at "
                    "most 18 digits"
                )
        return rest

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        """Do what the command is for; garbage is collected from here on, see `xtoken.cli.main`."""
        gc.enable()
        return super().invoke(ctx)


class App(typer.Typer):
    """A group whose commands are `Command`s."""

    def command(  # type: ignore[override]
        self, name: str | None = None, cls: type[Command] = Command
    ) -> Callable[[Callable[..., None]], object]:
        """Add a command, as `typer.Typer.command` does."""
        return super().command(name, cls=cls)


def run(app: Callable[[], object]) -> None:
    """Run an application to its exit.

    The exit code is 1 with one line on stderr for bad input and failed work, 2 for bad usage, 130
    after Ctrl-C and 143 after a request to terminate.
    """
    for stream in (sys.stdout, sys.stderr):
        _never_fail(stream)
    warnings.showwarning = _show_warning
    signal.signal(signal.SIGTERM, _terminate)
    if os.environ.get("COLUMNS", "").isdigit():
        # Tables of a single column of text are no tables.
        os.environ["COLUMNS"] = str(max(20, int(os.environ["COLUMNS"][:6])))
    try:
        app()
    except SystemExit as stop:
        if stop.code == 130:
            _say("interrupted", "nothing that was saved is lost")
        raise
    except KeyboardInterrupt:
        _say("interrupted", "nothing that was saved is lost")
        raise SystemExit(130) from None
    except InterruptedRunError as error:
        _say("interrupted", str(error), page_of(error))
        raise SystemExit(128 + error.signal) from None
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does: nothing to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        _say("error", _described(error), page_of(error))
        raise SystemExit(1) from None


def _described(error: Exception) -> str:
    """One line for an error; those that are not of our making say what they are."""
    if isinstance(error, XTokenError):
        return _one_line(str(error))
    if isinstance(error, ImportError) and (clear := missing_extra(error)) is not None:
        return str(clear)
    if isinstance(error, OSError):
        return _one_line(str(error) or type(error).__name__)
    if isinstance(error, MemoryError):
        return "the memory is full; close other programs, or work on less at once"
    return (
        f"{type(error).__name__}: {_one_line(str(error)) or 'no message'}; this is a bug in xtoken "
        f"or in a library: set {TRACEBACK_VARIABLE}=1 to see where, and report it"
    )


def _one_line(text: str) -> str:
    # Here, as most commands end without a line of this kind.
    from xtoken.vocab.display import printable

    return printable(" ".join(text.split()))


def _say(kind: str, message: str, page: str | None = None) -> None:
    """One line on stderr; its first word leads to a page, in terminals that show links."""
    style = "bold red" if page is None else f"bold red link {page}"
    line = Text.assemble((f"{kind}:", style), " ", message)
    plain_console(stderr=True, soft_wrap=True).print(line)


def _never_fail(stream: TextIO) -> None:
    """Let a stream print what its encoding lacks as escapes."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _say("warning", _one_line(str(message)), page_of(category))


def _terminate(number: int, frame: FrameType | None) -> None:
    _say("terminated", "nothing that was saved is lost")
    raise SystemExit(128 + number)
