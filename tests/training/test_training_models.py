"""Where a student and a teacher come from: directories, and models of a hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import write_pair

from xtoken.errors import MissingFileError
from xtoken.training import load_models

LOAD = """
from xtoken.training import load_models
models = load_models("owner/student", "owner/teacher")
print(len(models.pair.student_vocab), models.load_student().config.vocab_size)
"""


def test_models_are_found_by_their_hub_names(tmp_path: Path) -> None:
    for side, source in zip(("student", "teacher"), write_pair(tmp_path / "pair"), strict=True):
        # The layout of a hub's local cache: what a download leaves behind.
        model = tmp_path / "hub" / f"models--owner--{side}"
        (model / "refs").mkdir(parents=True)
        (model / "refs" / "main").write_text("0" * 40)
        shutil.copytree(source, model / "snapshots" / ("0" * 40))
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["1700", "1700"], done.stderr


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
