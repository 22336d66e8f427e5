"""`xtoken doctor`: what is installed, what is kept where, and whether a pair works."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from xtoken.cli.command import App
from xtoken.cli.doctor_caches import CacheFolder, caches, megabytes
from xtoken.cli.doctor_findings import Finding
from xtoken.cli.doctor_installation import Installation, installation
from xtoken.cli.doctor_pair import pair_findings
from xtoken.cli.sides import MaybeStudent, MaybeTeacher
from xtoken.errors import OptionError

_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "broken": "bold red"}


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
    console = Console(stderr=True)
    with console.status("looking") if console.is_terminal else nullcontext():
        found = installation()
        folders = caches(found.findings)
        pair = [] if student is None or teacher is None else list(pair_findings(student, teacher))
    findings = [*found.findings, *pair]
    broken = sum(item.status == "broken" for item in findings)
    if as_json:
        typer.echo(json.dumps(_as_json(found, folders, pair)))
    else:
        _print(found, folders, pair)
    if broken:
        raise typer.Exit(1)


def _as_json(
    found: Installation, folders: Sequence[CacheFolder], pair: Sequence[Finding]
) -> dict[str, Any]:
    facts = asdict(found)
    findings = [*found.findings, *pair]
    del facts["findings"]
    for extra, shown in zip(facts["extras"], found.extras, strict=True):
        extra["command"] = shown.command if shown.missing else None
    return facts | {
        "caches": [
            asdict(folder) | {"path": None if folder.path is None else str(folder.path)}
            for folder in folders
        ],
        "pair": [asdict(item) for item in pair],
        "findings": [asdict(item) for item in findings],
        "ok": not any(item.status == "broken" for item in findings),
    }


def _print(found: Installation, folders: Sequence[CacheFolder], pair: Sequence[Finding]) -> None:
    console = Console(highlight=False)
    for part in (_versions(found), _packages(found), _folders(folders)):
        console.print(part)
    findings = [*found.findings, *pair]
    for item in findings:
        line = Text.assemble(
            (f"{item.status:<8}", _STYLES[item.status]), f"{item.subject}: {item.text}"
        )
        console.print(line, soft_wrap=True)
    counts = [
        f"{count} {word}"
        for word, count in (
            ("broken", sum(item.status == "broken" for item in findings)),
            ("warnings", sum(item.status == "warning" for item in findings)),
        )
        if count
    ]
    console.print(", ".join(counts) or "nothing is broken", soft_wrap=True)


def _versions(found: Installation) -> Table:
    table = Table(title="this installation", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    devices = found.devices
    table.add_row("xtoken", escape(f"{found.xtoken} (core {found.core}), {found.folder}"))
    table.add_row("Python", f"{found.python}, {found.system}")
    memory = f", {devices.memory / 1e9:.1f} GB of memory" if devices.memory else ""
    torch = "" if devices.torch_threads is None else f", torch uses {devices.torch_threads}"
    table.add_row("CPU", f"{devices.threads} threads{torch}{memory}")
    for index, (name, size) in enumerate(devices.cuda):
        table.add_row(f"cuda:{index}", f"{name}, {size / 1e9:.1f} GB")
    if not devices.cuda and devices.torch_threads is not None:
        table.add_row("CUDA", "torch sees no device")
    for name, value in found.environment.items():
        table.add_row(name, escape(value) or "(empty)")
    return table


def _packages(found: Installation) -> Table:
    table = Table(title="packages", title_justify="left")
    for title in ("", "installed", "needed", "for"):
        table.add_column(title)
    for package in found.packages:
        table.add_row(
            package.name, package.version or "missing", package.needed, package.extra or "all"
        )
    table.add_section()
    for extra in found.extras:
        state = f"lacks {', '.join(extra.missing)}" if extra.missing else "complete"
        command = escape(extra.command) if extra.missing else ""
        table.add_row(escape(f"xtoken[{extra.name}]"), state, "", command)
    return table


def _folders(folders: Sequence[CacheFolder]) -> Table:
    table = Table(title="caches", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for folder in folders:
        if folder.path is None:
            table.add_row(folder.name, "off: nothing is kept")
            continue
        free = "does not exist yet" if folder.free is None else f"{megabytes(folder.free)} free"
        table.add_row(folder.name, escape(f"{folder.path} ({free})"))
        for kept in folder.kept:
            note = f"; {kept.note}" if kept.note else ""
            table.add_row(f"  {kept.what}", f"{kept.count:,}, {megabytes(kept.size)}{note}")
        if folder.stale:
            table.add_row("  stale", f"{folder.stale:,}, {megabytes(folder.stale_size)}")
    return table
