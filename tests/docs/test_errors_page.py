"""docs/errors.md has an entry for each error, and errors lead there."""

from __future__ import annotations

import inspect
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from xtoken import errors
from xtoken.cli import command

PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"
CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, errors.XTokenError | UserWarning)
}

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the documentation is not here")


def entries() -> dict[str, str]:
    parts = re.split(r"^### (\w+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_each_class_has_an_entry_and_each_entry_a_class() -> None:
    assert set(entries()) == set(CLASSES)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_each_entry_gives_a_remedy(name: str) -> None:
    assert "**Remedy:**" in entries()[name]


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_a_class_leads_to_its_entry(name: str) -> None:
    page = errors.page_of(CLASSES[name])
    assert page is not None
    assert page.endswith(f"/docs/{PAGE.name}#{name.lower()}")


def test_a_class_of_a_user_leads_to_the_entry_of_its_base() -> None:
    mine = type("MineError", (errors.StoreError,), {})
    assert errors.page_of(mine("broken")) == errors.page_of(errors.StoreError)


def test_an_entry_of_a_base_class_is_said_to_be_one() -> None:
    for name, cls in CLASSES.items():
        base = cls.__mro__[1]
        if base.__name__ in CLASSES and base is not errors.XTokenError:
            assert f"`{base.__name__}`" in entries()[name], name


def printed(monkeypatch: pytest.MonkeyPatch, **options: object) -> str:
    out = io.StringIO()
    monkeypatch.setattr(command, "plain_console", lambda **_: Console(file=out, **options))
    command._say("error", "broken", errors.page_of(errors.PairError))
    return out.getvalue()


def test_the_command_links_its_error_where_a_terminal_shows_links(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = printed(monkeypatch, force_terminal=True, color_system="standard")
    assert "errors.md#pairerror" in shown
    assert printed(monkeypatch, force_terminal=False) == "error: broken\n"
