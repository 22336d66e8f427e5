"""`python -m benches.training_step [FOLDER] [STEPS] [LOSS]`: a step of the demo, by its parts.

FOLDER is that of the demo (`runs/demo`), which `python -m demo` fills. One thread, CPU time; the
timers are exclusive: each moment counts for the innermost part alone. The same steps are run three
times, and of each part of a step the least time counts.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from xtoken.cli.console import quiet_transformers
from xtoken.data import TextSplit, read_documents
from xtoken.distillation import Distiller
from xtoken.teachers import TopKStore
from xtoken.training import DistillConfig, DistillTrainer, load_models, open_teachers, prepare
from xtoken.training.batches import ExampleCollator
from xtoken.training.config_arguments import training_arguments
from xtoken.training.run import taught_by

ROUNDS = 3


class Parts:
    """CPU seconds by part, each moment counted once."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._stack = ["rest"]
        self._since = time.process_time()
        self._now: dict[str, float] = defaultdict(float)

    def _turn(self) -> None:
        now = time.process_time()
        self._now[self._stack[-1]] += now - self._since
        self._since = now

    def of(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed as this part."""

        @functools.wraps(function)
        def timed(*given: Any, **named: Any) -> Any:
            self._turn()
            self._stack.append(name)
            try:
                return function(*given, **named)
            finally:
                self._turn()
                self._stack.pop()

        return timed

    def end_step(self) -> None:
        """Begin the next step."""
        self._turn()
        self.steps.append(dict(self._now))
        self._now = defaultdict(float)


class EndSteps(TrainerCallback):
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the step's account."""
        self._parts.end_step()


def main() -> None:
    """Print milliseconds a step and shares."""
    torch.set_num_threads(1)
    quiet_transformers()
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    config = DistillConfig(
        loss=sys.argv[3] if len(sys.argv) > 3 else "prefix-kl",  # type: ignore[arg-type]
        steps=steps,
        learning_rate=3e-3,
        warmup_steps=10,
        device="cpu",
    )
    texts = read_documents(folder / "train.jsonl")[: steps * config.batch_size]
    materials = prepare(
        load_models(folder / "student", folder / "teacher"), TextSplit(texts, texts[:4], 0), config
    )
    sources = open_teachers(materials, config, [config.loss], folder / "teacher-top-k")
    rounds = [_measure(materials, config, sources[config.loss]) for _ in range(ROUNDS)]
    same_steps = list(zip(*rounds, strict=True))[1:]  # the first one warms up
    names = sorted({name for same in same_steps for each in same for name in each})
    least = {
        name: sum(min(each.get(name, 0.0) for each in same) for same in same_steps)
        for name in names
    }
    whole = sum(least.values())
    for name, seconds in sorted(least.items(), key=lambda item: -item[1]):
        print(f"{name:32s} {1000 * seconds / (steps - 1):8.2f} ms {seconds / whole:7.1%}")
    print(f"{'a step':32s} {1000 * whole / (steps - 1):8.2f} ms")
    own = [name for name in names if name.startswith(("kd", "collation", "stored"))]
    ce = least.get("ce", 0.0)
    share = sum(least[name] for name in own)
    print(f"KD loss and collation: {share / whole:.1%}; with CE {(share + ce) / whole:.1%}")


def _measure(materials: Any, config: DistillConfig, source: Any) -> list[dict[str, float]]:
    parts = Parts()
    student = materials.models.load_student()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = DistillTrainer(
            student,
            training_arguments(config, scratch),
            teachers=taught_by(materials, config, [source]),
            train_dataset=materials.rows("train"),
            eval_dataset=materials.rows("held_out"),
            processing_class=materials.pair,
            callbacks=[EndSteps(parts)],
        )
        trainer.remove_callback(PrinterCallback)
        collator = trainer.data_collator
        assert isinstance(collator, ExampleCollator)
        trainer.data_collator = parts.of("collation", collator)
        kept = (TopKStore.signal, Distiller.cross_entropy, Distiller.forward)
        TopKStore.signal = parts.of("stored predictions read", kept[0])  # type: ignore[method-assign]
        Distiller.cross_entropy = parts.of("ce", kept[1])  # type: ignore[method-assign]
        Distiller.forward = parts.of("kd", kept[2])  # type: ignore[method-assign]
        student.forward = parts.of("student forward", student.forward)
        trainer.accelerator.backward = parts.of("backward", trainer.accelerator.backward)
        try:
            trainer.create_optimizer()
            optimizer = trainer.optimizer
            assert optimizer is not None
            optimizer.step = parts.of("optimizer", optimizer.step)  # type: ignore[method-assign]
            trainer.train()
        finally:
            TopKStore.signal, Distiller.cross_entropy, Distiller.forward = kept  # type: ignore[method-assign]
    return parts.steps


if __name__ == "__main__":
    main()
