"""One distillation run, from a student's directory to the directory of what came of it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from xtoken.data import DistillCollator
from xtoken.report.curves import draw_curves
from xtoken.training.config import DistillConfig
from xtoken.training.evaluate import HeldOutEvaluator, HeldOutScore
from xtoken.training.history import History
from xtoken.training.objective import Objective, TeacherSource
from xtoken.training.prepare import Materials, Reporter, Silent
from xtoken.training.processes import is_main_process
from xtoken.training.trainer import DistillTrainer, run_device


@dataclass(frozen=True)
class RunResult:
    """What a run did.

    Args:
        loss: name of the loss.
        before, after: scores of the student on the held-out part.
        steps: optimizer steps.
        seconds: wall time of the training, evaluations included, teacher store excluded.
        records: the lines of `metrics.jsonl`.
    """

    loss: str
    before: HeldOutScore
    after: HeldOutScore
    steps: int
    seconds: float
    records: list[dict[str, float]]

    def summary(self) -> dict[str, Any]:
        """Return the result without the records, for a JSON file."""
        return {
            "loss": self.loss,
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            "before": asdict(self.before),
            "after": asdict(self.after),
        }


def train(
    materials: Materials,
    config: DistillConfig,
    teacher: TeacherSource | None,
    out: Path,
    reporter: Reporter | None = None,
) -> RunResult:
    """Train the student of the pair, fresh from its directory, and write what came of it.

    Written into `out`: `student/` (model and tokenizer, for `from_pretrained`),
    `projection.safetensors`, `config.json`, `metrics.jsonl`, `curves.png` and `result.json`.

    Args:
        materials: from `prepare`.
        config: the settings.
        teacher: a `LiveTeacher` or a filled `TopKStore`; None for `ce`.
        out: directory, made if absent; files of the same names are replaced.
        reporter: sees the steps.

    Under `torchrun` every process calls this; the first one reports and writes.
    """
    main = is_main_process()
    reporter = reporter if reporter is not None and main else Silent()
    out.mkdir(parents=True, exist_ok=True)
    pair = materials.pair
    student = pair.load_student()
    evaluator = HeldOutEvaluator(
        materials.held_out.examples, pair.student_vocab, batch_size=config.eval_batch_size
    )
    history = History(out / "metrics.jsonl" if main else None)
    with reporter.progress(f"train {config.loss}", config.steps) as update:
        trainer = DistillTrainer(
            student,
            config,
            objective=Objective(config, materials.projection, run_device(config)),
            teacher=teacher,
            train_examples=materials.train,
            collator=DistillCollator.for_tokenizers(pair.student_tokenizer, pair.teacher_tokenizer),
            output_dir=out,
            evaluator=evaluator,
            history=history,
            on_step=lambda step: update(step, _remark(history.records[-1])),
        )
        start = time.perf_counter()
        trainer.evaluate()
        trainer.train()
        if "eval_bits_per_byte" not in history.records[-1]:
            trainer.evaluate()
        seconds = time.perf_counter() - start
    evaluations = [record for record in history.records if "eval_bits_per_byte" in record]
    result = RunResult(
        loss=config.loss,
        before=HeldOutScore.from_metrics(evaluations[0], "eval_"),
        after=HeldOutScore.from_metrics(evaluations[-1], "eval_"),
        steps=config.steps,
        seconds=seconds,
        records=history.records,
    )
    if main:
        _write(out, result, materials, config, student)
    return result


def _write(
    out: Path, result: RunResult, materials: Materials, config: DistillConfig, student: nn.Module
) -> None:
    cast(Any, student).save_pretrained(out / "student")
    materials.pair.student_tokenizer.save_pretrained(out / "student")
    materials.projection.save(out / "projection.safetensors")
    config.save(out / "config.json")
    draw_curves({config.loss: result.records}, out / "curves.png")
    (out / "result.json").write_text(json.dumps(result.summary(), indent=2) + "\n")


def _remark(record: dict[str, float]) -> str:
    names = {"ce": "CE", "kd": "KD"}
    return "  ".join(f"{names[name]} {record[name]:.2f}" for name in names if name in record)
