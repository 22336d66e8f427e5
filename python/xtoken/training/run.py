"""Train one student and write its outputs."""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from xtoken._apart import check_apart
from xtoken._files import folder_beside, writes
from xtoken._locks import locked_alone
from xtoken.errors import DataError, InterruptedRunError, OptionError, ResumeError
from xtoken.report.curves import check_curves, draw_curves
from xtoken.teachers import TeacherSource
from xtoken.training.arguments import DistillArguments
from xtoken.training.checkpoints import Checkpoint, MarkCheckpoints, Start, begin
from xtoken.training.config import DistillConfig
from xtoken.training.config_arguments import FollowArguments, run_device, training_arguments
from xtoken.training.evaluate import HeldOutScore
from xtoken.training.learned_projection import projection_file
from xtoken.training.metrics_log import History, KeepHistory, read_history
from xtoken.training.prepare import PreparedData, Reporter, Silent
from xtoken.training.processes import (
    from_all,
    is_main_process,
    join_processes,
    on_first_process,
    process_count,
)
from xtoken.training.run_files import (
    CURVES_FILE,
    LOCK_FILE,
    METRICS_FILE,
    RESULT_FILE,
    RUN_FILE,
    add_sum,
    check_sums,
    write_result,
)
from xtoken.training.run_identity import RunIdentity
from xtoken.training.stop_on_signal import StopOnSignal
from xtoken.training.teaching import Teacher
from xtoken.training.trainer import DistillTrainer

# What was whole before a write that failed is whole still.
_RESUME = ", and pass --resume"


@dataclass(frozen=True)
class RunResult:
    """What a run did.

    Args:
        loss: name of the loss.
        before, after: scores of the student on the held-out part.
        steps: optimizer steps.
        seconds: wall time of the training, evaluations included, teacher store excluded; of several
            sessions, without what was done since the last checkpoint of an interrupted one.
        records: the lines of `metrics.jsonl`.
        steps_before: steps done in earlier sessions; `steps` where nothing was left to do.
    """

    loss: str
    before: HeldOutScore
    after: HeldOutScore
    steps: int
    seconds: float
    records: list[dict[str, float]]
    steps_before: int = 0

    def summary(self) -> dict[str, object]:
        """Return the result without the records, for a JSON file."""
        return {
            "loss": self.loss,
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            "before": asdict(self.before),
            "after": asdict(self.after),
        }


def train(
    materials: PreparedData,
    config: DistillConfig,
    teacher: TeacherSource | Sequence[TeacherSource | None] | None,
    out: Path,
    reporter: Reporter | None = None,
    *,
    resume: bool = False,
) -> RunResult:
    """Train the student of the pair, fresh from its directory, and write its outputs.

    Written into `out`: `student/` (model and tokenizer, for `from_pretrained`),
    `projection.safetensors` (further teachers': `projection-1.safetensors`, ...), `config.json`,
    `metrics.jsonl`, `curves.png` (with `curves`), `SHA256SUMS` (of all these, for `sha256sum
    --check`) and `result.json`; with `checkpoint_every`, also the Trainer's `checkpoint-N/` of the
    newest two.

    Args:
        materials: from `prepare`.
        config: the settings.
        teacher: a `LiveTeacher`, a filled `TopKStore` or a `PrefetchedTeacher`; None for `ce`; of
            several, one each in the order of `materials.teachers`.
        out: directory, made if absent; files of the same names are replaced.
        reporter: sees the steps.
        resume: go on from the newest whole checkpoint in `out`, to the student that an
            uninterrupted run gives, on the CPU bit for bit; from the beginning where there is none;
            a run that was finished is read, not run again, and drawn with `curves` where it has no
            picture. The settings must be those of the run, but for `device`, `eval_every`,
            `eval_batch_size`, `checkpoint_every` and `curves`.

    Under `torchrun` every process calls this; the first one reports and writes. All must see the
    same `out`, as the Trainer reads its checkpoints in each.

    Raises: ResumeError if `out` is of another run; OptionError as `DistillTrainer`, and if `out`
        lies over a model or a store that is read; DataError if the data gives fewer steps than the
        settings ask for; MissingExtraError if `curves` are to be drawn without matplotlib.
    """
    main = is_main_process()
    sources = list(teacher) if isinstance(teacher, Sequence) else [teacher]
    reporter = reporter if reporter is not None and main else Silent()
    models = [each.models for each in materials.teachers]
    read = [("student", models[0].student_source), *(("teacher", m.teacher_source) for m in models)]
    check_apart(out, [*read, *(("store", each.store) for each in models)], "out =", folder=True)
    check_picture(config, out, resume)
    with writes(out):
        out.mkdir(parents=True, exist_ok=True)
    with run_lock(out) if main else contextlib.nullcontext():
        return _train(materials, config, sources, out, reporter, resume)


