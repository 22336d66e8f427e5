"""Pages as tests read them: well-formed or refused, tables, buttons, bars, the embedded data."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

_VOID = {"area", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


@dataclass
class Node:
    """An element with its attributes, children and text."""

    tag: str
    attributes: dict[str, str | None]
    children: list[Node | str] = field(default_factory=list)

    def all(self, tag: str, css: str | None = None) -> list[Node]:
        """The elements below of a tag, and of a class."""
        found = []
        for child in self.children:
            if isinstance(child, Node):
                if child.tag == tag and (css is None or css in child.classes):
                    found.append(child)
                found += child.all(tag, css)
        return found

    @property
    def classes(self) -> list[str]:
        return (self.attributes.get("class") or "").split()

    @property
    def text(self) -> str:
        """All text below, as it is written."""
        return "".join(c if isinstance(c, str) else c.text for c in self.children)


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Node("root", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in _VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert tag not in _VOID, f"</{tag}> ends nothing"
        assert self.open[-1].tag == tag, f"</{tag}> inside <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment, which no template has: {data[:40]!r}")


def read_tree(page: str) -> Node:
    """A document as a tree, once it is found well-formed."""
    builder = _Builder()
    builder.feed(page)
    builder.close()
    assert [node.tag for node in builder.open] == ["root"], "elements are left open"
    return builder.root


def read_page(page: str) -> Node:
    """The page as a tree, once it is found well-formed, self-contained and readable by all."""
    root = read_tree(page)
    assert page.startswith("<!doctype html>")
    _needs_nothing_else(page, root)
    _can_be_read_by_all(root)
    return root


def page_data(root: Node) -> Any:
    """The embedded data."""
    (script,) = [node for node in root.all("script") if node.attributes.get("id") == "data"]
    return json.loads(script.text)


def _needs_nothing_else(page: str, root: Node) -> None:
    assert not root.all("link")
    assert not root.all("img")
    assert not root.all("iframe")
    for node in every(root):
        assert "src" not in node.attributes
        assert not any(name.startswith("on") for name in node.attributes), node
        assert (node.attributes.get("href") or "#").startswith("#")
    style = "".join(node.text for node in root.all("style"))
    assert not re.search(r"@import|url\(", style)
    data, script = root.all("script")
    assert not re.search(
        r"\bfetch\b|XMLHttpRequest|innerHTML|document\.write|import\(", script.text
    )
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    (policy,) = [m for m in root.all("meta") if "http-equiv" in m.attributes]
    assert f"script-src 'sha256-{digest}'" in (policy.attributes["content"] or "")
    assert "default-src 'none'" in (policy.attributes["content"] or "")
    assert "<" not in data.text


def _can_be_read_by_all(root: Node) -> None:
    (html,) = root.all("html")
    assert html.attributes.get("lang") == "en"
    assert len(root.all("title")[0].text.strip()) > 3
    for landmark in ("header", "main", "footer", "h1"):
        assert len(root.all(landmark)) == 1, landmark
    assert any(
        "width=device-width" in (m.attributes.get("content") or "") for m in root.all("meta")
    )
    style = root.all("style")[0].text
    for query in ("prefers-color-scheme: dark", "prefers-reduced-motion", ":focus-visible"):
        assert query in style, query
    identities = [node.attributes["id"] for node in every(root) if "id" in node.attributes]
    assert len(identities) == len(set(identities))
    for node in every(root):
        for name in ("aria-labelledby", "aria-controls"):
            if name in node.attributes:
                assert node.attributes[name] in identities, node.attributes[name]
        if node.tag == "table":
            assert node.all("th"), "a table without heads"
            assert all(head.attributes.get("scope") for head in node.all("th"))
        if node.tag == "button":
            assert node.attributes.get("aria-label") or node.text.strip()
    levels = [int(node.tag[1]) for node in every(root) if re.fullmatch("h[1-6]", node.tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def every(node: Node) -> list[Node]:
    """All elements below, in the order of the page."""
    found = []
    for child in node.children:
        if isinstance(child, Node):
            found.append(child)
            found += every(child)
    return found


def bar_shares(cell: Node) -> list[float]:
    """The widths of the parts of a bar, of 1."""
    (meter,) = cell.all("span", "meter")
    widths = [re.match(r"width:([0-9.e-]+)%", i.attributes["style"] or "") for i in meter.all("i")]
    return [float(width[1]) / 100 for width in widths if width is not None]


def number(text: str) -> int:
    """A whole number with its commas."""
    return int(text.strip().replace(",", ""))
