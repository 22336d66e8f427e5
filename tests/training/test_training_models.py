"""Where a student and a teacher come from: directories, and models of a hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import Forked
from tiny_models import READ_HUB, write_hub

from xtoken.errors import MissingFileError
from xtoken.training import load_models

LOAD = """
from xtoken.training import load_models
models = load_models("owner/student", "owner/teacher")
print(len(models.pair.student_vocab), models.load_student().config.vocab_size)
"""


def test_models_are_found_by_their_hub_names(tmp_path: Path) -> None:
    process = Forked(READ_HUB + LOAD, **write_hub(tmp_path))
    output, errors = process.communicate()
    assert output.split() == ["1700", "1700"], errors


def test_a_path_that_is_no_directory_is_not_looked_up_on_a_hub(tmp_path: Path) -> None:
    for missing in ("nowhere", str(tmp_path / "nowhere"), "./a/b", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=r"does not exist; pass .* hub \(owner/model\)"):
            load_models(missing, missing)


def test_a_mistyped_path_is_never_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`runs/demos` where the folder `runs` exists has the form of a hub name."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError, match="student directory runs/demos does not exist"):
        load_models("runs/demos", "runs/demos")