def check_picture(config: DistillConfig, out: Path, resume: bool) -> None:
    """Refuse to train towards a picture that cannot be drawn at the end.

    Raises:
        MissingExtraError: it is still to be drawn, and matplotlib is not installed.
    """
    if config.curves and not (resume and (out / CURVES_FILE).exists()):
        check_curves()


@contextlib.contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Hold a run's folder while the block runs.

    Raises:
        ResumeError: another process writes there.
        NoLockError: its file system has no locks.
    """
    refused = ResumeError(f"another run writes into {out}; wait for its end, or pass another --out")
    with locked_alone(out / LOCK_FILE, refused):
        yield


def _check_processes(run: RunIdentity, out: Path) -> None:
    """Refuse processes that were started with other settings, models or folders.

    Raises:
        OptionError: names what differs.
    """
    own = {
        **run.settings,
        "student": run.student,
        "student_tokenizer": run.student_tokenizer,
        "teacher_tokenizer": run.teacher_tokenizer,
        "projection": run.projection,
        "out": str(out.resolve()),
    }
    first, *others = from_all(own)
    for rank, other in enumerate(others, 1):
        name = next((each for each in first if first[each] != other.get(each)), None)
        if name is not None:
            raise OptionError(
                f"process {rank} of this run has {name} = {other.get(name)}, process 0 has "
                f"{first[name]}; start all processes by the same command"
            )


def _train(
    materials: PreparedData,
    config: DistillConfig,
    sources: Sequence[TeacherSource | None],
    out: Path,
    reporter: Reporter,
    resume: bool,
) -> RunResult:
    main = is_main_process()
    pair, models = materials.pair, materials.models
    teachers = taught_by(materials, config, sources)
    student = models.load_student()
    run = RunIdentity.of(materials, config, student, [] if config.loss == "ce" else sources)
    join_processes(run_device(config))
    _check_processes(run, out)
    start = on_first_process(lambda: begin(out, run, resume))
    if start.finished:
        # All that it left is read, which may be the size of the student.
        result = on_first_process(lambda: _read_result(out))
        if main and config.curves and not (out / CURVES_FILE).exists():
            with writes(out, _RESUME):
                draw_curves({config.loss: result.records}, out / CURVES_FILE)
                add_sum(out, CURVES_FILE)
        return result
    checkpoint = start.checkpoint
    done = 0 if checkpoint is None else checkpoint.step
    if checkpoint is not None and done == config.steps:
        student = models.load_student(checkpoint.path)
    history = History(out / METRICS_FILE if main else None, start.records)
    clock = time.perf_counter() - (0.0 if checkpoint is None else checkpoint.seconds)
    title = f"train {config.loss}" + (f", from step {done}" if done else "")
    stop = StopOnSignal(config.steps)
    marks = MarkCheckpoints(out, run, history, lambda: time.perf_counter() - clock, done)
    # Until all is written; the bar ends before.
    with contextlib.ExitStack() as listening, _nothing_left(out, history, done):
        with reporter.progress(title, config.steps) as update:
            arguments, rows = _training_rows(materials, config, out, done)
            trainer = DistillTrainer(
                student,
                arguments,
                teachers=teachers,
                train_dataset=rows,
                eval_dataset=materials.rows("held_out"),
                processing_class=pair,
                callbacks=[
                    FollowArguments(),
                    KeepHistory(history, lambda step: update(step, _remark(history.records[-1]))),
                    stop,
                    marks,
                ],
            )
            trainer.remove_callback(PrinterCallback)
            if materials.stream is None:
                _fill_targets(trainer, materials, reporter)
            else:
                _follow_stream(trainer, config, start)
            listening.enter_context(stop.listening())
            with writes(out, _RESUME):
                _train_to_end(trainer, checkpoint, history, stop, marks)
            if stop.ended:
                then = f"the checkpoint is in {out}: pass --resume to go on from there"
                raise stop.error(trainer.state, then)
            _require_steps(trainer.state.global_step, config)
            seconds = time.perf_counter() - clock
        evaluations = [record for record in history.records if "eval_bits_per_byte" in record]
        result = RunResult(
            loss=config.loss,
            before=HeldOutScore.from_metrics(evaluations[0], "eval_"),
            after=HeldOutScore.from_metrics(evaluations[-1], "eval_"),
            steps=config.steps,
            seconds=seconds,
            records=history.records,
            steps_before=done,
        )
        with writes(out, _RESUME):
            on_first_process(lambda: _write(out, result, trainer, materials, config, student))
        if stop.came_anywhere(trainer.args):
            then = f"all is done, and the student is in {out}: pass --resume to see the result"
            raise stop.error(trainer.state, then)
    return result


@contextlib.contextmanager
def _nothing_left(out: Path, history: History, done: int) -> Iterator[None]:
    """Leave no run behind where one fails before its first step: the corrected command finds its
    folder as it was."""
    try:
        yield
    except InterruptedRunError:
        raise
    except Exception:
        stepped = any("ce" in record for record in history.records)
        if is_main_process() and not done and not stepped:
            for name in (METRICS_FILE, RUN_FILE):
                (out / name).unlink(missing_ok=True)
        raise


def _require_steps(taken: int, config: DistillConfig) -> None:
    """Refuse to call a student trained that its data gave fewer steps for."""
    if taken < config.steps:
        raise DataError(
            f"{taken} of {config.steps} steps were taken, as the training data gave no further "
            "batch; lower batch_size, leave dataloader_drop_last out, or give more texts"
        )


def taught_by(
    materials: PreparedData, config: DistillConfig, sources: Sequence[TeacherSource | None]
) -> list[Teacher]:
    """The teachers of a trainer, from the predictions of each.

    Raises:
        OptionError: one is missing.
    """
    if config.loss == "ce":
        return []
    if None in sources or len(sources) != len(materials.teachers):
        count, given = len(materials.teachers), len(sources) - sources.count(None)
        needed = (
            "a teacher, and none was given"
            if count == 1 and not given
            else (f"{count} teachers, and {given} were given")
        )
        raise OptionError(f"loss = {config.loss!r} needs {needed}; pass one for each pair")
    return [
        Teacher(
            cast(TeacherSource, source), each.pair, each.models.loss, each.models.weight,
            each.models.teacher_name,
        )
        for source, each in zip(sources, materials.teachers, strict=True)
    ]  # fmt: skip


def _training_rows(
    materials: PreparedData, config: DistillConfig, out: Path, done: int
) -> tuple[DistillArguments, Any]:
    """The rows that are left to train on after some steps, and the arguments that go with them."""
    arguments = training_arguments(config, out)
    stream = materials.stream
    if stream is None:
        return arguments, materials.rows("train")
    # Skipped by the stream, which need not tokenize what it skips, and knows when it began again.
    arguments.ignore_data_skip = True
    arguments.teacher_column = stream.source.teacher_column
    block = config.batch_size * process_count()
    return arguments, stream.starting(done * config.accumulation * block, block)


def _follow_stream(trainer: DistillTrainer, config: DistillConfig, start: Start) -> None:
    """What a Trainer that skips no data leaves to do."""
    date = config.date
    trainer.teaching.date = None if date is None else datetime.date.fromisoformat(date)
    trainer.teaching.routes.seen = True  # in the rows that `read_head` read
    if start.checkpoint is not None:
        trainer.add_callback(RestoreRandomState(trainer, start.checkpoint.path))
        counts = [record["rows_left_out"] for record in start.records if "rows_left_out" in record]
        if counts and is_main_process():
            trainer.rows_left_out = int(counts[-1])


class RestoreRandomState(TrainerCallback):
    """Restores the random numbers of a checkpoint once the first batch is there: the Trainer does
    so before it begins to iterate, for which the loader draws one."""

    def __init__(self, trainer: DistillTrainer, checkpoint: Path) -> None:
        self._trainer = trainer
        self._checkpoint: Path | None = checkpoint

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Restore them before the first step."""
        if self._checkpoint is not None:
            self._trainer._load_rng_state(str(self._checkpoint))
            self._checkpoint = None


