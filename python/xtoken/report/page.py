"""Self-contained HTML pages: one template, one stylesheet, and data that no token text breaks."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment

_FOLDER = "templates"
# What would end a script element or begin a comment in it, and the line ends of JavaScript.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class PageNames:
    """What a page calls what it shows.

    Attributes:
        student, teacher: the two tokenizers, as the models are called.
        source: where the text is from, such as a file.
    """

    student: str
    teacher: str
    source: str = "a text"


def render_page(
    name: str, data: Mapping[str, object], values: Mapping[str, object] | None = None
) -> str:
    """The page of a template as one document that loads nothing.

    Args:
        name: of the template and its script, `NAME.html` and `NAME.js`.
        data: plain values; the page's script reads them, and the template as `data`.
        values: what only the template reads.

    Returns: HTML. Every value is escaped; scripts other than the page's own do not run.
    """
    from markupsafe import Markup

    script = f"{_text('common.js')}\n{_text(f'{name}.js')}"
    embedded = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    page: str = (
        _environment()
        .get_template(f"{name}.html")
        .render(
            {
                **(values or {}),
                "data": data,
                "embedded": Markup(embedded.translate(_ESCAPES)),
                "style": Markup(_text("style.css")),
                "script": Markup(script),
                "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            }
        )
    )
    return page


def percent(part: float, whole: float = 1.0) -> str:
    """A share for people: 0 % and 100 % are said of none and of all alone.

    >>> percent(0, 7), percent(1, 100_000), percent(99_999, 100_000), percent(1, 8)
    ('0 %', '< 0.1 %', '99.9 %', '12.5 %')
    """
    share = 100 * part / whole if whole else 0.0
    if share in (0, 100):
        return f"{share:.0f} %"
    return "< 0.1 %" if share < 0.1 else f"{min(share, 99.9):.1f} %"


def plain(value: object) -> str:
    """A value of unknown kind in a table.

    >>> plain(1234), plain(0.12345678), plain((2, 1)), plain(None)
    ('1,234', '0.1235', '2, 1', '')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return str(value)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("xtoken.report", _FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = lambda number: f"{number:,}"
    environment.filters["percent"] = percent
    environment.filters["plain"] = plain
    return environment


def _text(name: str) -> str:
    return files("xtoken.report").joinpath(_FOLDER, name).read_text(encoding="utf-8")
