"""`python -m benches.around_core`: what Python adds to an alignment.

SmolLM2 as the student and DeepSeek as the teacher, 8 sequences of 512 student tokens, one
thread, CPU time of the thread, the least of 60 rounds; each in microseconds and over the alignment
of two flat arrays. A call of one token on each side is the fixed overhead.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benches.alignment import pieces, smollm2, text_of, tokenizer_zoo
from xtoken import Aligner
from xtoken.tensors.chunks import ChunkBatch

ROWS, TOKENS = 8, 512
ROUNDS, CALLS = 60, 20


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    student, teacher = smollm2(), tokenizer_zoo.deepseek()
    texts = pieces(student, text_of(1_500_000), ROWS, TOKENS)
    lists = [
        [encoding.ids for encoding in side.encode_batch(texts, add_special_tokens=False)]
        for side in (student, teacher)
    ]
    aligner = Aligner(student, teacher, threads=1)
    arrays = [[np.array(row, np.int64) for row in side] for side in lists]
    flat = [np.concatenate(side) for side in arrays]
    student_starts, teacher_starts = (np.cumsum([0, *map(len, side)]) for side in lists)
    masks = [_mask(side) for side in lists]
    padded = [_padded(side) for side in arrays]
    single = [side[0][:1][None] for side in arrays]
    batch = aligner.align_batch(*arrays)
    arms: dict[str, Callable[[], Any]] = {
        "two flat arrays": lambda: aligner.align_batch(
            *flat, student_indptr=student_starts, teacher_indptr=teacher_starts
        ),
        "lists of arrays": lambda: aligner.align_batch(*arrays),
        "lists of lists": lambda: aligner.align_batch(*lists),
        "padded, with masks": lambda: aligner.align_batch(
            *padded, student_mask=masks[0].numpy(), teacher_mask=masks[1].numpy()
        ),
        "one token on each side": lambda: aligner.align_batch(*single),
        "usable chunks": lambda: ChunkBatch.usable_from_alignments(batch, *masks),
        "the same in two steps": lambda: ChunkBatch.from_alignments(batch).usable(*masks),
    }
    best = {name: _least(call) for name, call in arms.items()}
    table = Table(title=f"{ROWS} x {TOKENS} student tokens")
    for column in ("", "us", "x two flat arrays", "x lists of arrays"):
        table.add_column(column)
    for name, seconds in best.items():
        over = (seconds / best[base] for base in ("two flat arrays", "lists of arrays"))
        table.add_row(name, f"{seconds * 1e6:.1f}", *(f"{ratio:.2f}" for ratio in over))
    Console().print(table)


def _least(call: Callable[[], Any]) -> float:
    found = float("inf")
    for _ in range(ROUNDS):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        found = min(found, (time.thread_time() - start) / CALLS)
    return found


def _mask(side: list[list[int]]) -> torch.Tensor:
    lengths = torch.tensor([len(row) for row in side])
    return torch.arange(int(lengths.max())) < lengths[:, None]


def _padded(side: list[np.ndarray]) -> np.ndarray:
    ids = np.zeros((len(side), max(map(len, side))), np.int64)
    for at, row in enumerate(side):
        ids[at, : len(row)] = row
    return ids


if __name__ == "__main__":
    main()
