"""One text of the corpus."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """A text, where it comes from, and whether it is `prose` or `numbers`."""

    text: str
    source: str
    kind: str
