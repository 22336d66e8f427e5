"""The command `xtoken distill`, end to end and with bad input."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from forked import Forked
from tiny_models import tiny_texts, write_jsonl, write_pair
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from xtoken.cli import app, main
from xtoken.training import DistillConfig
from xtoken.training.metrics_log import read_history


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    write_pair(folder)
    write_jsonl(folder / "data.jsonl", tiny_texts(60))
    settings = DistillConfig(
        steps=4, batch_size=3, top_k=32, teacher_top_k=32, max_tokens=80, learning_rate=3e-3,
        curves=False,
    )  # fmt: skip
    settings.save(folder / "config.json")
    return folder


def arguments(workspace: Path, **changed: object) -> list[str]:
    options: dict[str, object] = {
        "student": workspace / "student",
        "teacher": workspace / "teacher",
        "data": workspace / "data.jsonl",
        "config": workspace / "config.json",
        "teacher-cache": workspace / "cache",
        "device": "cpu",
    } | {name.replace("_", "-"): value for name, value in changed.items()}
    return [
        "distill",
        *(part for name, value in options.items() for part in (f"--{name}", str(value))),
    ]


def distill(workspace: Path, *flags: str, **changed: object) -> str:
    result = CliRunner().invoke(app, [*arguments(workspace, **changed), *flags])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def compared(workspace: Path) -> tuple[Path, str]:
    """The folder of a comparison that nothing ended, and what it said."""
    out = workspace / "compared"
    return out, distill(workspace, "--compare", "--curves", out=out)


def test_a_comparison_trains_all_losses_and_writes_everything(compared: tuple[Path, str]) -> None:
    out, output = compared
    assert "W: " in output
    assert "alignment" in output
    for loss in ("before", "prefix-kl", "p-kl", "gold", "ce"):
        assert loss in output
    for folder, loss in (
        (out, "prefix-kl"),
        (out / "compare" / "p-kl", "p-kl"),
        (out / "compare" / "gold", "gold"),
        (out / "compare" / "ce", "ce"),
    ):
        assert DistillConfig.load(folder / "config.json").loss == loss
        assert (folder / "curves.png").stat().st_size > 1000
        assert (folder / "projection.safetensors").is_file()
        assert len([r for r in read_history(folder / "metrics.jsonl") if "ce" in r]) == 4
        AutoModelForCausalLM.from_pretrained(folder / "student")
        assert AutoTokenizer.from_pretrained(folder / "student")("201").input_ids[1:]
    results = json.loads((out / "comparison.json").read_text())
    assert [result["loss"] for result in results] == ["prefix-kl", "p-kl", "gold", "ce"]
    # All start from the same student and see the same held-out text.
    assert all(result["before"] == results[0]["before"] for result in results)
    assert len({result["after"]["bits_per_byte"] for result in results}) == 4
    table = (out / "comparison.md").read_text()
    assert table.count("\n| ") == 5
    assert (out / "comparison.png").is_file()


def test_a_run_tells_before_it_starts_what_is_cut(workspace: Path, tmp_path: Path) -> None:
    def said(max_tokens: int) -> str:
        output = distill(
            workspace, "--dry-run", out=tmp_path / "out", teacher_top_k="none",
            max_tokens=max_tokens,
        )  # fmt: skip
        return " ".join(output.split())

    many = said(40)
    assert re.search(
        r"warning: \d\d of \d\d training examples are cut at max_tokens = 40; raise it", many
    )
    few = said(150)
    assert re.search(r"training examples: \d+ cut at max_tokens", few)
    assert "warning" not in few
    assert " cut at" not in said(400)


def test_a_second_run_reads_the_stored_teacher_and_options_override_the_file(
    workspace: Path,
) -> None:
    cache = workspace / "cache-2"
    distill(workspace, out=workspace / "first", teacher_cache=cache, steps=1)
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert files
    output = distill(
        workspace, out=workspace / "second", teacher_cache=cache, steps=2, kd_weight=0.5, seed=3
    )
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == files
    assert "0 of them computed now" in " ".join(output.split())
    config = DistillConfig.load(workspace / "second" / "config.json")
    assert (config.steps, config.kd_weight, config.seed, config.top_k) == (2, 0.5, 3, 32)


def test_predictions_are_kept_in_the_cache_or_else_with_the_run(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, folder in (
        (str(tmp_path / "cache"), tmp_path / "cache" / "teachers"),
        ("off", tmp_path / "off" / "teacher-top-k"),
    ):
        monkeypatch.setenv("XTOKEN_CACHE", variable)
        options = arguments(workspace, out=tmp_path / Path(variable).name, steps=1, seed=1)
        position = options.index("--teacher-cache")
        del options[position : position + 2]
        assert CliRunner().invoke(app, [*options, "--overwrite"]).exit_code == 0
        assert list(folder.rglob("*.safetensors"))


def test_ce_needs_no_teacher_model(workspace: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(workspace / "teacher", teacher)
    (teacher / "model.safetensors").unlink()
    distill(workspace, out=tmp_path / "run", teacher=teacher, loss="ce", steps=1)


def test_held_out_texts_can_be_given_and_are_dropped_from_training(
    workspace: Path, tmp_path: Path
) -> None:
    held_out = write_jsonl(tmp_path / "held_out.jsonl", tiny_texts(60)[:5])
    out = tmp_path / "run[v2]"
    output = distill(workspace, out=out, held_out=held_out, loss="ce", steps=1)
    assert "5 repeated or held-out texts were dropped" in output
    assert "/run[v2]" in output.replace(" ", "").replace("\n", "")


def test_a_used_output_directory_is_kept_unless_told(workspace: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    output = distill(workspace, "--curves", out=out, loss="ce", steps=1)
    assert "student, projection, metrics and curves are in" in output
    assert (out / "curves.png").is_file()
    assert "curves.png" in (out / "SHA256SUMS").read_text()
    with pytest.raises(Exception, match="a run; --resume resumes it; pass another path, or"):
        distill(workspace, out=out, loss="ce", steps=1)
    with pytest.raises(Exception, match=r"another run: steps = 1 there and 2 here; repeat the com"):
        distill(workspace, "--resume", out=out, loss="ce", steps=2)
    with pytest.raises(Exception, match="--overwrite replaces it; pass one of them"):
        distill(workspace, "--resume", "--overwrite", out=out, loss="ce", steps=1)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear reader")
    with pytest.raises(Exception, match="is not empty; pass another path, or --overwrite"):
        distill(workspace, out=foreign, loss="ce", steps=1)
    with pytest.raises(Exception, match="is not empty, and holds no run to resume"):
        distill(workspace, "--resume", out=foreign, loss="ce", steps=1)
    output = distill(workspace, "--overwrite", out=out, loss="ce", steps=2)
    assert DistillConfig.load(out / "config.json").steps == 2
    # Nor is a picture of the run before left beside the metrics of this one.
    assert "student, projection and metrics are in" in output
    assert not (out / "curves.png").exists()
    sums = (out / "SHA256SUMS").read_text()
    assert "curves.png" not in sums
    # A finished run is not trained again, but drawn where that is asked for now.
    output = distill(workspace, "--resume", "--curves", out=out, loss="ce", steps=2)
    assert "student, projection, metrics and curves are in" in output
    checksum = hashlib.sha256((out / "curves.png").read_bytes()).hexdigest()
    lines = (out / "SHA256SUMS").read_text().splitlines()
    assert sorted(lines) == sorted([*sums.splitlines(), f"{checksum}  curves.png"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"student": "nowhere"}, "student directory nowhere does not exist"),
        ({"teacher": "nowhere"}, "teacher directory nowhere does not exist"),
        ({"student": __file__}, f"student directory {__file__} is a file; pass a directory"),
        ({"teacher": __file__}, f"teacher directory {__file__} is a file; pass a directory"),
        ({"data": "nowhere.jsonl"}, "data file nowhere.jsonl does not exist"),
        ({"config": "nowhere.json"}, "nowhere.json does not exist"),
        ({"loss": "kl"}, "loss = 'kl', expected one of"),
        ({"steps": 0}, "steps = 0, expected at least 1"),
        ({"kd_weight": "much"}, "--kd-weight much, expected a number or 'balanced'"),
        ({"checkpoint_every": -1}, "checkpoint_every = -1, expected at least 0"),
        ({"mixed_precision": "fp16"}, "mixed_precision = 'fp16', expected one of 'no', 'bf16'"),
        ({"teacher_dtype": "int8"}, "teacher_dtype = 'int8', expected one of 'float32', 'bfloat"),
        ({"top_k": 99}, "top_k = 99, expected at most teacher_top_k = 32"),
        ({"text_field": "body"}, "has no string in field 'body'"),
    ],
)
def test_a_bad_option_is_one_line_on_stderr(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, object],
    message: str,
) -> None:
    command = ["xtoken", *arguments(workspace, out=tmp_path / "run", **changed)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    errors = capsys.readouterr().err
    assert stopped.value.code == 1
    assert message in errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1


def test_a_directory_that_is_no_model_is_refused(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"has no config\.json; save the model and its tokenizer"):
        distill(workspace, out=tmp_path / "run", student=tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(workspace / "student", broken)
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(Exception, match="has no tokenizer that transformers can read"):
        distill(workspace, out=tmp_path / "run", student=broken)
    shutil.copyfile(workspace / "student" / "tokenizer.json", broken / "tokenizer.json")
    (broken / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(Exception, match="has no model that transformers can load"):
        distill(workspace, out=tmp_path / "run", student=broken)


def test_a_tokenizer_of_another_model_is_refused(workspace: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(workspace / "teacher", mixed)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(workspace / "student" / name, mixed / name)
    with pytest.raises(Exception, match=r"has 1700 tokens, its model only 800 columns"):
        distill(workspace, out=tmp_path / "run", teacher=mixed)


DIES = """
import os
import signal
import sys

