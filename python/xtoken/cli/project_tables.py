"""The tables that `xtoken project` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from xtoken.audit.audit import Audit
from xtoken.projection import RULE_CODES, Projection
from xtoken.projection.explain import REASONS, Explanation

_LOSSES = {"prefix-kl": "prefix KL (the default)", "p-kl": "P-KL"}


def statistics(w: Projection) -> Group:
    """Rows by rule, the options, and the numerals where the student is known."""
    stats = w.stats()
    rules = Table(
        title=f"W: {w.shape[0]:,} student x {w.shape[1]:,} teacher tokens, "
        f"{stats['entries']:,} entries"
    )
    rules.add_column("rule")
    rules.add_column("rows", justify="right")
    rules.add_column("meaning")
    for rule in RULE_CODES:
        if stats[rule]:
            rules.add_row(rule, f"{stats[rule]:,}", REASONS[rule])
    rules.add_section()
    rules.add_row("empty", f"{stats['empty']:,}", "rows without an entry, of those above")
    for digits in (1, 2, 3):
        if stats.get(f"numerals_{digits}"):
            rules.add_row(
                f"numerals, {digits} digit{'s' * (digits > 1)}",
                f"{stats[f'numerals_{digits}']:,}",
                f"of which {stats[f'numerals_{digits}_exact']:,} exact",
            )
    options = w.options
    return Group(
        rules,
        Text(
            f"top_k {options.top_k}, decay {options.decay}, max_pieces {options.max_pieces}, "
            f"canonical {', '.join(options.canonical) or 'none'}, reverse {options.reverse}, "
            f"weights {options.origin}\n"
            f"student {w.student_fingerprint}\nteacher {w.teacher_fingerprint}"
        ),
    )


def explanations(found: Sequence[Explanation]) -> Table:
    """One row of W a line."""
    table = Table()
    table.add_column("id", justify="right")
    table.add_column("student token")
    table.add_column("rule")
    table.add_column("teacher tokens (weight)")
    table.add_column("pieces")
    for item in found:
        entries = "  ".join(f"{entry.token} ({entry.weight:.4f})" for entry in item.entries)
        table.add_row(
            str(item.student_id),
            escape(item.token),
            item.rule,
            escape(entries) or f"[dim]nothing: {item.reason}[/]",
            escape(" ".join(item.pieces)),
        )
    return table


def overlap(result: Audit) -> Table:
    """What the two vocabularies share."""
    table = Table(title="vocabulary overlap")
    for title in ("", "student", "teacher", "shared"):
        table.add_column(title, justify="right" if title else "left")
    table.add_row("ids", f"{result.student_size:,}", f"{result.teacher_size:,}", "")
    table.add_row(
        "tokens by bytes",
        f"{result.student_tokens:,}",
        f"{result.teacher_tokens:,}",
        f"{result.shared_bytes:,}",
    )
    table.add_row("tokens by strings", "", "", f"{result.shared_strings:,}")
    table.add_row("strict common set", "", "", f"{result.common_strict:,}")
    table.add_row(f"relaxed common set ({result.threshold})", "", "", f"{result.common_relaxed:,}")
    return table


def coverage(result: Audit) -> Table:
    """The common set by class of student token."""
    # Without frames, the table fits a terminal of 80 columns.
    table = Table(
        title="student tokens by class (bold: decides between the losses)",
        box=None,
        padding=(0, 0, 0, 1),
    )
    table.add_column("class", no_wrap=True)
    for title in ("tokens", "strict", "relaxed", "share", "spread", "empty", "prefixed"):
        table.add_column(title, justify="right")
    for item in result.classes:
        if not item.total:
            continue
        numbers = (item.total, item.strict, item.relaxed)
        table.add_row(
            item.name,
            *(f"{number:,}" for number in numbers),
            f"{math.floor(100 * item.share)} %",
            f"{item.spread:,}",
            f"{item.empty:,}",
            f"{item.prefixed:,}",
            style="bold" if item.critical else None,
        )
    return table


def supervision(result: Audit) -> Table:
    """Where prefix KL compares in the sample of text, by class."""
    table = Table(title="what prefix KL compares in the text", box=None, padding=(0, 0, 0, 1))
    table.add_column("class", no_wrap=True)
    for title in ("chunks", "compared", "share", "of them m:1", "prefixes"):
        table.add_column(title, justify="right")
    for item in result.supervision:
        table.add_row(
            item.name,
            f"{item.chunks:,}",
            f"{item.compared:,}",
            f"{math.floor(100 * item.compared / item.chunks)} %",
            f"{item.mirrored:,}",
            f"{item.prefixes:,}",
        )
    return table


def placement(result: Audit) -> Table:
    """Where the teacher's mass goes in the sample of text, by shape of chunk and by class."""
    table = Table(
        title="the teacher's mass at boundaries, % of its row", box=None, padding=(0, 0, 0, 1)
    )
    table.add_column("student : teacher tokens, class", no_wrap=True)
    titles = (
        "boundaries",
        "dropped by P-KL",
        "by exact targets",
        "left out",
        "carried",
        "not listed",
    )
    for title in titles:
        table.add_column(title, justify="right")
    for part in (result.placement, result.placement_by_class):
        for item in part:
            shares = item.unreached, item.dropped, item.left_out, item.carried, item.unlisted
            table.add_row(
                item.name, f"{item.boundaries:,}", *(f"{100 * share:.2f}" for share in shares)
            )
        table.add_section()
    return table


def recommendation(result: Audit) -> Panel:
    """The loss to use, why, and what to know."""
    lines = [result.reason, *(f"- {note}" for note in result.notes)]
    return Panel(Text("\n".join(lines)), title=f"recommended: {_LOSSES[result.recommendation]}")
