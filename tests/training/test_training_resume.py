"""An interrupted run goes on to the student, and the record, of one that was never interrupted."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_texts, write_pair
from transformers import AutoModelForCausalLM

from xtoken._files import sealed
from xtoken.data import split_held_out
from xtoken.errors import DamagedCheckpointWarning, ResumeError
from xtoken.projection import Projection
from xtoken.training import (
    DistillConfig,
    PreparedData,
    last_whole_checkpoint,
    load_models,
    open_teachers,
    prepare,
    train,
)
from xtoken.training.metrics_log import read_history
from xtoken.training.run import RunResult

# Four steps an epoch, so that epochs end at, before and after checkpoints.
CONFIG = DistillConfig(
    steps=10,
    batch_size=4,
    top_k=32,
    teacher_top_k=32,
    max_tokens=48,
    learning_rate=1e-2,
    warmup_steps=2,
    eval_every=4,
    device="cpu",
    curves=False,
)
SAVING = replace(CONFIG, checkpoint_every=3)


def write_dropout(student: Path) -> None:
    """Let a student draw random numbers in every step: their state must come back too."""
    path = student / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": 0.2}))


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    student, teacher = write_pair(tmp_path_factory.mktemp("pair"))
    write_dropout(student)
    made = prepare(load_models(student, teacher), split_held_out(tiny_texts(20), 0.2), CONFIG)
    assert -(-len(made.train) // CONFIG.batch_size) == 4
    return made


class Interrupted(Exception):
    """Stands for whatever ends a process."""


class InterruptAt:
    """A reporter that ends the run as a step is told of, before its evaluation and checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    @contextlib.contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
        def update(step: int, remark: str) -> None:
            if step == self.step:
                raise Interrupted

        yield update


def interrupt(
    materials: PreparedData, config: DistillConfig, folder: Path, step: int, *, resume: bool = False
) -> None:
    teacher = open_teachers(materials, config, [config.loss], folder.parent / "cache")[config.loss]
    with pytest.raises(Interrupted):
        train(materials, config, teacher, folder, InterruptAt(step), resume=resume)


def finish(
    materials: PreparedData, config: DistillConfig, folder: Path, *, resume: bool = True
) -> RunResult:
    teacher = open_teachers(materials, config, [config.loss], folder.parent / "cache")[config.loss]
    return train(materials, config, teacher, folder, resume=resume)


def assert_same_run(found: Path, expected: Path) -> None:
    for name in ("student/model.safetensors", "metrics.jsonl"):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    results = [json.loads((folder / "result.json").read_text()) for folder in (found, expected)]
    assert results[0] | {"seconds": 0} == results[1] | {"seconds": 0}


@pytest.fixture(scope="module")
def whole_of(
    materials: PreparedData, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[DistillConfig], Path]:
    """The folder of a run without checkpoints, which two of the interrupted ones are held to."""
    made: dict[str, Path] = {}

    def run(config: DistillConfig) -> Path:
        config = replace(config, checkpoint_every=0)
        if repr(config) not in made:
            folder = made[repr(config)] = tmp_path_factory.mktemp("whole") / "run"
            finish(materials, config, folder, resume=False)
            assert not list(folder.glob("checkpoint-*"))
        return made[repr(config)]

    return run


