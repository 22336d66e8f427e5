"""The results as a table and a picture: mean and spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benches.uncommon_tokens.arms import ARMS

# Name in `scores`, heading, digits.
COLUMNS = (
    ("bits_per_byte_all", "bits/byte", 3),
    ("bits_per_byte_prose", "prose", 3),
    ("bits_per_byte_numbers", "number-rich", 3),
    ("bits_per_byte_off_numerals", "off numerals", 3),
    ("numeral_nll", "numeral NLL", 2),
    ("numeral_nll_class", "class", 2),
    ("numeral_nll_first", "first digit", 2),
    ("numeral_nll_rest", "rest", 2),
    ("numeral_top1", "top-1", 3),
    ("numeral_top10", "top-10", 3),
    ("numeral_mass", "mass numerals", 2),
    ("digit_mass", "mass digits", 2),
)

Result = dict[str, Any]


def groups(results: Sequence[Result]) -> dict[tuple[int, str], list[Result]]:
    """Results by steps and arm, in the order of the arms, each by seed."""
    order = {arm: place for place, arm in enumerate(ARMS)}
    known = [result for result in results if result["arm"] in order]
    known.sort(key=lambda result: (result["steps"], order[result["arm"]], result["seed"]))
    found: dict[tuple[int, str], list[Result]] = {}
    for result in known:
        found.setdefault((result["steps"], result["arm"]), []).append(result)
    return found


def _cell(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def markdown(results: Sequence[Result]) -> str:
    """One table for each number of steps: mean ± standard deviation over seeds."""
    lines: list[str] = []
    steps_before = None
    for (steps, arm), runs in groups(results).items():
        if steps != steps_before:
            heads = ["arm", "seeds", *(head for _, head, _ in COLUMNS), "CPU s/step"]
            lines += [f"\n{steps} steps\n", "| " + " | ".join(heads) + " |"]
            lines.append("|" + " --- |" * len(heads))
            steps_before = steps
        cells = [arm, ", ".join(str(run["seed"]) for run in runs)]
        cells += [
            _cell([run["scores"][name] for run in runs], digits) for name, _, digits in COLUMNS
        ]
        cells.append(_cell([run["cpu_seconds_per_step"] for run in runs], 2))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines).strip() + "\n"


def draw(results: Sequence[Result], path: Path) -> None:
    """Bits per byte and numeral NLL by arm, one mark a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_group = groups(results)
    all_steps = sorted({steps for steps, _ in by_group})
    figure = Figure(figsize=(12, 2.2 + 2.2 * len(all_steps)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (COLUMNS[0], COLUMNS[4], COLUMNS[10])
    axes = figure.subplots(len(all_steps), len(panels), squeeze=False, sharey="row")
    for row, steps in zip(axes, all_steps, strict=True):
        arms = [arm for group_steps, arm in by_group if group_steps == steps]
        for axis, (name, title, _) in zip(row, panels, strict=True):
            for place, arm in enumerate(arms):
                values = [run["scores"][name] for run in by_group[steps, arm]]
                axis.plot(values, [place] * len(values), "o", color=f"C{place}", alpha=0.6)
                axis.plot(statistics.fmean(values), place, "|", color=f"C{place}", markersize=18)
            axis.set_yticks(range(len(arms)), arms)
            axis.set_title(f"{title}, {steps} steps", fontsize=9)
            axis.grid(alpha=0.3)
        row[0].invert_yaxis()
    figure.savefig(path, dpi=110)
