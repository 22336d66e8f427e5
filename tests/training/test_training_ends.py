"""How runs end other than well: diverged, stopped by a signal, beside another, on a bad model."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from no_locks import refuse_locks
from safetensors.torch import load_file, save_file
from tiny_models import tiny_texts

from xtoken.data import split_held_out
from xtoken.errors import (
    DataError,
    InterruptedRunError,
    ModelSourceError,
    NoLockError,
    NonFiniteError,
    OptionError,
    ResumeError,
)
from xtoken.teachers import LiveTeacher
from xtoken.training import (
    DistillConfig,
    DistillTrainer,
    PreparedData,
    load_models,
    open_teachers,
    prepare,
    train,
)
from xtoken.training.config_arguments import training_arguments
from xtoken.training.metrics_log import read_history
from xtoken.training.run import run_lock

CONFIG = DistillConfig(
    steps=6,
    batch_size=4,
    top_k=32,
    teacher_top_k=32,
    max_tokens=48,
    learning_rate=3e-3,
    warmup_steps=2,
    device="cpu",
    curves=False,
)


@pytest.fixture(scope="module")
def materials(folder: Path) -> PreparedData:
    models = load_models(folder / "student", folder / "teacher")
    return prepare(models, split_held_out(tiny_texts(20), 0.2), CONFIG)


class AtStep:
    """A reporter that calls something as a step is told of."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act = step, act

    @contextlib.contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
        def update(step: int, remark: str) -> None:
            if step == self.step:
                self.act()

        yield update


@contextlib.contextmanager
def unheard(number: signal.Signals) -> Iterator[None]:
    """A signal that a run does not hold fails the test, and ends no more than that."""

    def fail(number: int, frame: object) -> None:
        raise AssertionError("the run did not listen")

    before = signal.signal(number, fail)
    try:
        yield
        assert signal.getsignal(number) == fail
    finally:
        signal.signal(number, before)


def at_next_forward(number: signal.Signals) -> None:
    """Raise a signal as a model is called next, once a run listens: it tries its models before."""

    def once(module: torch.nn.Module, inputs: object) -> None:
        heard_by = getattr(signal.getsignal(number), "__module__", None)
        if heard_by == "xtoken.training.stop_on_signal":
            handle.remove()
            signal.raise_signal(number)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(once)