@pytest.mark.parametrize(
    "config",
    [
        SAVING,
        replace(SAVING, checkpoint_every=4, curves=True),
        replace(SAVING, batch_size=2, accumulation=2),
        replace(SAVING, loss="p-kl", teacher_top_k=None, mixed_precision="bf16"),
        replace(SAVING, loss="ce", seed=1),
    ],
    ids=["in an epoch", "at an epoch's end", "micro-batches", "live teacher and bf16", "ce"],
)
def test_a_run_that_was_interrupted_twice_is_bit_for_bit_one_that_was_not(
    materials: PreparedData,
    whole_of: Callable[[DistillConfig], Path],
    tmp_path: Path,
    config: DistillConfig,
) -> None:
    whole, cut = whole_of(config), tmp_path / "cut"
    interrupt(materials, config, cut, 6)
    # What the second sitting draws before it restores the random numbers must not matter.
    torch.manual_seed(1234)
    interrupt(materials, config, cut, 9, resume=True)
    result = finish(materials, config, cut)
    assert result.steps_before == {3: 6, 4: 8}[config.checkpoint_every]
    assert_same_run(cut, whole)
    assert result.records == read_history(whole / "metrics.jsonl")
    pictures = [list(folder.glob("curves.png")) for folder in (cut, whole)]
    assert [len(found) for found in pictures] == [config.curves] * 2
    for one, other in zip(*pictures, strict=True):
        assert one.read_bytes() == other.read_bytes()
    newest = {3: {"checkpoint-9", "checkpoint-10"}, 4: {"checkpoint-8", "checkpoint-10"}}
    assert {path.name for path in cut.glob("checkpoint-*")} == newest[config.checkpoint_every]


