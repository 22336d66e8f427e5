"""The results as tables and a picture: mean and spread over seeds, and differences by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benches.losses_on_pairs.arms import ARMS, Setting

Result = dict[str, Any]
Runs = dict[int, Result]

BASELINE = "CE"
# A class or shape is shown where it is so much of the bytes.
LEAST_SHARE = 0.01


def by_text(results: Sequence[Result]) -> dict[tuple[str, Setting], dict[str, Runs]]:
    """Results by text and setting, then by arm in the order of the arms, then by seed."""
    order = {arm: place for place, arm in enumerate(ARMS)}
    known = [result for result in results if result.get("arm") in order]
    known.sort(key=lambda r: (r["text"], order[r["arm"]], r["seed"]))
    found: dict[tuple[str, Setting], dict[str, Runs]] = {}
    for run in known:
        setting = Setting(*(run[name] for name in Setting._fields))
        found.setdefault((run["text"], setting), {}).setdefault(run["arm"], {})[run["seed"]] = run
    trained = {text for text, _ in found}
    for result in results:  # texts that were only scored
        if (text := result.get("ends")) is not None and text not in trained:
            found[text, Setting()] = {}
    return found


def ends(results: Sequence[Result], text: str) -> Result | None:
    """What both models know of a text before training."""
    return next((result for result in results if result.get("ends") == text), None)


def late_ce(run: Result) -> float:
    """Nats per token of the second half of the training passages, each before it is trained on."""
    values = run["training_ce"]
    return statistics.fmean(values[len(values) // 2 :]) if values else float("nan")


def _cell(values: Sequence[float], digits: int = 3) -> str:
    if any(math.isnan(value) for value in values):  # a unit without cross-entropy logs none
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _less(runs: Runs, baseline: Runs, value: Any) -> str:
    found = [value(run) - value(baseline[seed]) for seed, run in runs.items() if seed in baseline]
    return ", ".join(f"{less:+.3f}" for less in found if not math.isnan(less))


def markdown(results: Sequence[Result]) -> str:
    """One table per text and setting."""
    lines: list[str] = []
    for (text, setting), arms in by_text(results).items():
        edge = ends(results, text)
        shares: dict[str, float] = {} if edge is None else dict(edge["shares"])
        columns = [n for n in sorted(shares) if LEAST_SHARE <= shares[n] < 1 and " " in n]
        heads = [f"{name.split(' ', 1)[1]} ({shares[name]:.0%})" for name in columns]
        lines += [
            f"\n{text}: {setting.steps} steps of {setting.batch_size} passages, learning rate "
            f"{setting.learning_rate:g}\n"
            if arms
            else f"\n{text}: nothing trained yet\n",
            "| arm | seeds | bits/byte | less CE, by seed | gap closed | late CE, nats/token | "
            f"less CE, by seed | {' | '.join(heads)} | CPU s/step |",
            "|" + " --- |" * (8 + len(heads)),
        ]
        baseline = arms.get(BASELINE, {})
        if edge is not None:
            for name in ("student", "teacher"):
                scores = [edge[name].get(column) for column in columns]
                cells = ["" if score is None else f"{score:.3f}" for score in scores]
                label = "untrained student" if name == "student" else "teacher"
                lines.append(
                    f"| {label} | | {edge[name]['all']:.3f} | | | | | {' | '.join(cells)} | |"
                )
        for arm, runs in arms.items():
            total = [run["scores"]["all"] for run in runs.values()]
            cells = [
                arm,
                ", ".join(map(str, runs)),
                _cell(total),
                "" if arm == BASELINE else _less(runs, baseline, lambda r: r["scores"]["all"]),
                "" if edge is None else _gap(total, edge),
                _cell([late_ce(run) for run in runs.values()]),
                "" if arm == BASELINE else _less(runs, baseline, late_ce),
                *(_cell([run["scores"][c] for run in runs.values()]) for c in columns),
                _cell([run["cpu_seconds_per_step"] for run in runs.values()], 1),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines).strip() + "\n"


def _gap(total: Sequence[float], edge: Result) -> str:
    start, goal = edge["student"]["all"], edge["teacher"]["all"]
    return f"{(start - statistics.fmean(total)) / (start - goal):.0%}"


def draw(results: Sequence[Result], path: Path) -> None:
    """A panel per text: bits per byte of each arm, a point per seed; the teacher as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tables = by_text(results)
    most: dict[str, tuple[Setting, dict[str, Runs]]] = {}
    for (text, setting), arms in tables.items():  # the setting with the most arms
        if arms and (text not in most or len(arms) > len(most[text][1])):
            most[text] = (setting, arms)
    if not most:
        return
    rows = max(len(arms) for _, arms in most.values())
    figure = Figure(figsize=(5.5 * len(most), 1.6 + 0.32 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(most), squeeze=False)
    for panel, (text, (setting, arms)) in zip(panels[0], most.items(), strict=True):
        for place, (_, runs) in enumerate(arms.items()):
            values = [run["scores"]["all"] for run in runs.values()]
            panel.plot(values, [place] * len(values), "o", color="#1f4e79", markersize=5)
        if BASELINE in arms:
            mean = statistics.fmean(run["scores"]["all"] for run in arms[BASELINE].values())
            panel.axvline(mean, color="#b04a2f", linewidth=1, label="CE alone")
        edge = ends(results, text)
        if edge is not None:
            panel.axvline(edge["teacher"]["all"], color="#2f7d4f", linewidth=1, label="teacher")
        panel.set_yticks(range(len(arms)), list(arms))
        panel.invert_yaxis()
        panel.set_xlabel("bits per byte, held out")
        panel.set_title(f"{text}: {setting.steps} steps of {setting.batch_size}", fontsize=10)
        panel.grid(axis="x", alpha=0.3)
    # Below the panels: inside one it lies on points.
    lines = panels[0][0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
