"""`xtoken distill` with several teachers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import tiny_texts, write_jsonl, write_pair
from typer.testing import CliRunner

from xtoken.cli import app
from xtoken.cli.teachers import TeacherOption, parse_teachers
from xtoken.errors import OptionError
from xtoken.projection import Projection
from xtoken.training import DistillConfig
from xtoken.training.metrics_log import read_history


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    write_pair(folder)
    (folder / "student").rename(folder / "word")
    (folder / "teacher").rename(folder / "digit")
    write_jsonl(folder / "data.jsonl", tiny_texts(40))
    DistillConfig(
        steps=3,
        top_k=32,
        teacher_top_k=32,
        max_tokens=80,
        kd_weight=1.0,
        learning_rate=3e-3,
        curves=False,
    ).save(folder / "config.json")
    return folder


def distill(workspace: Path, out: Path, *flags: str, data: Path | None = None) -> str:
    result = CliRunner().invoke(
        app,
        [
            *("distill", "--student", str(workspace / "word"), "--out", str(out)),
            *("--data", str(data or workspace / "data.jsonl"), "--device", "cpu"),
            *("--config", str(workspace / "config.json")),
            *("--teacher-cache", str(workspace / "cache"), *flags),
        ],
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def last(out: Path) -> dict[str, float]:
    return next(line for line in read_history(out / "metrics.jsonl") if "kd" in line)


def test_two_teachers_each_with_its_weight_loss_and_projection(
    workspace: Path, tmp_path: Path
) -> None:
    word, digit = str(workspace / "word"), str(workspace / "digit")
    flags = ("--loss", "p-kl")
    distill(workspace, tmp_path / "a", "--teacher", word, *flags)
    distill(workspace, tmp_path / "b", "--teacher", digit, "--loss", "gold")
    losses = ("--teacher-loss", "p-kl", "--teacher-loss", "gold")
    distill(workspace, tmp_path / "ab", "--teacher", word, "--teacher", f"{digit}=0.25", *losses)
    one, two, both = (last(tmp_path / name) for name in ("a", "b", "ab"))
    assert both["kd"] == pytest.approx(one["kd"] + 0.25 * two["kd"], rel=1e-4)
    shapes = [Projection.load(tmp_path / "ab" / n).shape for n in FILES]
    assert shapes == [(1700, 1700), (1700, 800)]
    assert all(name in (tmp_path / "ab" / "SHA256SUMS").read_text() for name in FILES)


FILES = ("projection.safetensors", "projection-1.safetensors")


def test_a_run_of_other_weights_is_not_resumed(workspace: Path, tmp_path: Path) -> None:
    teachers = [f"--teacher={workspace / name}" for name in ("word", "digit")]
    weighted = [teachers[0], f"{teachers[1]}=2"]
    distill(workspace, tmp_path / "run", *weighted)
    output = distill(workspace, tmp_path / "run", *weighted, "--resume")
    assert "all 3 steps were done earlier" in output
    with pytest.raises(Exception, match=r"teacher_weighting = None there and 'entropy' here"):
        distill(workspace, tmp_path / "run", *teachers, "--teacher-weights", "entropy", "--resume")
    with pytest.raises(Exception, match="other weights of the teacher"):
        distill(workspace, tmp_path / "run", *teachers, "--resume")


def test_a_column_of_the_data_names_the_teachers_of_a_row(workspace: Path, tmp_path: Path) -> None:
    texts = tiny_texts(40)
    data = tmp_path / "data.jsonl"
    names = ("word", "digit", ["word", "digit"], None)
    lines = [json.dumps({"text": text, "teach": names[at % 4]}) for at, text in enumerate(texts)]
    data.write_text("\n".join(lines))
    teachers = [f"--teacher={workspace / name}" for name in ("word", "digit")]
    output = distill(workspace, tmp_path / "run", *teachers, "--teacher-column=teach", data=data)
    assert "student, projection and metrics are in" in output
    with pytest.raises(Exception, match=r"no row of .* has a column 'teacher'"):
        distill(workspace, tmp_path / "x", *teachers, "--teacher-column=teacher", data=data)
    data.write_text(data.read_text().replace('"digit"', '"numbers"'))
    with pytest.raises(Exception, match="names 'numbers', expected one of word, digit"):
        distill(workspace, tmp_path / "y", *teachers, "--teacher-column=teach", data=data)


def test_the_weight_of_an_only_teacher_is_refused(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"weight = 0\.25 weighs several teachers, and 1 is given"):
        distill(workspace, tmp_path / "run", f"--teacher={workspace / 'digit'}=0.25")


def test_teachers_are_read_from_options() -> None:
    assert parse_teachers(["a", "b/c=0.8", "d=e=2"]) == [
        TeacherOption("a"), TeacherOption("b/c", 0.8), TeacherOption("d=e", 2.0),
    ]  # fmt: skip
    stores = [Path("s"), Path("t")]
    assert [each.store for each in parse_teachers([], stores)] == stores
    assert parse_teachers(["a", "b"], stores, ["p-kl", "gold"])[1] == TeacherOption(
        "b", 1.0, Path("t"), "gold"
    )
    for given, words in (
        (([],), "no teacher was given"),
        ((["a", "b"], stores[:1]), "1 --teacher-store and 2 --teacher"),
        ((["a=x"],), "--teacher a=x, expected a number after '='"),
        ((["a=-1"],), "expected a weight of at least 0"),
        ((["a", "b"], [], ["p-kl"]), "1 --teacher-loss for 2 teachers"),
        ((["a"], [], ["kl"]), "--teacher-loss kl, expected one of"),
    ):
        with pytest.raises(OptionError, match=words):
            parse_teachers(*given)
