"""The results as a table and a picture: mean and spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benches.uncommon_tokens.arms import ARMS, OTHER_SETTINGS, Setting

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

# Scores that are also told seed by seed, less those of this arm: the arms share what a seed draws.
BASELINE = "P-KL decay 0"
PAIRED = (COLUMNS[0], COLUMNS[4])

Result = dict[str, Any]


def groups(results: Sequence[Result]) -> dict[str, dict[str, dict[int, Result]]]:
    """Results by setting (named), arm (in the order of the arms) and seed."""
    order = {arm: place for place, arm in enumerate(ARMS)}
    known = [result for result in results if result["arm"] in order]
    known.sort(key=lambda result: (order[result["arm"]], result["seed"]))
    found: dict[str, dict[str, dict[int, Result]]] = {}
    for (passages, batch_size), steps in product((Setting(), *OTHER_SETTINGS), (480, 160)):
        arms: dict[str, dict[int, Result]] = {}
        for run in known:
            if (run["passages"], run["batch_size"], run["steps"]) == (passages, batch_size, steps):
                arms.setdefault(run["arm"], {})[run["seed"]] = run
        if arms:
            found[f"{steps} steps of {batch_size}, {passages} passages"] = arms
    return found


def _cell(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _scores(runs: dict[int, Result], name: str) -> dict[int, float]:
    return {seed: float(run["scores"][name]) for seed, run in runs.items()}


def _against(runs: dict[int, Result], baseline: dict[int, Result], name: str, digits: int) -> str:
    theirs = _scores(baseline, name)
    return ", ".join(
        f"{value - theirs[seed]:+.{digits}f}"
        for seed, value in _scores(runs, name).items()
        if seed in theirs
    )


def markdown(results: Sequence[Result]) -> str:
    """One table a setting: mean ± standard deviation over seeds, and differences seed by seed."""
    heads = ["arm", "seeds", *(head for _, head, _ in COLUMNS)]
    heads += [*(f"{head} less {BASELINE}, by seed" for _, head, _ in PAIRED), "CPU s/step"]
    lines: list[str] = []
    for title, arms in groups(results).items():
        lines += [f"\n{title}\n", "| " + " | ".join(heads) + " |"]
        lines.append("|" + " --- |" * len(heads))
        for arm, runs in arms.items():
            cells = [arm, ", ".join(map(str, runs))]
            cells += [
                _cell(list(_scores(runs, name).values()), digits) for name, _, digits in COLUMNS
            ]
            cells += [
                "" if arm == BASELINE else _against(runs, arms.get(BASELINE, {}), name, digits)
                for name, _, digits in PAIRED
            ]
            cells.append(_cell([run["cpu_seconds_per_step"] for run in runs.values()], 2))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines).strip() + "\n"


def draw(results: Sequence[Result], path: Path) -> None:
    """Bits per byte and numeral NLL by arm, one mark a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = groups(results)
    panels = (COLUMNS[0], COLUMNS[4], COLUMNS[10])
    heights = [1 + len(arms) for arms in settings.values()]
    figure = Figure(figsize=(12, 0.6 + 0.3 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        len(settings), len(panels), squeeze=False, sharey="row", height_ratios=heights
    )
    for row, (of, arms) in zip(axes, settings.items(), strict=True):
        for axis, (name, title, _) in zip(row, panels, strict=True):
            for place, runs in enumerate(arms.values()):
                values = list(_scores(runs, name).values())
                axis.plot(values, [place] * len(values), "o", color=f"C{place}", alpha=0.6)
                axis.plot(statistics.fmean(values), place, "|", color=f"C{place}", markersize=18)
            axis.set_yticks(range(len(arms)), list(arms))
            axis.set_title(f"{title}, {of}", fontsize=8)
            axis.grid(alpha=0.3)
        row[0].set_ylim(len(arms) - 0.5, -0.5)
    figure.savefig(path, dpi=110)
