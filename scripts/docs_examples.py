"""Docstrings as griffe and Markdown have to see them, for the API.

griffe knows the section `Examples:`; our docstrings say `Example:`, or nothing at all before a
doctest, which Markdown would take for a quotation. What follows `Returns:` on its line it takes for
a title, and of two attributes in one line the second for a type.
"""

from __future__ import annotations

import re

import griffe

_INLINE = re.compile(r"(Returns|Raises|Yields|Source|Example): (?=\S)")
_SEVERAL = re.compile(r"    [a-z]\w*(, [a-z]\w*)+: ")


class Examples(griffe.Extension):
    """Put each doctest of a docstring into a section of its own."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Rewrite the docstring of an object as it is read."""
        if obj.docstring is not None:
            obj.docstring.value = with_sections(obj.docstring.value)


def with_sections(text: str) -> str:
    """A docstring with `Examples:` over each doctest, and no section begun and filled in one line.

    >>> print(with_sections("Returns: one\\n    of two."))
    **Returns:** one
    of two.
    >>> with_sections("Adds.\\n\\n>>> 1 + 1\\n2").splitlines()
    ['Adds.', '', 'Examples:', '    >>> 1 + 1', '    2']
    """
    lines: list[str] = []
    inside = inline = False
    for line in text.splitlines():
        inline = inline and line.startswith("    ")
        if inline:
            line = line.strip()
        elif found := _INLINE.match(line):
            inline = True
            line = f"**{found[1]}:** {line[found.end() :]}"
        if line == "Example:":
            line = "Examples:"
        elif line.startswith(">>> ") and not inside and not inline:
            inside = True
            lines.append("Examples:")
        elif not line.strip():
            inside = False
        if found := _SEVERAL.match(line):
            line = found[0].replace(", ", ",\N{NO-BREAK SPACE}") + line[found.end() :]
        lines.append(f"    {line}" if inside else line)
    return "\n".join(lines)
