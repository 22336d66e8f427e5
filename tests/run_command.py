"""A command in this process, for tests of what it does and prints."""

from __future__ import annotations

from typer.testing import CliRunner

from xtoken.cli import app


def invoke(*arguments: object) -> str:
    """Its output, on one line; what it raised, if anything did."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())
