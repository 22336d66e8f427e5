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

from demo.student import train_tokenizer, write_llama
from xtoken.cli import app
from xtoken.cli.command import _described
from xtoken.teachers import TopKStore


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


def test_a_wrong_choice_of_kernels_is_refused_before_the_teacher_predicts(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XTOKEN_KERNELS", "trito")
    _, said = distill(workspace, tmp_path / "run", teacher_cache=tmp_path / "cache")
    assert "XTOKEN_KERNELS = 'trito', expected one of auto, torch, triton" in said
    assert not (tmp_path / "cache").exists()


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


@pytest.fixture(scope="module")
def store(workspace: Path) -> Path:
    """Of 64 columns."""
    out = workspace / "store"
    data = workspace / "texts" / "texts.jsonl"
    flags = ("--teacher", workspace / "teacher", "--data", data, "--out", out, "--top-k", 64)
    done = CliRunner().invoke(app, ["teach", *map(str, flags)])
    assert done.exit_code == 0, done.output
    return out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--temperature 2", "temperature = 2.0 under prefix-kl needs the teacher's full logits, "
         "but the store {store} holds its likeliest 64 columns; leave it out, fill a store by"),
        ("--merge mean --loss p-kl", "merge = 'mean' needs the teacher's full logits, but the sto"),
        ("--teacher-top-k 128", "teacher_top_k = 128, but the store {store} holds 64 columns; le"),
        ("--teacher-top-k none", "teacher_top_k = None, but the store {store} holds 64 columns"),
        ("--top-k 500", "top_k = 500, but the store {store} holds 64 columns; lower it to 64, or"),
        ("--on-policy-fraction 0.5", "pass --teacher in its place, and --teacher-top-k none"),
        ("--teacher-dtype bfloat16", "teacher_dtype = bfloat16 is of a teacher that is loaded"),
    ],
)  # fmt: skip
def test_what_a_store_bounds_is_told_by_the_store(
    workspace: Path, tmp_path: Path, store: Path, flags: str, message: str
) -> None:
    _, said = distill(workspace, tmp_path / "run", *flags.split(), teacher_store=store)
    assert message.format(store=store) in said


