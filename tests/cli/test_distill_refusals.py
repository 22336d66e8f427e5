"""What `xtoken distill` refuses before it predicts, trains or writes anything."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_texts, write_jsonl, write_pair
from typer.testing import CliRunner

from xtoken.cli import app
from xtoken.cli.command import _described


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("refusals")
    write_pair(made)
    (made / "texts").mkdir()
    write_jsonl(made / "texts" / "texts.jsonl", tiny_texts(16))
    return made


def distill(workspace: Path, out: Path, *flags: object, **changed: object) -> tuple[int, str]:
    options = {
        "student": workspace / "student",
        "teacher": workspace / "teacher",
        "data": workspace / "texts" / "texts.jsonl",
        "teacher-cache": workspace / "cache",
        "steps": 1,
        "batch-size": 2,
        "max-tokens": 48,
        "device": "cpu",
    } | {name.replace("_", "-"): value for name, value in changed.items()}
    given = [
        part
        for name, value in options.items()
        for part in (f"--{name}", str(value))
        if f"--{name}" not in flags
    ]
    arguments = ["distill", "--out", str(out), "--no-curves", *given, *map(str, flags)]
    done = CliRunner().invoke(app, arguments)
    error = done.exception
    if error is None or isinstance(error, SystemExit):
        return done.exit_code, done.output
    assert isinstance(error, Exception)
    return done.exit_code, _described(error)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("flag", ["--overwrite", "--resume", None])
def test_a_run_never_lies_over_what_it_reads(
    workspace: Path, tmp_path: Path, flag: str | None
) -> None:
    for name in ("student", "teacher", "texts"):
        shutil.copytree(workspace / name, tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "student")
    own = {"student": tmp_path / "student", "teacher": tmp_path / "teacher"}
    before = files(tmp_path)
    flags = [] if flag is None else [flag]
    for out, data, message in (
        ("student", "texts/texts.jsonl", "is what --student reads"),
        ("teacher", "texts/texts.jsonl", "is what --teacher reads"),
        ("link", "texts/texts.jsonl", "is what --student reads"),
        ("texts", "texts", "is what --data reads"),
        ("texts", "texts/texts.jsonl", "lies over --data"),
        ("", "texts", "lies over --student"),
    ):
        _, said = distill(workspace, tmp_path / out, *flags, data=tmp_path / data, **own)
        assert f"{message}" in said, (out, said)
        assert "which would be lost; pass another path" in said
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "out"),
    [
        (("eval", "--model", "student", "--data", "texts/texts.jsonl"), "texts/texts.jsonl"),
        (("eval", "--model", "student", "--data", "texts/texts.jsonl"), "student/config.json"),
        (("report", "pair", "--student", "student", "--teacher", "teacher", "--text", "text.txt"),
         "text.txt"),
        (("report", "alignment", "--student", "student", "--teacher", "teacher", "--text",
          "text.txt"), "text.txt"),
        (("project", "build", "--student", "student", "--teacher", "teacher"),
         "teacher/model.safetensors"),
        (("project", "export", "text.txt"), "text.txt"),
        (("project", "import", "text.txt", "--student", "student", "--teacher", "teacher"),
         "text.txt"),
        (("align", "--student", "student", "--teacher", "teacher", "--batch",
          "texts/texts.jsonl"), "student"),
    ],
)  # fmt: skip
def test_no_command_writes_over_what_it_reads(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    out: str,
) -> None:
    shutil.copytree(workspace, tmp_path, dirs_exist_ok=True)
    (tmp_path / "text.txt").write_text("In 1969 the year was 1969.")
    before = files(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [*arguments, "--out", out])
    assert "which would be lost; pass another path" in str(done.exception)
    assert files(tmp_path) == before


@pytest.mark.parametrize("flag", ["--resume", None])
def test_what_a_run_leaves_that_ended_before_it_began_keeps_no_other_from_its_folder(
    workspace: Path, tmp_path: Path, flag: str | None
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / "teacher-top-k").mkdir()
    flags = [] if flag is None else [flag]
    code, said = distill(workspace, tmp_path / "run", *flags, loss="ce")
    assert code == 0, said
    code, said = distill(workspace, tmp_path / "run", loss="ce")
    assert "holds a run; --resume resumes it" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--loss same-vocab-kl", "loss = 'same-vocab-kl' needs one tokenizer on both sides"),
        ("--loss bpm --direction reverse", "direction = 'reverse' is infinite under bpm"),
        ("--loss h-kl --direction reverse", "direction = 'reverse' with a stored top-512"),
        ("--loss p-kl --top-k-by student --top-k-scope microbatch", "top_k_by = 'student' with"),
        ("--loss p-kl --learnable-projection --cells true", "cells = True with a learnable W"),
        ("--learnable-projection", "learnable_projection = True, but prefix-kl trains no weight"),
        ("--threshold 0.3", "threshold = 0.3 is not an option of prefix-kl"),
        ("--loss p-kl --min-prob 0.3", "min_prob = 0.3 is not an option of p-kl"),
        ("--loss uld --uld-weight 2", "uld_weight = 2.0 is not an option of uld"),
        ("--compare --direction reverse", "gold, which is trained too: direction = 'reverse'"),
        (
            "--dataloader-drop-last true --batch-size 57",
            "dataloader_drop_last = True with batch_size = 57 leaves nothing of",
        ),
        ("--seed 99999999999", "seed = 99999999999, expected below 2**32"),
        ("--torch-compile-mode foo", "torch_compile_mode of the trainer: Unrecognized mode=foo"),
        ("--optim galore_adamw --optim-target-modules all", "of the trainer: You need to install"),
        ("--optim apollo_adamw --optim-target-modules all", "of the trainer: You need to install"),
        (
            '--gradient-checkpointing true --gradient-checkpointing-kwargs {"foo":1}',
            "checkpointing_kwargs has 'foo', expected of context_fn",
        ),
        (
            '--gradient-checkpointing-kwargs {"use_reentrant":true}',
            "checkpointing_kwargs without",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_options_that_do_not_go_together_are_refused_before_the_teacher_predicts(
    workspace: Path, tmp_path: Path, flags: str, message: str, dry: tuple[str, ...]
) -> None:
    cache = tmp_path / "cache"
    _, said = distill(workspace, tmp_path / "run", *flags.split(), *dry, teacher_cache=cache)
    assert message in said
    assert not cache.exists()
    assert not (tmp_path / "run").exists()


def test_what_a_comparison_trains_besides_does_without_what_it_does_not_read(
    workspace: Path, tmp_path: Path
) -> None:
    flags = ("--compare", "--loss", "p-kl", "--learnable-projection")
    code, said = distill(workspace, tmp_path / "run", *flags)
    assert code == 0, said
    assert json.loads((tmp_path / "run" / "config.json").read_text())["learnable_projection"]
    beside = tmp_path / "run" / "compare" / "gold" / "config.json"
    assert not json.loads(beside.read_text())["learnable_projection"]


def test_a_run_that_fails_before_its_first_step_leaves_its_folder_to_the_corrected_command(
    workspace: Path, tmp_path: Path
) -> None:
    student = tmp_path / "student"
    shutil.copytree(workspace / "student", student)
    weights = load_file(student / "model.safetensors")
    lost = {name: torch.full_like(value, math.nan) for name, value in weights.items()}
    save_file(lost, student / "model.safetensors", {"format": "pt"})
    code, _ = distill(workspace, tmp_path / "run", student=student)
    assert code == 1
    shutil.copyfile(workspace / "student" / "model.safetensors", student / "model.safetensors")
    code, said = distill(workspace, tmp_path / "run", student=student)
    assert code == 0, said


def test_a_student_that_diverged_is_told_to_begin_anew_as_a_resumed_run_keeps_its_rate(
    workspace: Path, tmp_path: Path
) -> None:
    flags = ("--checkpoint-every", "1", "--learning-rate")
    _, said = distill(workspace, tmp_path / "run", *flags, "1e9", steps=4)
    assert "begin anew with a learning_rate below 1000000000.0" in said
    _, said = distill(workspace, tmp_path / "run", *flags, "1e-3", "--resume", steps=4)
    assert "learning_rate = 1000000000.0 there and 0.001 here" in said
    code, said = distill(workspace, tmp_path / "run", *flags, "1e-3", "--overwrite", steps=4)
    assert code == 0, said
