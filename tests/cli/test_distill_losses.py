"""Every loss of the library is a name of `xtoken distill`, with its direction and options."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny_models import tiny_texts, write_jsonl, write_pair
from typer.testing import CliRunner

from xtoken import Pair
from xtoken.cli import app
from xtoken.distillation.options import LOSS_NAMES
from xtoken.training import DistillConfig


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("losses")
    write_pair(made)
    write_jsonl(made / "texts.jsonl", tiny_texts(16))
    return made


def distill(workspace: Path, teacher: str, out: Path, *flags: str) -> dict[str, object]:
    arguments = [
        *("distill", "--student", str(workspace / "student")),
        *("--teacher", str(workspace / teacher), "--data", str(workspace / "texts.jsonl")),
        *("--out", str(out), "--steps", "1", "--batch-size", "2", "--max-tokens", "48"),
        *("--device", "cpu", "--teacher-cache", str(workspace / "cache"), "--no-curves", *flags),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    settings: dict[str, object] = json.loads((out / "config.json").read_text())
    records = (out / "metrics.jsonl").read_text().splitlines()
    assert any("ce" in json.loads(record) for record in records)
    return settings


@pytest.mark.parametrize("loss", [name for name in LOSS_NAMES if name != "same-vocab-kl"])
def test_a_loss_is_trained_by_its_name(workspace: Path, tmp_path: Path, loss: str) -> None:
    assert distill(workspace, "teacher", tmp_path / "run", "--loss", loss)["loss"] == loss


def test_a_teacher_of_the_same_tokenizer_is_trained_on_without_w(
    workspace: Path, tmp_path: Path
) -> None:
    distill(workspace, "student", tmp_path / "run", "--loss", "same-vocab-kl")


def test_direction_and_learned_weights_of_w_are_options(workspace: Path, tmp_path: Path) -> None:
    flags = ("--loss", "p-kl", "--direction", "jsd", "--beta", "0.25", "--learnable-projection")
    settings = distill(workspace, "teacher", tmp_path / "run", *flags)
    assert (settings["direction"], settings["beta"]) == ("jsd", 0.25)
    assert settings["learnable_projection"] is True


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("uld", "--top-k", "64", "--teacher-top-k", "none"), "top_k = 64 is not an option of uld"),
        (("alm", "--merge", "last"), "merge = 'last' is not an option of alm; it reads"),
        (("ce", "--temperature", "3"), "not an option of ce; it has no teacher"),
        (("p-kl", "--max-depth", "2"), "prefix_max_depth = 2 is not an option of p-kl"),
        (("p-kl", "--threshold", "0.9"), "threshold = 0.9 is not an option of p-kl"),
    ],
)
def test_an_option_that_the_loss_does_not_read_is_refused(
    workspace: Path, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(AssertionError, match=re.escape(message)):
        distill(workspace, "teacher", tmp_path / "run", "--loss", *flags)


def test_an_option_of_a_settings_file_is_refused_as_a_flag_is(
    workspace: Path, tmp_path: Path
) -> None:
    (tmp_path / "settings.json").write_text('{"loss": "uld", "direction": "reverse"}')
    with pytest.raises(AssertionError, match="direction = 'reverse' is not an option of uld"):
        distill(workspace, "teacher", tmp_path / "run", "--config", str(tmp_path / "settings.json"))


def test_losses_that_are_compared_read_what_they_know(workspace: Path, tmp_path: Path) -> None:
    flags = ("--loss", "h-kl", "--compare", "--threshold", "0.9", "--top-k", "64")
    settings = distill(workspace, "teacher", tmp_path / "run", *flags)
    assert settings["trainer"] == {"threshold": 0.9}
    kept = json.loads((tmp_path / "run" / "compare" / "gold" / "config.json").read_text())
    assert (kept["top_k"], kept["trainer"]) == (64, {})


def test_auto_is_the_loss_that_the_audit_recommends(workspace: Path, tmp_path: Path) -> None:
    pair = Pair(str(workspace / "student"), str(workspace / "teacher"))
    recommended = pair.audit().recommendation
    assert recommended == DistillConfig().loss  # the audit and the default agree
    for loss in ("auto", recommended):
        distill(workspace, "teacher", tmp_path / loss, "--loss", loss)
    students = [
        (tmp_path / loss / "student" / "model.safetensors").read_bytes()
        for loss in ("auto", recommended)
    ]
    assert students[0] == students[1]
