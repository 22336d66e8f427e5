"""The `xtoken` command: one file per group of commands."""

from __future__ import annotations

import importlib

import typer

from xtoken._core import __version__
from xtoken.cli.command import App, run

app = App(
    name="xtoken",
    help="Distil a language model from a teacher whose tokenizer is different.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Each module of this package named here has `register(app)`, which adds its commands; torch stays
# out of them until a command that needs it runs.
_GROUPS: tuple[str, ...] = (
    *("vocab", "align", "project", "teach", "distill", "evaluate", "transfer", "report", "doctor"),
)


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
    """Run the command; see `xtoken.cli.command.run` for the exit codes."""
    run(app)