class AtEnd(AtStep):
    """Calls it when the last step and its evaluation are done."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__(-1, act)

    @contextlib.contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
        yield lambda step, remark: None
        if title.startswith("train"):
            self.act()


def run(materials: PreparedData, config: DistillConfig, out: Path, reporter: object = None, **more):
    teacher = open_teachers(materials, config, [config.loss], out.parent / "cache")[config.loss]
    return train(materials, config, teacher, out, reporter, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("checkpoint_every", [0, 4])
def test_a_signal_ends_a_run_after_its_step_and_the_run_resumes(
    materials: PreparedData, tmp_path: Path, number: signal.Signals, checkpoint_every: int
) -> None:
    config = replace(CONFIG, checkpoint_every=checkpoint_every)
    before = signal.getsignal(number)
    with pytest.raises(InterruptedRunError, match=r"after step 4 of 6.*pass --resume") as raised:
        run(
            materials,
            config,
            tmp_path / "cut",
            AtStep(3, lambda: os.kill(os.getpid(), number)),
        )
    assert raised.value.signal == number
    assert signal.getsignal(number) == before
    assert not (tmp_path / "cut" / "result.json").exists()
    result = run(materials, config, tmp_path / "cut", resume=True)
    assert result.steps_before == 4
    run(materials, config, tmp_path / "whole")
    for name in ("student/model.safetensors", "metrics.jsonl"):
        cut, whole = (tmp_path / part / name for part in ("cut", "whole"))
        assert cut.read_bytes() == whole.read_bytes(), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("checkpoint_every", [0, 4])
@pytest.mark.parametrize("eval_every", [0, 2])
def test_a_signal_in_the_last_evaluation_leaves_it_for_a_checkpoint(
    materials: PreparedData,
    tmp_path: Path,
    number: signal.Signals,
    checkpoint_every: int,
    eval_every: int,
) -> None:
    config = replace(
        CONFIG, checkpoint_every=checkpoint_every, eval_every=eval_every, eval_batch_size=2
    )
    at_evaluation = AtStep(6, lambda: at_next_forward(number))
    message = r"after step 6 of 6; the checkpoint is in .*cut: pass --resume to go on from there$"
    with unheard(number), pytest.raises(InterruptedRunError, match=message) as raised:
        run(materials, config, tmp_path / "cut", at_evaluation)
    assert raised.value.signal == number
    steps = [r["step"] for r in read_history(tmp_path / "cut" / "metrics.jsonl") if "ce" not in r]
    assert steps == ([0, 2, 4] if eval_every else [0])
    assert not (tmp_path / "cut" / "result.json").exists()
    # Again, with nothing but the evaluation to do: the same checkpoint will do.
    newest = tmp_path / "cut" / "checkpoint-6" / "run.json"
    written = newest.stat().st_mtime_ns
    at_next_forward(number)
    with unheard(number), pytest.raises(InterruptedRunError, match=message):
        run(materials, config, tmp_path / "cut", resume=True)
    assert newest.stat().st_mtime_ns == written
    assert run(materials, config, tmp_path / "cut", resume=True).steps_before == 6
    run(materials, config, tmp_path / "whole")
    for name in ("student/model.safetensors", "metrics.jsonl"):
        cut, whole = (tmp_path / part / name for part in ("cut", "whole"))
        assert cut.read_bytes() == whole.read_bytes(), name


def test_a_signal_after_the_last_evaluation_waits_until_all_is_written(
    materials: PreparedData, tmp_path: Path
) -> None:
    message = r"after step 6 of 6; all is done, and the student is in .*run: pass --resume"
    with unheard(signal.SIGTERM), pytest.raises(InterruptedRunError, match=message):
        run(materials, CONFIG, tmp_path / "run", AtEnd(lambda: signal.raise_signal(signal.SIGTERM)))
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    result = run(materials, CONFIG, tmp_path / "run", resume=True)
    assert result.steps_before == 6
    assert result.summary() == json.loads((tmp_path / "run" / "result.json").read_text())


@pytest.mark.parametrize("loss", ["ce", "prefix-kl"])
def test_a_run_that_diverges_ends_in_one_line_and_keeps_no_broken_student(
    materials: PreparedData, tmp_path: Path, loss: str
) -> None:
    config = replace(CONFIG, loss=loss, learning_rate=1e18, checkpoint_every=1, warmup_steps=0)
    with pytest.raises(NonFiniteError, match=r"diverged|overflowed"):
        run(materials, config, tmp_path / "run")
    assert not (tmp_path / "run" / "student").exists()
    for file in (tmp_path / "run").rglob("model.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values()), file


def test_two_runs_do_not_share_a_folder(materials: PreparedData, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def second() -> None:
        for resume in (False, True):
            with pytest.raises(ResumeError, match=r"another run writes into .*pass another --out"):
                run(materials, CONFIG, out, resume=resume)

    run(materials, CONFIG, out, AtStep(2, second))
    steps = [record["step"] for record in read_history(out / "metrics.jsonl") if "ce" in record]
    assert steps == [1, 2, 3, 4, 5, 6]
    with run_lock(out):  # free again
        pass


def test_what_fails_in_a_run_is_told_as_it_is(materials: PreparedData, tmp_path: Path) -> None:
    """Also an error of the class by which a lock is known to be another's."""
    error = TimeoutError(errno.ETIMEDOUT, "Connection timed out")

    def fail() -> None:
        raise error

    with pytest.raises(TimeoutError) as raised:
        run(materials, CONFIG, tmp_path, AtStep(2, fail))
    assert raised.value is error


