"""The parts of the release check that need no build."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "Cargo.toml").is_file(), reason="there is no checkout")


def part(name: str) -> Callable[..., Any]:
    return runpy.run_path(str(ROOT / "scripts" / "release_check.py"))[name]


def test_versions_and_addresses_agree_and_a_tag_of_another_version_is_named() -> None:
    version = part("check_versions")(None)
    assert part("check_versions")(f"v{version}") == version
    with pytest.raises(SystemExit, match=r"the tag says 9\.9\.9"):
        part("check_versions")("v9.9.9")


def test_what_passed_is_kept_beside_what_lies_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, out = tmp_path / "made", tmp_path / "deep" / "out"
    made.mkdir()
    files = [made / "xtoken-1.whl", made / "xtoken-1.tar.gz"]
    for file in files:
        file.write_text(file.name)
    part("keep")(out, files[0])
    part("keep")(out, *files)  # again, over the file of the run before
    assert {file.name: file.read_text() for file in out.iterdir()} == {
        file.name: file.name for file in files
    }
    assert all(file.is_file() for file in files)
    assert str(out / "xtoken-1.tar.gz") in capsys.readouterr().out
