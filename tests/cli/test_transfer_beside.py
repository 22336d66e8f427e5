"""A transfer into a folder that something else was written to while it ran."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import write_pair
from typer.testing import CliRunner

import xtoken.cli.transfer_run as module
from xtoken.cli import app
from xtoken.errors import OptionError


def test_what_another_process_has_written_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pair(tmp_path)
    out = tmp_path / "out"
    load = module.load_causal_lm

    def beside(*given: object, **named: object) -> object:
        out.mkdir()
        (out / "other.txt").write_text("of another process")
        return load(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "load_causal_lm", beside)
    named = ["--model", str(tmp_path / "teacher"), "--tokenizer", str(tmp_path / "student")]
    result = CliRunner().invoke(app, ["transfer", *named, "--out", str(out)])
    assert isinstance(result.exception, OptionError)
    assert "is not empty; pass a new directory" in str(result.exception)
    assert [each.name for each in out.iterdir()] == ["other.txt"]
    assert not list(tmp_path.glob(".*"))
