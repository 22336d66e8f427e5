"""docs/choose-a-loss.md tells every loss of the library, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from xtoken.losses import LOSSES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "choose-a-loss.md"

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the documentation is not here")


def test_each_loss_has_a_section_and_a_row() -> None:
    text = PAGE.read_text(encoding="utf-8")
    described = text.split("\n## The evidence")[0]
    sections = re.findall(r"^### (.+)$", described, flags=re.MULTILINE)
    rows = re.findall(r"^\| `([\w-]+)` \| .* \| .* \|$", text.split("\n### ")[0], re.MULTILINE)
    assert set(sections) == set(LOSSES)
    assert set(rows) == {*LOSSES, "ce"}
