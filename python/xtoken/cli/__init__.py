"""The `xtoken` command: one file a group of commands; errors of the user's making are one line."""

from __future__ import annotations

import importlib
import os
import sys

import typer
from rich.console import Console
from rich.markup import escape

from xtoken import __version__
from xtoken.errors import XTokenError

app = typer.Typer(
    name="xtoken",
    help="Distil a language model from a teacher whose tokenizer is different.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Each module of this package named here has `register(app)`, which adds its commands; torch stays
# out of them until a command that needs it runs.
_GROUPS: tuple[str, ...] = ("vocab", "align", "project", "distill")


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and stop."),
) -> None:
    if version:
        typer.echo(f"xtoken {__version__}")
        raise typer.Exit


for _group in _GROUPS:
    importlib.import_module(f"xtoken.cli.{_group}").register(app)


def main() -> None:
    """Run the command; exit code 1 and one line on stderr for bad input, 2 for bad usage."""
    try:
        app()
    except (XTokenError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # The reader of our output has gone, as `head` does: nothing to say.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        message = f"[bold red]error:[/] {escape(str(error))}"
        Console(stderr=True, soft_wrap=True, highlight=False).print(message)
        raise SystemExit(1) from None
