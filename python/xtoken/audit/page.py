"""The audit of a pair as one HTML page that needs nothing but itself."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TypeAlias

import numpy as np

from xtoken._core import PROJECTION_RULES
from xtoken.audit.audit import CRITICAL, Audit
from xtoken.projection import Projection
from xtoken.vocab.classes import classes
from xtoken.vocab.display import quoted

# Rows of W on the page, spread evenly over each class; all of a critical or smaller one.
ROWS_PER_CLASS = 120
_PLACE = "/*DATA*/"

_Row: TypeAlias = tuple[int, str, str, str, list[tuple[str, float]]]


def render(audit: Audit, projection: Projection, student_name: str, teacher_name: str) -> str:
    """The page.

    Args:
        audit: of `projection`, which knows its vocabularies.
        student_name, teacher_name: what the page calls the two tokenizers, as the models are
            called.
    """
    data = {
        "student": student_name,
        "teacher": teacher_name,
        "audit": audit.to_dict(),
        "rows": _sample(projection),
    }
    # No "</script>" can occur in it, nor a line separator that JavaScript would not take.
    text = json.dumps(data, ensure_ascii=True).replace("</", "<\\/")
    template = files("xtoken.audit").joinpath("page.html").read_text(encoding="utf-8")
    return template.replace(_PLACE, text)


def _sample(projection: Projection) -> list[_Row]:
    """Rows as (student id, token, class, rule, [(teacher token, weight), ...]), by id."""
    student, teacher = projection.vocabularies()
    by_class: dict[str, list[int]] = {}
    for token_id, name in classes(student):
        by_class.setdefault(name, []).append(token_id)
    rows: list[_Row] = []
    for name, ids in by_class.items():
        kept = len(ids) if name in CRITICAL else min(len(ids), ROWS_PER_CLASS)
        picks = np.linspace(0, len(ids) - 1, kept).astype(int)
        for token_id in (ids[at] for at in picks.tolist()):
            indices, weights = projection.csr.row(token_id)
            entries = [
                (quoted(teacher, t), round(weight, 4))
                for t, weight in zip(indices.tolist(), weights.tolist(), strict=True)
            ]
            rule = PROJECTION_RULES[projection.rules[token_id]]
            rows.append((token_id, quoted(student, token_id), name, rule, entries))
    return sorted(rows, key=lambda row: row[0])
