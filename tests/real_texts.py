"""Texts that are the same on every machine: those of the standard library differ from one version
of Python to the next.

The first two are CPython 3.11's, (c) Python Software Foundation, under the PSF license.
"""

from __future__ import annotations

import json
from pathlib import Path

_TEXTS = Path(__file__).parent / "texts"

TOPICS: dict[str, str] = json.loads((_TEXTS / "language_reference.json").read_text("utf-8"))
"""Python's language reference: prose with code, by topic."""

CODE = (_TEXTS / "argparse.txt").read_text("utf-8")
"""The beginning of `argparse`: Python."""

NUMBERS = (_TEXTS / "numbers.txt").read_text("utf-8").rstrip("\n").split("\n\n")
"""What `demo.numerals.number_documents(seed=0)` makes with 3.11: sentences full of numerals."""
