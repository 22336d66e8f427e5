"""The documentation as it is published: no warning, no dead link."""

from __future__ import annotations

from pathlib import Path

from forked import Forked

ROOT = Path(__file__).parents[2]


def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    process = Forked(
        "from mkdocs.__main__ import cli\ncli()",
        "build", "--strict", "--quiet",
        "--config-file", ROOT / "mkdocs.yml", "--site-dir", tmp_path / "site",
        NO_MKDOCS_2_WARNING="1",
    )  # fmt: skip
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    page = (tmp_path / "site" / "choose-a-loss.html").read_text(encoding="utf-8")
    assert "exact-kl" in page