def _train_to_end(
    trainer: DistillTrainer,
    checkpoint: Checkpoint | None,
    history: History,
    stop: StopOnSignal,
    marks: MarkCheckpoints,
) -> None:
    """Train and evaluate whatever is left to do after a checkpoint, or all of it; once a signal has
    come, leave a checkpoint instead."""
    trainer._before_scored_batch = lambda: stop.leave_last_evaluation(trainer.args, trainer.state)
    with contextlib.suppress(InterruptedRunError):
        if checkpoint is None:
            trainer.evaluate()
            trainer.train()
        elif checkpoint.step < stop.steps:
            trainer.train(resume_from_checkpoint=str(checkpoint.path))
        else:
            # The Trainer would take one step more before it saw that none is left.
            trainer.state.global_step = checkpoint.step
            trainer._load_projections(str(checkpoint.path))
        if not stop.ended and "eval_bits_per_byte" not in history.records[-1]:
            trainer.evaluate()
    if stop.ended and marks.newest < trainer.state.global_step:
        # The Trainer saves after an evaluation, and only where it was asked to.
        trainer._save_checkpoint(trainer.model, trial=None)
        trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)


def _write(
    out: Path,
    result: RunResult,
    trainer: DistillTrainer,
    materials: PreparedData,
    config: DistillConfig,
    student: nn.Module,
) -> None:
    with folder_beside(out / "student") as folder:
        cast(Any, student).save_pretrained(folder)
        cast(Any, materials.pair.student_tokenizer).save_pretrained(folder)
    for index in range(len(trainer.teaching.members)):
        trainer.learned_projection(index).save(out / projection_file(index))
    config.save(out / "config.json")
    if config.curves:
        draw_curves({config.loss: result.records}, out / CURVES_FILE)
    else:
        (out / CURVES_FILE).unlink(missing_ok=True)  # of an earlier run
    write_result(out, result.summary())


def _read_result(out: Path) -> RunResult:
    check_sums(out)
    values = json.loads((out / RESULT_FILE).read_text(encoding="utf-8"))
    return RunResult(
        loss=values["loss"],
        before=HeldOutScore.from_json(values["before"]),
        after=HeldOutScore.from_json(values["after"]),
        steps=values["steps"],
        seconds=values["seconds"],
        records=read_history(out / METRICS_FILE),
        steps_before=values["steps"],
    )


def _fill_targets(trainer: DistillTrainer, materials: PreparedData, reporter: Reporter) -> None:
    """Make the exact targets of the training texts once, where their predictions are stored."""
    if not any(store is not None for store in trainer.teaching.targets):
        return
    sets = [each.train.examples for each in materials.teachers]
    examples = list(zip(*sets, strict=True))
    with reporter.progress("exact targets, once", len(examples)) as update:
        # One process writes; what it has written the others read.
        on_first_process(lambda: trainer.teaching.fill_targets(examples, update))
    for store in trainer.teaching.targets:
        if store is not None:
            store.reload()


def _remark(record: dict[str, float]) -> str:
    names = {"ce": "CE", "kd": "KD"}
    return "  ".join(f"{names[name]} {record[name]:.2f}" for name in names if name in record)