def test_an_end_while_an_old_checkpoint_is_removed_leaves_none_that_looks_damaged(
    materials: PreparedData,
    whole_of: Callable[[DistillConfig], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut, remove = tmp_path / "cut", shutil.rmtree

    def end_within(path: Path | str, *given: Any, **named: Any) -> None:
        if Path(path).name == "checkpoint-3":
            (Path(path) / "rng_state.pth").unlink()
            raise Interrupted
        remove(path, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", end_within)
        with pytest.raises(Interrupted):
            finish(materials, SAVING, cut, resume=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DamagedCheckpointWarning)
        assert finish(materials, SAVING, cut).steps_before == 9
    assert_same_run(cut, whole_of(SAVING))
    assert {path.name for path in cut.glob("*checkpoint-*")} == {"checkpoint-9", "checkpoint-10"}


@pytest.fixture(scope="module")
def finished(materials: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `SAVING` that was not interrupted."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    finish(materials, SAVING, folder, resume=False)
    return folder


@pytest.fixture(scope="module")
def interrupted_once(materials: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `SAVING` that ended in step 8, with checkpoints of 3 and 6."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    interrupt(materials, SAVING, folder, 8)
    return folder


@pytest.fixture
def interrupted(interrupted_once: Path, tmp_path: Path) -> Path:
    """A copy of it, with the teacher's predictions beside it."""
    shutil.copytree(interrupted_once.parent, tmp_path / "copy")
    return tmp_path / "copy" / "run"


def test_a_finished_run_is_read_and_not_run_again(
    materials: PreparedData, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)

    def times() -> dict[Path, int]:
        # An older filelock touches the lock's file, which holds nothing.
        return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}

    before = times()
    result = finish(materials, SAVING, folder)
    assert times() == before
    assert result.steps_before == result.steps == 10
    assert result.summary() == json.loads((finished / "result.json").read_text())
    assert result.records == read_history(finished / "metrics.jsonl")


@pytest.mark.parametrize("last_evaluation", ["done", "lost"])
def test_a_run_that_ended_after_its_last_step_is_only_evaluated_and_written(
    materials: PreparedData, finished: Path, tmp_path: Path, last_evaluation: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "student")
    (folder / "result.json").unlink()
    if last_evaluation == "lost":
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        assert "eval_bits_per_byte" in lines[-1]
        # Killed in the middle of a line.
        (folder / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    assert finish(materials, SAVING, folder).steps_before == 10
    assert_same_run(folder, finished)


def test_what_is_only_written_has_the_projection_that_was_learned(
    materials: PreparedData, tmp_path: Path
) -> None:
    config = replace(
        SAVING, steps=3, loss="p-kl", learnable_projection=True, projection_learning_rate=1.0
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(materials, config, whole, resume=False)
    shutil.copytree(whole, cut)
    (cut / "projection.safetensors").unlink()
    (cut / "result.json").unlink()
    assert finish(materials, config, cut).steps_before == 3
    learned = Projection.load(whole / "projection.safetensors").weights
    assert abs(learned - materials.projection.weights).max() > 0.01
    assert (Projection.load(cut / "projection.safetensors").weights == learned).all()


def test_nothing_to_resume_from_is_a_start_from_the_beginning(
    materials: PreparedData, finished: Path, tmp_path: Path
) -> None:
    for folder in (tmp_path / "absent", tmp_path / "before the first checkpoint"):
        if folder.name != "absent":
            interrupt(materials, SAVING, folder, 2)
            assert not list(folder.glob("checkpoint-*"))
        assert finish(materials, SAVING, folder).steps_before == 0
        assert_same_run(folder, finished)


def test_without_resume_nothing_of_an_earlier_run_is_used_or_kept(
    materials: PreparedData, interrupted: Path
) -> None:
    other = replace(SAVING, seed=5)
    interrupt(materials, other, interrupted, 2)
    assert not list(interrupted.glob("checkpoint-*"))
    assert finish(materials, other, interrupted).steps_before == 0


def test_settings_without_a_say_in_the_student_may_change(
    materials: PreparedData, interrupted: Path, finished: Path
) -> None:
    changed = replace(SAVING, eval_every=1, eval_batch_size=3, checkpoint_every=1, device="auto")
    if torch.cuda.is_available():
        changed = replace(changed, device="cpu")
    finish(materials, changed, interrupted)
    name = "student/model.safetensors"
    assert (interrupted / name).read_bytes() == (finished / name).read_bytes()
    records = read_history(interrupted / "metrics.jsonl")
    assert [r["step"] for r in records if "ce" in r] == list(range(1, 11))
    assert [r["step"] for r in records if "eval_bits_per_byte" in r] == [0, 4, 7, 8, 9, 10]
    # They are those of the run from now on.
    assert finish(materials, changed, interrupted).steps_before == 10


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 0.5}, "learning_rate = 0.01 there and 0.5 here"),
        ({"steps": 20, "seed": 3}, "steps = 10 there and 20 here; seed = 0 there and 3 here"),
        ({"loss": "p-kl"}, "loss = 'prefix-kl' there and 'p-kl' here"),
        ({"mixed_precision": "bf16"}, "mixed_precision = 'no' there and 'bf16' here"),
    ],
)
def test_another_setting_is_named_and_nothing_is_lost(
    materials: PreparedData, interrupted: Path, changed: dict[str, object], message: str
) -> None:
    before = sorted(interrupted.rglob("*"))
    with pytest.raises(ResumeError) as raised:
        finish(materials, replace(SAVING, **changed), interrupted)
    assert message in str(raised.value)
    assert "repeat the command of that run to resume it, or start anew" in str(raised.value)
    assert sorted(interrupted.rglob("*")) == before


def test_other_texts_models_or_numbers_of_processes_are_named(
    materials: PreparedData, interrupted: Path, tmp_path: Path
) -> None:
    def refused(changed: PreparedData) -> str:
        with pytest.raises(ResumeError) as raised:
            finish(changed, SAVING, interrupted)
        return str(raised.value)

    shorter = replace(materials.train, examples=materials.train.examples[:-1])
    assert ": other training texts, or a date in the chat template (" in refused(
        replace(materials, train=shorter)
    )
    assert ": other held-out texts, or a date in the chat template (" in refused(
        replace(materials, held_out=shorter)
    )
    other = materials.pair.with_options()
    other.__dict__["projection"] = replace(
        materials.projection, weights=materials.projection.weights * np.float32(1 - 2**-12)
    )
    assert ": other weights of W (" in refused(replace(materials, pair=other))
    for side in ("student", "teacher"):
        folder = tmp_path / side
        shutil.copytree(getattr(materials.models, f"{side}_source"), folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            next(model.parameters())[0, 0] += 1
        model.save_pretrained(folder)
        models = replace(materials.models, **{f"{side}_source": str(folder)})
        assert f": other weights of the {side} (" in refused(replace(materials, models=models))
    (interrupted / "run.json").unlink()
    mark = json.loads((interrupted / "checkpoint-6" / "run.json").read_text())
    mark["run"]["processes"] = 2
    del mark["checksum"]
    (interrupted / "checkpoint-6" / "run.json").write_text(sealed(mark))
    assert "checkpoint-6 is of another run: other number of processes (2 there, 1" in (
        refused(materials)
    )


def test_a_checkpoint_that_was_not_finished_is_passed_over_and_removed(
    materials: PreparedData, interrupted: Path, finished: Path
) -> None:
    (interrupted / "checkpoint-6" / "run.json").unlink()
    assert finish(materials, SAVING, interrupted).steps_before == 3
    assert {path.name for path in interrupted.glob("*checkpoint-*")} == {
        "checkpoint-9",
        "checkpoint-10",
    }
    assert_same_run(interrupted, finished)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def alter(path: Path) -> None:
    """Another byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("half a mark", "run.json was altered"),
        ("a file is missing", "optimizer.pt is missing"),
        ("a file is cut", "optimizer.pt was altered"),
        ("a byte is altered", "optimizer.pt was altered"),
        ("a file is not of it", "more.pt is not of it"),
        ("another step's", "run.json is that of step 6"),
        ("another release's", "run.json is of another release of xtoken"),
    ],
)
def test_a_damaged_checkpoint_is_kept_and_named_and_the_one_before_is_taken(
    materials: PreparedData, interrupted: Path, finished: Path, damage: str, reason: str
) -> None:
    newest = interrupted / "checkpoint-6"
    mark, file = newest / "run.json", newest / "optimizer.pt"
    if damage == "half a mark":
        mark.write_text(mark.read_text()[:100])
    elif damage == "a file is missing":
        file.unlink()
    elif damage == "a file is cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "a byte is altered":
        alter(file)
    elif damage == "a file is not of it":
        (newest / "more.pt").write_bytes(b"")
    elif damage == "another step's":
        newest = newest.rename(interrupted / "checkpoint-7")
    else:
        values = json.loads(mark.read_text())
        del values["checksum"], values["run"]["processes"]
        mark.write_text(sealed(values))
    before = contents(newest)
    # Of an earlier damage.
    (interrupted / f"damaged-{newest.name}").mkdir()
    aside = interrupted / f"damaged-{newest.name}-2"
    message = rf"{newest.name} is damaged \({reason}\).* kept as {aside.name}; .* checkpoint-3"
    with pytest.warns(DamagedCheckpointWarning, match=message):
        assert finish(materials, SAVING, interrupted).steps_before == 3
    assert {path.name for path in interrupted.glob("checkpoint-*")} == {
        "checkpoint-9",
        "checkpoint-10",
    }
    assert contents(aside) == before
    assert_same_run(interrupted, finished)
    # Whoever starts anew asks for that.
    interrupt(materials, SAVING, interrupted, 1)
    assert not list(interrupted.glob("*checkpoint-*"))


def test_a_damaged_checkpoint_behind_a_whole_one_is_kept_too(
    materials: PreparedData, interrupted: Path, finished: Path
) -> None:
    (interrupted / "checkpoint-3" / "optimizer.pt").unlink()
    with pytest.warns(DamagedCheckpointWarning, match=r"checkpoint-3 is damaged .* checkpoint-6$"):
        assert finish(materials, SAVING, interrupted).steps_before == 6
    assert (interrupted / "damaged-checkpoint-3" / "model.safetensors").is_file()
    assert_same_run(interrupted, finished)


@pytest.mark.parametrize("begun", [True, False])
def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_nothing_is_lost(
    materials: PreparedData, interrupted: Path, begun: bool
) -> None:
    alter(interrupted / "checkpoint-3" / "optimizer.pt")
    alter(interrupted / "checkpoint-6" / "model.safetensors")
    if not begun:
        (interrupted / "run.json").unlink()
    before = contents(interrupted)
    message = (
        r"run has no whole checkpoint to resume from \(checkpoint-6: model.safetensors was "
        r"altered; checkpoint-3: optimizer.pt was altered\), and nothing was removed; "
        r".* --overwrite\)$"
    )
    with pytest.raises(ResumeError, match=message):
        finish(materials, SAVING, interrupted)
    assert contents(interrupted) == before
    # Each way out that the message names.
    for name in ("checkpoint-3", "checkpoint-6"):
        shutil.move(interrupted / name, interrupted.parent / name)
    interrupt(materials, SAVING, interrupted, 2, resume=True)
    for name in ("checkpoint-3", "checkpoint-6"):
        shutil.move(interrupted.parent / name, interrupted / name)
    assert finish(materials, SAVING, interrupted, resume=False).steps_before == 0


def make_unreadable(path: Path) -> None:
    """Whatever lay there is a link to itself, which no user can read."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-6/run.json",
        "checkpoint-6/optimizer.pt",
        "checkpoint-3/run.json",
        "checkpoint-6",
        "run.json",
        "result.json",
    ],
)
def test_what_cannot_be_read_is_not_taken_for_absent(
    materials: PreparedData, interrupted: Path, name: str
) -> None:
    make_unreadable(interrupted / name)
    names, before = sorted(interrupted.rglob("*")), contents(interrupted)
    message = rf"{name} cannot be read \(.+\), and nothing was removed; repeat the command"
    with pytest.raises(ResumeError, match=message) as raised:
        finish(materials, SAVING, interrupted)
    assert "\n" not in str(raised.value)
    assert (sorted(interrupted.rglob("*")), contents(interrupted)) == (names, before)


def test_the_state_of_a_trainer_that_cannot_be_read_is_not_passed_over(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = json.dumps({"global_step": step})
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    last = tmp_path / "checkpoint-3" / "trainer_state.json"
    last.write_text(last.read_text()[:-3])
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    make_unreadable(last)
    with pytest.raises(ResumeError, match=r"checkpoint-3/trainer_state\.json cannot be read"):
        last_whole_checkpoint(tmp_path)


def test_metrics_that_lack_a_step_of_the_checkpoint_are_an_error(
    materials: PreparedData, interrupted: Path
) -> None:
    path = interrupted / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"step": 5,' not in line))
    message = r"metrics.jsonl lacks step 5 of the 6 that checkpoint-6 has behind it; put the file"
    with pytest.raises(ResumeError, match=message):
        finish(materials, SAVING, interrupted)
    path.unlink()
    with pytest.raises(ResumeError, match="lacks step 1 of the 6"):
        finish(materials, SAVING, interrupted)


def test_a_run_that_cannot_be_read_is_neither_gone_on_with_nor_lost(
    materials: PreparedData, interrupted: Path
) -> None:
    path = interrupted / "run.json"
    values = json.loads(path.read_text())
    for content in ("{", json.dumps(values | {"of_a_later_release": 1})):
        path.write_text(content)
        with pytest.raises(ResumeError, match=r"run\.json is damaged, or of another release"):
            finish(materials, SAVING, interrupted)
    assert (interrupted / "checkpoint-6").is_dir()
    # The checkpoint knows what it is of.
    path.unlink()
    assert finish(materials, SAVING, interrupted).steps_before == 6


@pytest.mark.parametrize("resume", [False, True])
def test_checkpoints_of_something_else_are_not_removed(
    materials: PreparedData, tmp_path: Path, resume: bool
) -> None:
    (tmp_path / "run" / "checkpoint-500").mkdir(parents=True)
    with pytest.raises(ResumeError, match="checkpoint-500 is no checkpoint of a run of xtoken; pa"):
        finish(materials, SAVING, tmp_path / "run", resume=resume)
    assert (tmp_path / "run" / "checkpoint-500").is_dir()


def test_the_time_of_all_sittings_counts(materials: PreparedData, interrupted: Path) -> None:
    mark = interrupted / "checkpoint-6" / "run.json"
    values = json.loads(mark.read_text())
    assert 0 < values["seconds"] < 1000
    del values["checksum"]
    mark.write_text(sealed(values | {"seconds": 5000.0}))
    result = finish(materials, SAVING, interrupted)
    assert 5000 < result.seconds < 6000
    assert json.loads((interrupted / "result.json").read_text())["seconds"] > 5000
