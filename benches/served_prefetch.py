"""`python -m benches.served_prefetch [SECONDS ...]`: the wall time of a training run whose teacher
is served, with and without asking ahead.

A tiny pair, and a server on loopback that waits SECONDS before each answer, as one that computes
elsewhere does: it takes no CPU from the student here. Two arms train the same steps in turn, and
must end at the same weights: a teacher that is asked when its predictions are needed, and the one
of the trainers, which is asked for this step and the next one.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from served_server import Faults, ServedModel
from tiny_models import tiny_texts, write_pair

from xtoken.cli.console import quiet_transformers
from xtoken.pair import Pair
from xtoken.teachers.served import PrefetchedTeacher, ServedTeacher
from xtoken.training import DistillArguments, DistillTrainer, Teacher

STEPS, ROUNDS = 8, 3


class AskedAtNeed:
    """A served teacher of which no trainer knows that it can be asked ahead."""

    def __init__(self, served: ServedTeacher) -> None:
        self.signal = served.signal


def main() -> None:
    """Print a line for each delay."""
    torch.set_num_threads(1)
    quiet_transformers()
    delays = [float(each) for each in sys.argv[1:]] or [0.0, 0.1, 0.3, 1.0]
    with tempfile.TemporaryDirectory() as scratch:
        write_pair(Path(scratch))
        for delay in delays:
            _measure(Path(scratch), delay)


def _measure(folder: Path, delay: float) -> None:
    pair = Pair(str(folder / "student"), str(folder / "teacher"), cache_dir=False)
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    arms: dict[str, Callable[[ServedTeacher], Any]] = {
        "at need": AskedAtNeed,
        "ahead": PrefetchedTeacher,
    }
    seconds = dict.fromkeys(arms, float("inf"))
    ends: list[torch.Tensor] = []
    with ServedModel(model, "sglang", faults=Faults(slow=delay)) as server:
        for _ in range(ROUNDS):
            for name, make in arms.items():
                with ServedTeacher(server.url, vocab=pair.teacher_tokenizer, top_k=64) as served:
                    _ = served.question
                    trainer = _trainer(folder, pair, make(served))
                    began = time.perf_counter()
                    trainer.train()
                    seconds[name] = min(seconds[name], time.perf_counter() - began)
                ends.append(nn.utils.parameters_to_vector(trainer.model.parameters()).detach())
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-4)
    words = "; ".join(f"{name} {each / STEPS:.3f} s a step" for name, each in seconds.items())
    print(f"{delay:g} s an answer: {words}; {seconds['at need'] / seconds['ahead']:.2f} x")


def _trainer(folder: Path, pair: Pair, teacher: Any) -> DistillTrainer:
    args = DistillArguments(
        str(folder / "out"), max_steps=STEPS, per_device_train_batch_size=4, max_tokens=96,
        gradient_accumulation_steps=2, top_k=32, kd_weight=1.0, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    student = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    return DistillTrainer(
        student, args, teachers=[Teacher(teacher, pair)], train_dataset=tiny_texts(8 * STEPS),
        processing_class=pair,
    )  # fmt: skip


if __name__ == "__main__":
    main()
