"""The help of `xtoken distill`: what it shows is kept, so that it need not import the trainer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from xtoken import cli
from xtoken.cli import app, distill_options, distill_settings
from xtoken.cli.distill_settings import Setting, Settings, kept_settings
from xtoken.distillation.options import LOSS_NAMES
from xtoken.errors import UnavailableCacheWarning
from xtoken.losses.registry import find_loss
from xtoken.training import DistillConfig
from xtoken.training.config_arguments import training_arguments

SOME = Settings([Setting("top_k", ["--top-k"], "Columns.", "512", "Loss")], {"steps": "1"}, {})

HELP = """
import sys
from typer.testing import CliRunner
from xtoken.cli import app

print(CliRunner().invoke(app, ["distill", "--help"]).output)
assert "torch" not in sys.modules
assert "transformers" not in sys.modules
"""


class Finder:
    """Counts how often the settings are found."""

    times = 0

    def __call__(self) -> Settings:
        self.times += 1
        return SOME


@pytest.fixture
def find() -> Finder:
    return Finder()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_settings_are_found_once_and_again_where_the_file_is_damaged(
    find: Finder, cache: Path
) -> None:
    assert kept_settings(find) == kept_settings(find) == SOME
    assert find.times == 1
    (path,) = (cache / "cli").iterdir()
    for damaged in (path.read_text().replace("512", "513"), "[]", "{", ""):
        path.write_text(damaged)
        find.times = 0
        assert kept_settings(find) == kept_settings(find) == SOME
        assert find.times == 1


def test_settings_of_other_versions_are_found_anew(
    find: Finder, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_settings(find)
    monkeypatch.setattr(distill_settings, "version", lambda package: f"{package} of tomorrow")
    kept_settings(find)
    assert find.times == 2
    assert len(list((cache / "cli").iterdir())) == 2


def test_without_a_cache_settings_are_found_each_time(
    find: Finder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XTOKEN_CACHE", "off")
    kept_settings(find)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path / "file"))
    with pytest.warns(UnavailableCacheWarning, match="set XTOKEN_CACHE to another directory"):
        assert kept_settings(find) == SOME
    assert find.times == 2


def test_help_of_kept_settings_is_that_of_settings_just_found(cache: Path) -> None:
    cli._command.cache_clear()
    shown = CliRunner().invoke(app, ["distill", "--help"], env={"COLUMNS": "200"}).output
    assert "--adam-beta2" in shown
    done = subprocess.run(
        [sys.executable, "-c", HELP],
        env=os.environ | {"XTOKEN_CACHE": str(cache), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # The second names its program otherwise.
    assert done.stdout.split("Arguments")[1].split() == shown.split("Arguments")[1].split()


def test_defaults_and_losses_in_the_help_are_those_of_a_run() -> None:
    found = {each.name: each for each in distill_options._find_settings(frozenset()).further}
    config = training_arguments(DistillConfig(device="cpu"), "out")
    assert found["lr_scheduler_type"].default == config.lr_scheduler_type.value
    assert json.loads(found["lr_scheduler_kwargs"].default or "") == config.lr_scheduler_kwargs
    named = set(LOSS_NAMES) & set(re.findall(r"[\w-]+", found["uld_weight"].help or ""))
    assert named
    assert all("uld_weight" in find_loss(loss).options for loss in named)
