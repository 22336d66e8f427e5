"""Docstrings as griffe and Markdown have to see them, for the API.

griffe knows the section `Examples:`; our docstrings say `Example:`, or nothing at all before a
doctest, which Markdown would take for a quotation. Of two attributes in one line it takes the
second for a type.
"""

from __future__ import annotations

import re

import griffe

_SEVERAL = re.compile(r"    [a-z]\w*(, [a-z]\w*)+: ")


class Examples(griffe.Extension):
    """Put each doctest of a docstring into a section of its own."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Rewrite the docstring of an object as it is read."""
        if obj.docstring is not None:
            obj.docstring.value = with_sections(obj.docstring.value)


def with_sections(text: str) -> str:
    """A docstring with `Examples:` over each doctest, and lists of names that are one word.

    >>> print(with_sections("Adds.\\n\\n>>> 1 + 1\\n2"))
    Adds.
    <BLANKLINE>
    Examples:
        >>> 1 + 1
        2
    """
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if line == "Example:":
            line = "Examples:"
        elif line.startswith(">>> ") and not inside:
            inside = True
            lines.append("Examples:")
        elif not line.strip():
            inside = False
        if found := _SEVERAL.match(line):
            line = found[0].replace(", ", ",\N{NO-BREAK SPACE}") + line[found.end() :]
        lines.append(f"    {line}" if inside else line)
    return "\n".join(lines)
