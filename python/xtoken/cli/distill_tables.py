"""The tables that `xtoken distill` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from rich.table import Table

from xtoken.align import AlignmentBatch
from xtoken.cli.console import show_bytes, show_seconds
from xtoken.data import Example
from xtoken.projection import RULE_CODES, Projection
from xtoken.tensors.chunks import ChunkBatch
from xtoken.training.dry_run import DryRun
from xtoken.training.evaluate import HeldOutScore
from xtoken.training.prepare import PreparedData
from xtoken.training.run import RunResult

COLUMNS = (
    ("bits per byte", "bits_per_byte"),
    ("mass on 2-3 digit numerals", "numeral_mass"),
    ("mass on single digits", "digit_mass"),
    ("numeral NLL (nats)", "numeral_nll"),
)


def result_rows(results: Sequence[RunResult]) -> list[list[str]]:
    """Return one row for the untrained student and one per loss: name, scores, seconds."""
    rows = [["before", *_scores(results[0].before), ""]]
    rows += [[item.loss, *_scores(item.after), f"{item.seconds:.0f}"] for item in results]
    return rows


def _scores(score: HeldOutScore) -> list[str]:
    values = [getattr(score, name) for _, name in COLUMNS]
    return ["none" if math.isnan(value) else f"{value:.3f}" for value in values]


def result_table(results: Sequence[RunResult]) -> Table:
    """Return the scores before training and after each loss."""
    score = results[0].after
    table = Table(
        title=f"held-out part: {score.bytes:,} bytes, {score.tokens:,} tokens, of which "
        f"{score.numeral_positions:,} are two- or three-digit numerals"
    )
    table.add_column("student")
    for title, _ in COLUMNS:
        table.add_column(title, justify="right")
    table.add_column("seconds", justify="right")
    for row in result_rows(results):
        table.add_row(*row)
    return table


def comparison_markdown(results: Sequence[RunResult]) -> str:
    """Return the same table in Markdown, with what the columns mean."""
    titles = ["student", *(title for title, _ in COLUMNS), "seconds"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in result_rows(results)]
    score = results[0].after
    lines += [
        "",
        f"Held-out part: {score.bytes:,} bytes in {score.tokens:,} tokens. The masses are mean "
        f"probabilities at the {score.numeral_positions:,} positions whose next token is a two- or "
        "three-digit numeral.",
    ]
    return "\n".join(lines) + "\n"


def projection_table(projection: Projection) -> Table:
    """Return how many student tokens each rule of W maps, and how its numerals fare."""
    stats = projection.stats()
    rows, columns = projection.shape
    table = Table(title=f"W: {rows:,} student tokens onto {columns:,} teacher tokens")
    table.add_column("student tokens")
    table.add_column("number", justify="right")
    table.add_column("share", justify="right")
    shown = [(name, stats[name]) for name in RULE_CODES if stats[name]]
    for name, count in shown:
        table.add_row(f"rule {name}", f"{count:,}", f"{count / rows:.2%}")
    for digits in (1, 2, 3):
        total = stats.get(f"numerals_{digits}", 0)
        exact = stats.get(f"numerals_{digits}_exact", 0)
        if total:
            table.add_row(
                f"{digits}-digit numerals with an exact partner",
                f"{exact:,} of {total:,}",
                f"{exact / total:.2%}",
            )
    return table


def coverage_table(materials: PreparedData) -> Table:
    """Return the sizes of both parts, and how much of them lies in chunks of the same bytes."""
    table = Table(title="alignment")
    table.add_column("")
    columns = []
    for name, part in (("training", materials.train), ("held-out", materials.held_out)):
        table.add_column(name, justify="right")
        coverage = AlignmentBatch.stack([item.alignment for item in part.examples]).coverage
        loss = sum(map(loss_tokens, part.examples))
        taught = sum(map(taught_tokens, part.examples))
        columns.append(
            {
                "examples": f"{len(part):,}",
                "student tokens": f"{coverage.student_tokens:,}",
                "teacher tokens": f"{coverage.teacher_tokens:,}",
                "chunks": f"{coverage.chunks:,}",
                "exact chunks": f"{coverage.exact_chunks / coverage.chunks:.2%}",
                "student tokens in exact chunks": f"{coverage.student_token_share:.2%}",
                "teacher tokens in exact chunks": f"{coverage.teacher_token_share:.2%}",
                "student bytes in exact chunks": f"{coverage.student_byte_share:.2%}",
                "student tokens in the loss": f"{loss:,}",
                "of these taught by chunks": f"{taught / max(loss, 1):.2%}",
                "chunks in the loss": f"{sum(map(_loss_chunks, part.examples)):,}",
            }
        )
    for title, value in columns[0].items():
        table.add_row(title, value, columns[1][title])
    return table


def loss_tokens(example: Example) -> int:
    """The student tokens that cross-entropy counts."""
    return int(example.student_loss_mask[1:].sum())  # nothing predicts a first token


def taught_tokens(example: Example) -> int:
    """The student tokens in chunks that a loss counts."""
    chunks = _usable(example)
    return int((chunks.student_end - chunks.student_start).sum())


def _loss_chunks(example: Example) -> int:
    return len(_usable(example))


def _usable(example: Example) -> ChunkBatch:
    masks = (
        torch.from_numpy(own)[None]
        for own in (example.student_loss_mask, example.teacher_loss_mask)
    )
    return ChunkBatch.usable_from_alignments([example.alignment], *masks)


def dry_run_table(found: DryRun) -> Table:
    """What a run will take."""
    table = Table(title="what the run takes", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    sizes = [
        ("weights of the student", found.weights),
        ("gradients", found.gradients),
        ("optimizer", found.optimizer),
        ("logits, longest micro-batch", found.logits),
        ("their gradient", found.logits_gradient),
        ("weights of teachers beside it", found.teacher_weights),
        ("teachers' predictions of a micro-batch", found.teacher_signal),
    ]
    if found.filling_weights:
        sizes.append(("weights of the teacher, before training", found.filling_weights))
    sizes.append(("at once, without activations", found.memory))
    if found.peak is not None:
        sizes.append(("measured peak on the device", found.peak))
    for name, size in sizes:
        table.add_row(name, show_bytes(size))
    table.add_section()
    table.add_row("teacher store, on the disk", show_bytes(found.store))
    table.add_row("time to fill it", show_seconds(found.store_seconds))
    table.add_row("measured, per step", f"{found.seconds_per_step:.3g} s")
    table.add_row(
        f"time for {found.steps:,} steps", show_seconds(found.steps * found.seconds_per_step)
    )
    table.add_row("time for evaluations", show_seconds(found.evaluation_seconds))
    table.add_row("time of the run", show_seconds(found.seconds))
    return table
