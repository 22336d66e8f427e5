"""The consoles of all commands: names and tokens are printed as they are."""

from __future__ import annotations

from rich.console import Console


def plain_console(*, stderr: bool = False, quiet: bool = False, soft_wrap: bool = False) -> Console:
    """A console that highlights nothing and makes no picture of a `:name:` in a path or token."""
    return Console(stderr=stderr, quiet=quiet, soft_wrap=soft_wrap, highlight=False, emoji=False)
