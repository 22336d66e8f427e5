"""What `xtoken doctor` prints: tables for a person, or one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from xtoken.cli.doctor_caches import CacheFolder, megabytes
from xtoken.cli.doctor_findings import Finding
from xtoken.cli.doctor_installation import Installation

_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "broken": "bold red"}


@dataclass(frozen=True)
class Report:
    """All that was found.

    Attributes:
        installation: versions, extras, devices, environment.
        folders: the caches.
        pair: a line for each part of a pair; empty where none was given.
    """

    installation: Installation
    folders: tuple[CacheFolder, ...]
    pair: tuple[Finding, ...]

    @property
    def findings(self) -> list[Finding]:
        """Of the installation, of the caches and of the pair."""
        return [*self.installation.findings, *self.pair]

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return not self._count("broken")

    def _count(self, status: str) -> int:
        return sum(item.status == status for item in self.findings)

    def to_dict(self) -> dict[str, object]:
        """Plain values, as the command prints them with `--json`."""
        facts = asdict(self.installation)
        del facts["findings"]
        for extra, shown in zip(facts["extras"], self.installation.extras, strict=True):
            extra["command"] = shown.command if shown.missing else None
        return facts | {
            "caches": [
                asdict(folder) | {"path": None if folder.path is None else str(folder.path)}
                for folder in self.folders
            ],
            "pair": [asdict(item) for item in self.pair],
            "findings": [asdict(item) for item in self.findings],
            "ok": self.ok,
        }

    def show(self, console: Console) -> None:
        """Print tables, then a line for each finding and how many are broken."""
        for table in (
            _versions(self.installation),
            _packages(self.installation),
            _folders(self.folders),
        ):
            console.print(table)
        for item in self.findings:
            line = Text.assemble(
                (f"{item.status:<8}", _STYLES[item.status]), f"{item.subject}: {item.text}"
            )
            console.print(line, soft_wrap=True)
        counts = [
            f"{count} {word}"
            for word, count in (
                ("broken", self._count("broken")),
                ("warnings", self._count("warning")),
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
