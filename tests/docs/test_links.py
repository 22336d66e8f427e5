"""Links lead somewhere: between the Markdown files, from pages to files of the repository, and in
the site as it is built."""

from __future__ import annotations

import doctest
import re
import runpy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = "https://github.com/xtoken-dev/xtoken/blob/main/"
# Made by `make docs`.
GENERATED = ("docs/command-line.md",)

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="there is no documentation")


def markdown_files() -> list[str]:
    """Those of a checkout; a source distribution has not all that they lead to."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        return []
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in found.stdout.split() if (ROOT / name).is_file()]


def links(text: str) -> list[str]:
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`\n]*`", "", text))


def anchors(path: Path) -> set[str]:
    """What GitHub and mkdocs make of a page's headings."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).strip().replace(" ", "-") for each in headings}


def fault(link: str, page: str) -> str | None:
    if link.startswith(REPOSITORY):
        name, _, anchor = link.removeprefix(REPOSITORY).partition("#")
        target = ROOT / name
    elif re.match(r"\w+:", link):
        return None if re.fullmatch(r"https?://[\w.-]+\.\w+(/\S*)?|mailto:\S+@\S+", link) else link
    else:
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
    if target.resolve().is_relative_to(ROOT) and str(target.resolve().relative_to(ROOT)) in (
        GENERATED
    ):
        return None
    if not target.exists():
        return f"{link} leads nowhere"
    if anchor and target.suffix == ".md" and anchor not in anchors(target):
        return f"{link}: no such heading"
    return None


@pytest.mark.parametrize("page", markdown_files())
def test_the_links_of_a_page_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [found for link in links(text) if (found := fault(link, page))] == []


def test_dead_links_are_found() -> None:
    assert links("[a](b.md) `[c](d)`\n```text\n[e](f)\n```\n") == ["b.md"]
    assert fault("nowhere.md", "README.md")
    assert fault("CONTRIBUTING.md#nowhere", "README.md")
    assert fault(f"{REPOSITORY}nowhere.md", "docs/index.md")
    assert fault("http//example.org", "README.md")
    assert fault("docs/errors.md#pairerror", "README.md") is None


def test_the_check_of_the_site_finds_what_is_dead_or_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<h1 id="x"></h1><a href="b.html#y"></a><a href="#x"></a>')
    (tmp_path / "b.html").write_text('<script src="https://cdn.example.org/x.js"></script>')
    faults = hook("site_faults")(tmp_path)
    assert len(faults) == 2
    assert "b.html#y" in faults[0]
    assert "loads https://cdn" in faults[1]


def test_the_page_of_the_commands_has_every_option() -> None:
    text = hook("command_page")()
    for each in ("## xtoken distill", "`--resume`", "## xtoken project audit", "`TOKENIZER`"):
        assert each in text


def test_docstrings_are_rewritten_as_the_example_says() -> None:
    pytest.importorskip("griffe")
    code = runpy.run_path(str(ROOT / "scripts" / "docs_examples.py"))
    (example,) = doctest.DocTestFinder().find(code["with_sections"], globs=code)
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0


def hook(name: str) -> Callable[..., Any]:
    pytest.importorskip("mkdocs")
    return runpy.run_path(str(ROOT / "scripts" / "docs_hooks.py"))[name]
