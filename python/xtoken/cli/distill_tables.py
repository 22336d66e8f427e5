"""The tables that `xtoken distill` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from xtoken.projection import Projection
from xtoken.training.evaluate import HeldOutScore
from xtoken.training.prepare import Materials
from xtoken.training.run import RunResult

COLUMNS = (
    ("bits per byte", "bits_per_byte"),
    ("mass on 2-3 digit numerals", "numeral_mass"),
    ("mass on single digits", "digit_mass"),
    ("numeral NLL (nats)", "numeral_nll"),
)


def result_rows(results: Sequence[RunResult]) -> list[list[str]]:
    """Return one row for the untrained student and one a loss: name, scores, seconds."""
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
    """Return the statistics of W."""
    table = Table(title="W: {:,} student x {:,} teacher tokens".format(*projection.shape))
    table.add_column("statistic")
    table.add_column("value", justify="right")
    for name, value in projection.stats().items():
        table.add_row(str(name), str(value))
    return table


def coverage_table(materials: Materials) -> Table:
    """Return how much of both parts' text lies in chunks that a loss can use."""
    table = Table(title="alignment")
    for title in ("part", "documents", "student tokens", "teacher tokens", "chunks", "exact"):
        table.add_column(title, justify="right")
    for name, part in (("training", materials.train), ("held-out", materials.held_out)):
        alignments = [example.alignment for example in part.examples]
        exact = sum(int((alignment.kind == 0).sum()) for alignment in alignments)
        chunks = sum(len(alignment.kind) for alignment in alignments)
        students = sum(len(example.student_ids) for example in part.examples)
        teachers = sum(len(example.teacher_ids) for example in part.examples)
        table.add_row(
            name,
            f"{len(part):,}",
            f"{students:,}",
            f"{teachers:,}",
            f"{chunks:,}",
            f"{exact / chunks:.2%}",
        )
    return table
