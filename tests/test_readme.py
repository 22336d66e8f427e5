"""The README's example runs as printed, on a student and a teacher where it expects them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_models import write_pair

README = Path(__file__).resolve().parent.parent / "README.md"


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_readme_has_examples():
    assert python_blocks()


@pytest.mark.parametrize("block", python_blocks(), ids=lambda block: block.splitlines()[0])
def test_each_example_of_the_readme_runs_as_printed(block, tmp_path, monkeypatch, capsys):
    write_pair(tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})
    assert "'201'" in capsys.readouterr().out
