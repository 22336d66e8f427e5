"""A file on which the tokenizers library panics, which no `except Exception` stops."""

import json
import sys
from pathlib import Path

import pytest

from xtoken import Pair
from xtoken.cli import main
from xtoken.errors import FormatError


@pytest.fixture(params=["tokenizers", "transformers"])
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A prefix of continuing pieces that is longer than the second piece of a merge."""
    model = {
        "type": "BPE",
        "continuing_subword_prefix": "####",
        "vocab": {"a": 0, "b": 1, "ab": 2},
        "merges": ["a b"],
    }
    content = {"version": "1.0", "added_tokens": [], "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    if request.param == "transformers":
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_panic_of_the_tokenizers_library_is_one_error(damaged: Path) -> None:
    with pytest.raises(FormatError, match=r"makes the tokenizers library panic .*; the tok"):
        Pair(damaged, damaged).align("ab")


def test_the_command_line_says_it_in_one_line(
    damaged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (damaged / "text.txt").write_text("ab")
    sides = ["--student", str(damaged), "--teacher", str(damaged)]
    monkeypatch.setattr(sys, "argv", ["xtoken", "align", *sides, str(damaged / "text.txt")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "makes the tokenizers library panic" in error