def test_a_run_on_a_file_system_without_locks_is_refused_in_one_line(
    materials: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_locks(monkeypatch, errno.ENOLCK)
    for resume in (False, True):
        with pytest.raises(NoLockError, match=r"run/.lock cannot be locked .* another file system"):
            run(materials, CONFIG, tmp_path / "run", resume=resume)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_equal_runs_leave_equal_files(materials: PreparedData, tmp_path: Path) -> None:
    sums, before = [], os.umask(0o022)
    try:
        for name in ("one", "two"):
            run(materials, CONFIG, tmp_path / name)
            lines = (tmp_path / name / "SHA256SUMS").read_text().splitlines()
            # It has the seconds that the run took.
            sums.append([line for line in lines if not line.endswith("  result.json")])
    finally:
        os.umask(before)
    assert any(line.endswith("  projection.safetensors") for line in sums[0])
    assert sums[0] == sums[1]
    for path in (tmp_path / "one").rglob("*"):  # which others may read, as what they make
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_what_is_logged_over_a_window_is_the_mean_of_its_steps(
    materials: PreparedData, tmp_path: Path
) -> None:
    logs: dict[int, list[dict[str, float]]] = {}
    for every in (1, 3):
        teacher = open_teachers(materials, CONFIG, [CONFIG.loss], tmp_path / "cache")[CONFIG.loss]
        args = training_arguments(CONFIG, tmp_path / str(every))
        args.logging_steps = every
        trainer = DistillTrainer(
            materials.models.load_student(),
            args,
            teachers=[teacher],
            train_dataset=materials.train,
            processing_class=materials.pair,
        )
        trainer.train()
        logs[every] = [record for record in trainer.state.log_history if "kd" in record]
    assert [len(logs[every]) for every in (1, 3)] == [6, 2]
    for name in ("ce", "kd", "kd_scale", "teacher_mass", "chunks"):
        for window in range(2):
            steps = [record[name] for record in logs[1][3 * window : 3 * window + 3]]
            assert logs[3][window][name] == pytest.approx(math.fsum(steps) / 3, rel=1e-6), name
    assert all(0 <= record["teacher_mass"] <= 1 for record in logs[3])


def test_a_model_whose_files_lack_tensors_is_refused(folder: Path, tmp_path: Path) -> None:
    for side in ("student", "teacher"):
        copy = tmp_path / side
        copy.mkdir()
        for file in (folder / side).iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        tensors = load_file(copy / "model.safetensors")
        for name in sorted(tensors)[1:4]:
            del tensors[name]
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    models = load_models(tmp_path / "student", tmp_path / "teacher")
    with pytest.raises(ModelSourceError, match=r"student .* lacks 3 tensors of its architecture"):
        models.load_student()
    with pytest.raises(ModelSourceError, match=r"teacher .* lacks 3 tensors .* would be random"):
        models.load_teacher(torch.device("cpu"))
    with pytest.raises(ModelSourceError, match="lacks 3 tensors"):
        LiveTeacher.from_pretrained(tmp_path / "teacher")


def test_examples_longer_than_a_models_positions_are_refused_beforehand(
    folder: Path, tmp_path: Path
) -> None:
    for side in ("student", "teacher"):
        copy = tmp_path / side
        copy.mkdir()
        for file in (folder / side).iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "teacher" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 64}))
    models = load_models(tmp_path / "student", tmp_path / "teacher")
    texts = split_held_out(tiny_texts(20), 0.2)
    with pytest.raises(OptionError, match=r"max_tokens = 65, but the teacher .* has 64 positions"):
        prepare(models, texts, replace(CONFIG, max_tokens=65))
    assert prepare(models, texts, replace(CONFIG, max_tokens=64)).train.examples


def test_a_result_never_claims_steps_that_were_not_taken(
    materials: PreparedData, tmp_path: Path
) -> None:
    config = replace(CONFIG, loss="ce", batch_size=57, trainer={"dataloader_drop_last": True})
    with pytest.raises(DataError, match="0 of 6 steps were taken, as the training data gave no"):
        train(materials, config, None, tmp_path)
    assert not (tmp_path / "result.json").exists()
    assert not (tmp_path / "run.json").exists()  # nothing to resume


def test_no_run_lies_over_the_models_that_it_reads(materials: PreparedData) -> None:
    models = materials.models
    for source in (models.student_source, models.teacher_source):
        before = (Path(source) / "config.json").read_bytes()
        for out in (Path(source), Path(source).parent):
            with pytest.raises(OptionError, match=r"^out = .*would be lost; pass another path"):
                train(materials, replace(CONFIG, loss="ce"), None, out)
        assert (Path(source) / "config.json").read_bytes() == before