from transformers import Trainer

from xtoken.cli import main

writes = int(sys.argv.pop(1))
write_random_state = Trainer._save_rng_state


def die_in_the_middle(trainer, folder):
    global writes
    writes -= 1
    if writes == 0:
        # Weights and optimizer of the checkpoint are written, the rest is not.
        os.kill(os.getpid(), signal.SIGKILL)
    write_random_state(trainer, folder)


Trainer._save_rng_state = die_in_the_middle
main()
"""


def test_a_comparison_killed_in_the_middle_of_checkpoints_goes_on_to_the_same_students(
    workspace: Path, compared: tuple[Path, str], tmp_path: Path
) -> None:
    (whole, _), out = compared, tmp_path / "run"
    # Four steps: the first sitting ends in the last checkpoint of the first loss, the second in
    # the last of the second, once it has written one of the first and one of the second.
    for writes, broken in ((2, out), (3, out / "compare" / "p-kl")):
        options = [*arguments(workspace, out=out, checkpoint_every=2), "--compare", "--resume"]
        killed = Forked(DIES, writes, *options)
        _, errors = killed.communicate()
        assert killed.returncode == -signal.SIGKILL, errors
        assert (broken / "checkpoint-4" / "optimizer.pt").is_file()
        assert not (broken / "checkpoint-4" / "run.json").exists()
    first_result = (out / "result.json").read_bytes()
    output = distill(workspace, "--compare", "--resume", out=out, checkpoint_every=2)
    assert "prefix-kl: all 4 steps were done earlier" in output
    assert "p-kl: went on from step 2 of 4" in output
    assert "gold: there was no whole checkpoint; it ran from the beginning" in output
    assert (out / "result.json").read_bytes() == first_result
    for folder in ("", "compare/p-kl", "compare/gold", "compare/ce"):
        for name in ("student/model.safetensors", "metrics.jsonl"):
            expected = (whole / folder / name).read_bytes()
            assert (out / folder / name).read_bytes() == expected, (folder, name)
    tables = [json.loads((folder / "comparison.json").read_text()) for folder in (whole, out)]
    for row in (*tables[0], *tables[1]):
        row["seconds"] = 0
    assert tables[0] == tables[1]


def test_overwrite_forgets_the_runs_of_an_earlier_comparison(
    workspace: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for loss in ("p-kl", "ce"):
        (out / "compare" / loss).mkdir(parents=True)
        (out / "compare" / loss / "result.json").write_text("{}")
    distill(workspace, "--compare", "--overwrite", out=out, steps=1)
    output = distill(workspace, "--compare", "--resume", out=out, steps=1)
    for loss in ("prefix-kl", "p-kl", "gold", "ce"):
        assert f"{loss}: all 1 steps were done earlier" in output
    output = distill(workspace, "--curves", "--resume", out=out, steps=1)
    assert (out / "curves.png").is_file()
    assert "student, projection, metrics and curves are in" in output


def test_a_run_that_ended_while_its_teacher_predicted_can_be_resumed(
    workspace: Path, tmp_path: Path
) -> None:
    (tmp_path / "run" / "teacher-top-k").mkdir(parents=True)
    output = distill(workspace, "--resume", out=tmp_path / "run", loss="ce", steps=1)
    assert "ce: there was no whole checkpoint; it ran from the beginning" in output
