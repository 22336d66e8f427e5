"""What differences cost: words changed on one side, a cut tail, a header, unrelated texts.

    python benches/resync.py        # SmolLM2, Mistral's SentencePiece model, DeepSeek
    python benches/resync.py --pair STUDENT TEACHER [--pair ...] [--json out.json]
    python benches/resync.py --all DIR        # all pairs of the tokenizers in a directory

The figures are those of `xtoken-bench resync` (built here by cargo) on 1 MB of real English and
code: CPU time of one thread, the least of the rounds, clean and changed texts in turn. Words are
replaced, dropped, doubled, capitalized or joined on the teacher's side. *Points below the optimum*:
bytes in EXACT chunks against the exact dynamic program over all pairs of token boundaries.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import alignment
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

MEGABYTE = 1_000_000
# Share of the words: cost over the clean walk that must and should be reached, and points.
TARGETS = {
    0.001: ((4.0, 2.0), (0.01, 0.0)),
    0.01: ((7.0, 4.0), (0.05, 0.02)),
    0.1: ((25.0, 12.0), (0.5, 0.25)),
}


def measure(
    student: Tokenizer, teacher: Tokenizer, rounds: int, checked: int
) -> list[dict[str, Any]]:
    """The lines of `xtoken-bench resync` on a megabyte of text."""
    text = alignment.text_of(MEGABYTE).encode()[:MEGABYTE]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text"
        file.write_bytes(text.decode("utf8", "ignore").encode())
        options = ["--text", str(file), "--rounds", str(rounds), "--checked", str(checked)]
        for name, side in (("student", student), ("teacher", teacher)):
            (Path(folder) / name).mkdir()
            side.save(str(Path(folder) / name / "tokenizer.json"))
            options += [f"--{name}", str(Path(folder) / name / "tokenizer.json")]
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
            "resync",
        ]
        done = subprocess.run(
            [*command, *options], cwd=alignment.ROOT, check=True, stdout=subprocess.PIPE, text=True
        )
    return [json.loads(line) for line in done.stdout.splitlines()]


def differences(name: str, lines: list[dict[str, Any]]) -> Table:
    """Cost over the clean walk and quality, by the share of the words that were changed."""
    table = Table(title=f"{name}, {platform.processor() or platform.machine()}")
    table.add_column("changed")
    for title in ("ns a token", "x clean", "must, aim", "points below", "must, aim"):
        table.add_column(title, justify="right")
    for line in lines:
        cost, points = TARGETS.get(line["rate"], ((None, None), (None, None)))
        table.add_row(
            f"{line['rate']:.1%}",
            f"{line['ns_per_token']:.2f}",
            f"{line['times_clean']:.2f}",
            "" if cost[0] is None else f"{cost[0]:g}, {cost[1]:g}",
            f"{line['points_below_optimum']:.4f}",
            "" if points[0] is None else f"{points[0]:g}, {points[1]:g}",
        )
    return table


def hostile(name: str, lines: list[dict[str, Any]]) -> Table:
    """Time by length: a case on half of the text, then on twice that. Coarse: chunks at a limit."""
    table = Table(title=f"{name}, other differences")
    table.add_column("case", no_wrap=True)
    for title in ("MB, both", "ms", "ns a byte", "x half of it", "coarse"):
        table.add_column(title, justify="right")
    before: dict[str, float] = {}
    for line in lines:
        size = line["student_bytes"] + line["teacher_bytes"]
        half = before.get(line["case"])
        table.add_row(
            line["case"],
            f"{size / MEGABYTE:.2f}",
            f"{line['seconds'] * 1e3:.2f}",
            f"{line['seconds'] / size * 1e9:.2f}",
            "" if half is None else f"{line['seconds'] / half:.2f}",
            str(line["coarse_chunks"]),
        )
        before[line["case"]] = line["seconds"]
    return table


def main() -> None:
    """Measure each pair and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", nargs=2, action="append", metavar=("STUDENT", "TEACHER"))
    parser.add_argument("--all", type=Path, metavar="DIR", help="all pairs of its tokenizers")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--checked", type=int, default=120, help="sequences given to the optimum")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    console = Console()
    results = {}
    for name, (student, teacher) in alignment.chosen(arguments).items():
        lines = measure(student, teacher, arguments.rounds, arguments.checked)
        results[name] = lines
        console.print(differences(name, [line for line in lines if line["bench"] == "resync"]))
        console.print(hostile(name, [line for line in lines if line["bench"] == "hostile"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
