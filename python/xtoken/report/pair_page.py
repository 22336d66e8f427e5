"""A pair as a page: what suits it, why, and each row of W with its whole story."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from xtoken.audit.audit import DEFAULT_LOSS, Audit
from xtoken.projection import Projection
from xtoken.projection.explain import REASONS
from xtoken.report.page import PageNames, render_page
from xtoken.report.row_stories import row_stories

# Rows of W on a page: some megabytes of them.
ROWS = 20_000
LOSSES = {
    "prefix-kl": "Prefix KL",
    "p-kl": "P\u2011KL",
    "exact-kl": "Exact KL",
}
# What the template has a place for; all else of an audit is shown as it is.
_PLACED = frozenset(
    {
        "student_size", "teacher_size", "student_family", "teacher_family", "student_fingerprint",
        "teacher_fingerprint", "shared_strings", "shared_bytes", "student_tokens",
        "teacher_tokens", "common_strict", "common_relaxed", "threshold", "classes", "stats",
        "notes", "supervision",
    }
)  # fmt: skip


def pair_page(audit: Audit, projection: Projection, names: PageNames, *, rows: int = ROWS) -> str:
    """The page.

    Args:
        audit: of `projection`, which knows its vocabularies.
        names: what the page calls the two tokenizers, and the sample of text if there was one.
        rows: the most rows of W on it.

    Raises:
        OptionError: `rows` is below 1.
    """
    stories = row_stories(projection, rows)
    data = {
        "rows": stories.rows,
        "classes": stories.classes,
        "rules": stories.rules,
        "reasons": REASONS,
        "nodes": stories.nodes,
        "cells": stories.cells,
        "student": stories.student,
        "teacher": stories.teacher,
        "lacking": stories.lacking,
    }
    values = {
        "names": names,
        "audit": audit,
        "loss": LOSSES.get(audit.recommendation, audit.recommendation),
        "default": DEFAULT_LOSS,
        "default_name": LOSSES[DEFAULT_LOSS],
        "shown": len(stories.rows),
        "total": stories.total,
        "classes": [item for item in audit.classes if item.total],
        "further": _further(audit),
        "rules": sorted({stories.rules[row.rule] for row in stories.rows}),
        "class_names": [
            item.name for item in audit.classes if item.total and item.name in stories.classes
        ],
    }
    return render_page("pair", data, values)


def _further(audit: Audit) -> list[tuple[str, list[str], list[list[object]]]]:
    """What the audit knows beyond what the template has a place for: a table for each, as title,
    heads and rows."""
    content = audit.to_dict()
    tables = []
    for field in fields(audit):
        value = content[field.name]
        if field.name not in _PLACED and value not in (None, (), [], {}, ""):
            tables.append((field.name.replace("_", " "), *_table(value)))
    return tables


def _table(value: object) -> tuple[list[str], list[list[object]]]:
    if isinstance(value, Mapping):
        if all(isinstance(item, Mapping) for item in value.values()):
            return _table([{"": name, **item} for name, item in value.items()])
        return ["", "value"], [[name, item] for name, item in value.items()]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if all(isinstance(item, Mapping) for item in value):
            heads = list(dict.fromkeys(head for item in value for head in item))
            return heads, [[item.get(head, "") for head in heads] for item in value]
        return ["value"], [[item] for item in value]
    return ["value"], [[value]]
