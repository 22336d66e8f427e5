"""`xtoken doctor`: what is installed, what is kept where, and whether a pair works."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Annotated

import typer

from xtoken.cli.command import App
from xtoken.cli.plain_console import plain_console
from xtoken.cli.sides import MaybeStudent, MaybeTeacher
from xtoken.errors import OptionError


def register(app: App) -> None:
    """Add the command."""
    app.command()(doctor)


def doctor(
    student: MaybeStudent = None,
    teacher: MaybeTeacher = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for machines.")] = False,
) -> None:
    """Say what is installed and kept where, and with two tokenizers whether the pair works.

    The exit code is 1 where something is broken; what is only missing is not.
    """
    if (student is None) != (teacher is None):
        raise OptionError("--student and --teacher go together; pass both or neither")
    # Here, as every other command would pay for them too.
    from xtoken.cli.doctor_caches import caches
    from xtoken.cli.doctor_installation import installation
    from xtoken.cli.doctor_pair import pair_findings
    from xtoken.cli.doctor_report import Report

    console = plain_console(stderr=True)
    with console.status("looking") if console.is_terminal else nullcontext():
        found = installation()
        folders = caches(found.findings)
        pair = () if student is None or teacher is None else tuple(pair_findings(student, teacher))
    report = Report(found, folders, pair)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        report.show(plain_console())
    if not report.ok:
        raise typer.Exit(1)
