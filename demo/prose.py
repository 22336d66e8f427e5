"""English prose that every Python carries: topics of the language reference, library docstrings."""

from __future__ import annotations

import ast
import pydoc_data.topics
import sysconfig
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from demo.document import Document

MIN_DOCSTRING_CHARS = 400


def prose_documents() -> list[Document]:
    """Return the topics of the language reference and the long docstrings of the standard library.

    No paragraph occurs twice: topics quote each other at length, and a paragraph that were both in
    training and in the held-out part would make the evaluation a test of memory.
    """
    documents = [*_topics(), *_docstrings()]
    # Short ones first: the long topics are collections of the short ones.
    documents.sort(key=lambda document: (len(document.text), document.source))
    return _without_repeated_paragraphs(documents)


def _topics() -> Iterator[Document]:
    for name, text in sorted(pydoc_data.topics.topics.items()):
        yield Document(text=text.strip(), source=f"pydoc_data.topics: {name}", kind="prose")


def _docstrings() -> Iterator[Document]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        # Parsed, never imported: importing every module would have side effects.
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in _statements(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = (ast.get_docstring(node) or "").strip()
                if len(text) >= MIN_DOCSTRING_CHARS:
                    name = getattr(node, "name", "module")
                    yield Document(text=text, source=f"{path.name}: {name}", kind="prose")


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """As `ast.walk` yields them, without the expressions: most of a tree, with no docstring."""
    found: deque[ast.AST] = deque([tree])
    while found:
        node = found.popleft()
        for field in ("body", "handlers", "orelse", "finalbody", "cases"):
            found.extend(getattr(node, field, ()))
        yield node


def _without_repeated_paragraphs(documents: list[Document]) -> list[Document]:
    seen: set[str] = set()
    kept = []
    for document in documents:
        paragraphs = []
        for paragraph in document.text.split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph.rstrip())
        if paragraphs:
            kept.append(Document("\n\n".join(paragraphs), document.source, document.kind))
    return kept
