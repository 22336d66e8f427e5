"""The `xtoken` command: one file per group of commands."""

from __future__ import annotations

import functools
import gc
import importlib
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

from xtoken._core import __version__
from xtoken.cli.command import App, run

# The commands, as the list of them shows them: module of this package and what it is for. Each
# module has `register(app)`, which adds the command; it is imported where the command is asked for,
# and torch not before a command needs it.
COMMANDS: dict[str, tuple[str, str]] = {
    "vocab": (
        "vocab",
        "Show what a vocabulary is: family, size, special tokens by role, traps found.",
    ),
    "align": ("align", "Align two tokenizations of one text, or of each text of a corpus."),
    "teach": (
        "teach",
        "Store a teacher's predictions, for `xtoken distill --teacher-store` without its weights.",
    ),
    "distill": (
        "distill",
        "Distil a teacher into a student with another tokenizer; writes model, W, metrics, curves.",
    ),
    "eval": (
        "evaluate",
        "Score a model: bits per byte of texts, which compare across tokenizers, and tasks.",
    ),
    "transfer": (
        "transfer",
        "Write a model with another tokenizer; `xtoken distill` from the old one finishes the job.",
    ),
    "doctor": (
        "doctor",
        "Say what is installed and kept where, and with two tokenizers whether the pair works.",
    ),
    "project": ("project", "The projection W between two vocabularies."),
    "report": ("report", "Pages that show an alignment, a pair or a run."),
}


@functools.cache
def _command(name: str) -> Any:
    """Made once, for all that runs in this process: its options take 10 ms."""
    group = App()
    importlib.import_module(f"xtoken.cli.{COMMANDS[name][0]}").register(group)
    return get_group(group).commands[name]


class _Root(TyperGroup):
    """The commands, each imported where it is asked for; the list of them needs none."""

    _lists = False

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        # The names, of which one is suggested for a mistyped one.
        self.commands = {
            name: TyperCommand(name, help=purpose) for name, (_, purpose) in COMMANDS.items()
        }

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """The names, in the order in which they are shown."""
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        """A command; while the list is printed, its name and what it is for."""
        if cmd_name in COMMANDS and not self._lists:
            self.commands[cmd_name] = _command(cmd_name)
        return self.commands.get(cmd_name)

    def format_help(self, ctx: typer.Context, formatter: object) -> None:  # type: ignore[override]
        """Print the help with its list of commands."""
        self._lists = True
        try:
            super().format_help(ctx, formatter)  # type: ignore[arg-type]
        finally:
            self._lists = False


app = App(
    name="xtoken",
    cls=_Root,
    help="Distil a language model from a teacher whose tokenizer is different.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and stop."),
) -> None:
    if version:
        typer.echo(f"xtoken {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command; see `xtoken.cli.command.run` for the exit codes."""
    # What it imports is no garbage, and to look for it takes a sixth of the start.
    gc.disable()
    run(app)
