"""`xtoken distill run.yaml`, and the flags of every setting of a run."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from tiny_models import tiny_texts, write_jsonl, write_pair
from typer.testing import CliRunner

from xtoken._files import JsonValue
from xtoken.cli import app
from xtoken.distillation import DistillLossName
from xtoken.errors import OptionError
from xtoken.training import DistillArguments, DistillConfig
from xtoken.training.config import known_settings
from xtoken.training.config_arguments import check_trainer, training_arguments
from xtoken.training.metrics_log import read_history
from xtoken.training.trainer_options import (
    ALIASES,
    OWNED,
    parse_trainer_option,
    trainer_fields,
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run-file")
    write_pair(folder)
    write_jsonl(folder / "data.jsonl", tiny_texts(30))
    return folder


def run_file(workspace: Path, path: Path, **changed: object) -> Path:
    values: dict[str, object] = {
        "student": str(workspace / "student"),
        "teacher": str(workspace / "teacher"),
        "data": str(workspace / "data.jsonl"),
        "teacher_cache": str(workspace / "cache"),
        "out": str(path.parent / path.stem),
        "steps": 2, "top_k": 32, "teacher_top_k": 32, "max_tokens": 60, "device": "cpu",
        "curves": False,
    }  # fmt: skip
    values |= changed
    if path.suffix == ".toml":
        text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
    elif path.suffix == ".yaml":
        # Bare, as people write them: 2e-3 and days are no texts.
        text = "".join(
            f"{name}: {value if isinstance(value, str) else json.dumps(value)}\n"
            for name, value in values.items()
        )
    else:
        text = json.dumps(values)
    path.write_text(text)
    return path


def distill(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["distill", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_file_in_any_notation_is_the_run_that_the_flags_describe(
    workspace: Path, tmp_path: Path
) -> None:
    changed = {"learning_rate": 2e-3, "date": "2024-02-29", "weight_decay": 0.1}
    distill(run_file(workspace, tmp_path / "json.json", **changed))
    distill(run_file(workspace, tmp_path / "toml.toml", **changed))
    distill(run_file(workspace, tmp_path / "yaml.yaml", **(changed | {"learning_rate": "2e-3"})))
    distill(
        *("--student", workspace / "student", "--teacher", workspace / "teacher"),
        *("--data", workspace / "data.jsonl", "--teacher-cache", workspace / "cache"),
        *("--out", tmp_path / "flags", "--max-steps", 2, "--top-k", 32, "--teacher-top-k", 32),
        *("--max-tokens", 60, "--device", "cpu", "--learning-rate", "2e-3"),
        *("--date", "2024-02-29", "--weight-decay", "0.1", "--no-curves"),
    )
    students = {
        (tmp_path / name / "student" / "model.safetensors").read_bytes()
        for name in ("json", "toml", "yaml", "flags")
    }
    assert len(students) == 1
    assert DistillConfig.load(tmp_path / "yaml" / "config.json").learning_rate == 2e-3


def test_flags_go_before_the_file_and_trainer_arguments_reach_the_trainer(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    file = run_file(workspace, tmp_path / "run.yaml", optim="sgd", adam_beta1=0.5)
    out = tmp_path / "elsewhere"
    distill(
        file, "--out", out, "--steps", 1, "--report-to", "tensorboard", "--adam-beta1", "0.8",
        "--no-tail-bucket", "--min-mass", "0.01",
    )  # fmt: skip
    config = DistillConfig.load(out / "config.json")
    assert config.steps == 1
    assert not config.tail_bucket
    assert config.trainer == {
        "optim": "sgd", "adam_beta1": 0.8, "report_to": "tensorboard", "min_mass": 0.01,
    }  # fmt: skip
    arguments = training_arguments(config, out)
    assert (arguments.optim, arguments.adam_beta1, arguments.min_mass) == ("sgd", 0.8, 0.01)
    assert list(out.rglob("events.out.tfevents.*"))
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"stepz": 3}, "unknown setting 'stepz'; known are"),
        ({"max_steps": 3}, "steps is given twice, also as max_steps; pass it once"),
        ({"output_dir": "x"}, "output_dir cannot be set here: the run's folder: --out"),
        ({"num_train_epochs": 3}, "num_train_epochs cannot be set here: a run has steps"),
        ({"data": 7}, "data = 7, expected a text"),
        ({"resume": "yes"}, "resume = 'yes', expected true or false"),
        ({"teacher": [{"path": "x"}]}, "a teacher has 'path', expected some of source, weight"),
        ({"optim": "newton"}, "optim of the trainer: .* correct or leave out"),
        ({"student": None}, "--student is missing; pass it, or write it into the settings file"),
    ],
)
def test_what_a_file_may_not_say(
    workspace: Path, tmp_path: Path, changed: dict[str, object], words: str
) -> None:
    with pytest.raises(Exception, match=words) as found:
        distill(run_file(workspace, tmp_path / "run.json", **changed))
    assert "\n" not in str(found.value)


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    deep = "a: " + "[\n " * 5000  # in one line each level would be looked for keys at each bracket
    for name, content in (
        ("a.yaml", "a: [1"), ("b.toml", "a = "), ("c.yaml", "- 1"), ("d.json", "[]"),
        ("e.yaml", "\xff"), ("f.yaml", deep),
    ):  # fmt: skip
        path = tmp_path / name
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(Exception, match=re.escape(str(path))) as found:
            distill(path)
        assert "\n" not in str(found.value)
    with pytest.raises(Exception, match="does not exist; pass a file of settings in JSON, YAML"):
        distill(tmp_path / "nowhere.yaml")


def test_teachers_in_a_file_have_weights_and_losses(workspace: Path, tmp_path: Path) -> None:
    teachers = [
        {"source": str(workspace / "teacher"), "weight": 0.5, "loss": "p-kl"},
        {"source": str(workspace / "student"), "loss": "same-vocab-kl"},
    ]
    output = distill(run_file(workspace, tmp_path / "run.json", teacher=teachers))
    assert "teacher teacher: p-kl, weight 0.5" in output
    assert "teacher student: same-vocab-kl, weight 1" in output


def test_every_argument_has_a_flag_with_its_default_or_a_reason() -> None:
    result = CliRunner().invoke(app, ["distill", "--help"], env={"COLUMNS": "300"})
    assert result.exit_code == 0
    shown = set(re.findall(r"--[a-z][a-z0-9-]*", result.output))
    for each in dataclasses.fields(DistillArguments):
        if each.name in OWNED:
            assert OWNED[each.name]
        elif each.name == "teacher_weighting":
            assert "--teacher-weights" in shown
        else:
            assert "--" + each.name.replace("_", "-") in shown, each.name
    for name in known_settings() - {"trainer", "teacher_weighting"}:
        assert "--" + name.replace("_", "-") in shown, name
    assert set(ALIASES.values()) <= known_settings()
    assert re.search(r"--adam-beta2 .*default: \(0\.999\)", result.output)
    assert re.search(r"--learning-rate .*default: \(2e-05\)", result.output)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ("--fsdp", "full_shard"),
            "fsdp cannot be set here: the command trains with data",
        ),
        (("--fsdp-config", "x.json"), "DistillTrainer shards, see examples/trainer.py"),
        (("--deepspeed", "x.json"), "deepspeed cannot be set here: the command trains with data"),
        (("--output-dir", "x"), "output_dir cannot be set here: the run's folder: --out"),
        (("--optim", "galore_adamw"), "optim of the trainer: You need"),
        (("--optim-args", "x"), "optim_args of the trainer: not enough values"),
        (("--adam-beta1", "2"), "adam_beta1 of the trainer: Invalid beta"),
        (("--report-to", "nobody"), "report_to of the trainer: nobody is not supported"),
        (
            ("--accelerator-config", "x.json"),
            "accelerator_config of the trainer: [Errno 2] No such file or directory: 'x.json'",
        ),
        (("--torch-compile-backend", "x"), "torch_compile_backend of the trainer: 'X' is not a"),
        (("--lr-scheduler-kwargs", "{"), "lr_scheduler_kwargs is not JSON"),
        (("--dataloader-persistent-workers", "true"), "persistent_workers option needs"),
        (
            ("--on-policy-fraction", "0.5"),
            "teacher_top_k = 32 stores what it says of the training texts; set teacher_top_k to "
            "null (--teacher-top-k none)",
        ),
    ],
)
def test_what_the_trainer_will_refuse_is_refused_before_anything_is_made(
    workspace: Path, tmp_path: Path, flags: tuple[str, str], words: str
) -> None:
    file = run_file(workspace, tmp_path / "run.yaml", teacher_cache=str(tmp_path / "cache"))
    with pytest.raises(OptionError) as caught:
        distill(*flags, file)
    assert words in str(caught.value)
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "run").exists()


def test_a_launch_with_fsdp_is_refused(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(OptionError, match="accelerate launches this with fsdp, but the command"):
        distill(run_file(workspace, tmp_path / "run.yaml"))


def test_the_student_answers_where_the_teacher_runs(workspace: Path, tmp_path: Path) -> None:
    file = run_file(workspace, tmp_path / "run.yaml", teacher_cache=str(tmp_path / "cache"))
    distill(
        *("--on-policy-fraction", "0.5", "--on-policy-max-new-tokens", "4"),
        *("--teacher-top-k", "none", "--kd-weight", "1", file),
    )
    steps = [each for each in read_history(tmp_path / "run" / "metrics.jsonl") if "kd" in each]
    assert sum(each["sampled_tokens"] for each in steps) > 0


def test_another_schedule_takes_the_place_of_the_cosine(tmp_path: Path) -> None:
    def schedule(**trainer: JsonValue) -> tuple[str, object]:
        config = DistillConfig(device="cpu", trainer=trainer)
        check_trainer(config)
        made = training_arguments(config, tmp_path)
        return made.lr_scheduler_type.value, made.lr_scheduler_kwargs

    assert schedule() == ("cosine_with_min_lr", {"min_lr_rate": 0.1})
    assert schedule(lr_scheduler_type="linear")[0] == "linear"
    lowest = schedule(lr_scheduler_kwargs='{"min_lr": 1e-6}')
    assert lowest == ("cosine_with_min_lr", {"min_lr": 1e-6})
    both = schedule(lr_scheduler_kwargs={"num_cycles": 1.5})
    assert both == ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1.5})


def test_values_are_read_as_the_argument_has_them() -> None:
    fields = trainer_fields(known_settings())
    assert parse_trainer_option("adam_beta1", "0.5") == 0.5
    assert parse_trainer_option("gradient_checkpointing", "true") is True
    assert parse_trainer_option("depth_weights", "1.0,0.5") == [1.0, 0.5]
    assert parse_trainer_option("student_top_k", "none") is None
    assert "optim" in fields
    with pytest.raises(OptionError, match="adam-beta1: invalid float value: 'x'; see xtoken dis"):
        parse_trainer_option("adam_beta1", "x")
    with pytest.raises(OptionError, match="adam-beta1: invalid float value: 'none'"):
        parse_trainer_option("adam_beta1", "none")


@pytest.mark.parametrize(
    ("loss", "given"),
    [
        ("p-kl", {"cells": "true", "consistent": "true", "top_k_by": "student"}),
        ("prefix-kl", {"cells": "true", "consistent": "false"}),
        ("exact-kl", {"cells": "none", "carry_levels": "2", "sure": "true"}),
        ("exact-kl", {"min_prob": "0.5"}),
        ("partition-kl", {"mismatch_weight": "0.5"}),
        ("strict-top-k", {"student_top_k": "none"}),
    ],
)
def test_options_of_one_loss_reach_it_from_flags(
    tmp_path: Path, loss: DistillLossName, given: dict[str, str]
) -> None:
    parsed = {name: parse_trainer_option(name, text) for name, text in given.items()}
    config = DistillConfig(loss=loss, kd_weight=1.0, trainer=parsed, device="cpu")
    arguments = training_arguments(config, tmp_path)
    options = dict(arguments.distiller_options(loss))
    spelled = {"true": True, "false": False, "none": None, "2": 2, "0.5": 0.5}
    for name, text in given.items():
        assert options[name] == spelled.get(text, text)
    arguments.check_read([loss])