def test_columns_of_a_store_and_of_the_run_that_read_it_are_no_contradiction(
    workspace: Path, tmp_path: Path, store: Path
) -> None:
    flags = ("--teacher-top-k", "64")
    code, said = distill(workspace, tmp_path / "run", *flags, teacher_store=store)
    assert code == 0, said
    again = ("--config", tmp_path / "run" / "config.json")
    code, said = distill(workspace, tmp_path / "again", *again, teacher_store=store)
    assert code == 0, said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--temperature 2",
            "temperature = 2.0 under prefix-kl needs the teacher's full logits, of",
        ),
        ("--on-policy-fraction 0.5", "on_policy_fraction = 0.5 with --teacher-url: the command"),
    ],
)
def test_what_a_server_does_not_give_is_told_by_the_server(
    workspace: Path, tmp_path: Path, flags: str, message: str
) -> None:
    served = ("--teacher-url", "http://localhost:9")
    _, said = distill(workspace, tmp_path / "run", *served, *flags.split())
    assert message in said
    assert "pass --teacher without --teacher-url, with --teacher-top-k none" in said


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of 300 columns."""
    folder = tmp_path_factory.mktemp("narrow")
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 16,
    }
    write_llama(folder, train_tokenizer(tiny_texts(60), vocab_size=300), seed=3, **sizes)
    return folder


def test_defaults_ask_for_no_more_columns_than_a_teacher_has(
    workspace: Path, tmp_path: Path, narrow: Path
) -> None:
    code, said = distill(workspace, tmp_path / "run", teacher=narrow)
    assert code == 0, said
    assert "teacher_top_k and top_k = 300: the teacher" in " ".join(said.split())
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (settings["top_k"], settings["teacher_top_k"]) == (300, 300)
    for flag, name in (("--top-k", "top_k"), ("--teacher-top-k", "teacher_top_k")):
        _, said = distill(workspace, tmp_path / "other", flag, 400, teacher=narrow)
        assert f"{name} = 400, but the teacher {narrow} has 300 columns; pass {flag} 300" in said
    # Of fewer stored columns the loss takes as many.
    code, said = distill(workspace, tmp_path / "fewer", "--teacher-top-k", 200, teacher=narrow)
    assert code == 0, said
    data = workspace / "texts" / "texts.jsonl"
    flags = ("--teacher", narrow, "--data", data, "--out", tmp_path / "store")
    done = CliRunner().invoke(app, ["teach", *map(str, flags)])
    assert done.exit_code == 0, done.output
    assert TopKStore.open(tmp_path / "store").key.top_k == 300


@pytest.mark.parametrize("given", ["aot_eager", "false"])
def test_a_flag_takes_what_a_file_of_settings_takes(
    workspace: Path, tmp_path: Path, given: str
) -> None:
    code, said = distill(workspace, tmp_path / "run", "--compiled", given)
    assert code == 0, said
    written = json.loads((tmp_path / "run" / "config.json").read_text())["trainer"]["compiled"]
    assert written == (given if given != "false" else False)


def test_nothing_is_spelled_as_a_file_of_settings_spells_it(
    workspace: Path, tmp_path: Path
) -> None:
    (tmp_path / "settings.yaml").write_text("teacher_top_k: None\n")
    flags = ("--config", tmp_path / "settings.yaml")
    _, said = distill(workspace, tmp_path / "run", *flags)
    assert "teacher_top_k = 'None', expected a whole number or null" in said


@pytest.mark.parametrize("command", ["distill", "teach", "eval"])
def test_a_split_is_refused_where_no_source_has_any(
    workspace: Path, tmp_path: Path, command: str
) -> None:
    data = workspace / "texts" / "texts.jsonl"
    options = {
        "distill": ("--student", "student", "--teacher", "teacher", "--out", tmp_path / "out"),
        "teach": ("--teacher", "teacher", "--out", tmp_path / "out"),
        "eval": ("--model", "student"),
    }[command]
    flags = [workspace / each if each in ("student", "teacher") else each for each in options]
    for split in ("validation", "train[:10%]"):
        arguments = [command, *map(str, flags), "--data", str(data), "--split", split]
        done = CliRunner().invoke(app, arguments)
        said = f"--split {split}, but {data} is a file without splits; leave it out"
        assert said in str(done.exception)


def test_texts_of_a_file_are_held_out_beside_the_split_of_a_folder(
    workspace: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "test.jsonl", tiny_texts(16))
    held_out = write_jsonl(tmp_path / "held.jsonl", tiny_texts(30)[-4:])
    flags = ("--split", "test", "--held-out", held_out, "--loss", "ce")
    code, said = distill(workspace, tmp_path / "run", *flags, data=tmp_path / "data")
    assert code == 0, said


def test_too_few_texts_are_told_what_the_command_takes(workspace: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "one.jsonl", tiny_texts(8)[:1])
    _, said = distill(workspace, tmp_path / "run", data=data)
    assert "give more texts, or others to hold out by --held-out" in said
    assert "another fraction" not in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--beta 0.3", "beta = 0.3 is read with direction = 'jsd' alone; set that too, or leave"),
        ("--loss p-kl --projection-learning-rate 0.1", "is read with learnable_projection alone"),
        ("--compare --beta 0.3", "beta = 0.3 is read with direction = 'jsd' alone"),
        ("--loss p-kl --teacher-loss h-kl", "--loss p-kl and --teacher-loss h-kl are of one teac"),
        ("--on-policy-top-p 0.5", "on_policy_top_p = 0.5 is read with on_policy_fraction alone"),
        ("--on-policy-url http://localhost:1", "is read with on_policy_fraction alone; set that"),
    ],
)
def test_a_setting_that_another_has_to_ask_for_is_not_ignored(
    workspace: Path, tmp_path: Path, flags: str, message: str
) -> None:
    _, said = distill(workspace, tmp_path / "run", *flags.split())
    assert message in said


def test_the_loss_of_the_only_teacher_is_that_of_the_run(workspace: Path, tmp_path: Path) -> None:
    code, said = distill(workspace, tmp_path / "run", "--teacher-loss", "p-kl")
    assert code == 0, said
    assert json.loads((tmp_path / "run" / "config.json").read_text())["loss"] == "p-kl"
    assert "p-kl" in (tmp_path / "run" / "comparison.md").read_text()
    again = ("--resume", "--teacher-loss", "prefix-kl")
    code, said = distill(workspace, tmp_path / "run", *again)
    assert code == 1
    assert "loss" in said
