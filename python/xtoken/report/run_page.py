"""Runs as a page: what was logged, several runs over each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from xtoken.errors import OptionError
from xtoken.report.page import render_page
from xtoken.report.panels import MEAN_OF, Panel, Records, moving_mean, panels_of

# Points of a line on the page; more are averaged over neighbouring steps.
POINTS = 1500
# Runs that can be told apart.
RUNS = 8


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: for people.
        records: as `metrics.jsonl` holds them.
        facts: what else is known of it, such as its loss, by name.
    """

    name: str
    records: Records
    facts: Mapping[str, object] = field(default_factory=dict)


def run_page(runs: Sequence[Run]) -> str:
    """The page: loss parts, held-out scores, mass and coverage, by class where it was logged.

    Args:
        runs: 1 to 8.

    Raises:
        OptionError: no run, too many, or none with a record.
    """
    if not 1 <= len(runs) <= RUNS:
        raise OptionError(
            f"{len(runs)} runs, expected 1 to {RUNS}: more lines cannot be told apart; name fewer"
        )
    panels = panels_of([run.records for run in runs])
    if not panels:
        names = ", ".join(run.name for run in runs)
        raise OptionError(f"{names}: no record yet; wait for the first step, or name another run")
    charts = [_chart(panel, runs) for panel in panels]
    groups = list(dict.fromkeys(panel.group for panel in panels))
    data = {
        "runs": [run.name for run in runs],
        "mean_of": MEAN_OF,
        "charts": [chart.to_json() for chart in charts],
    }
    values = {
        "runs": [(chr(ord("A") + at), run, _last_step(run)) for at, run in enumerate(runs)],
        "fact_names": list(dict.fromkeys(name for run in runs for name in run.facts)),
        "groups": [
            (group, [(at, chart) for at, chart in enumerate(charts) if chart.panel.group == group])
            for group in groups
        ],
        "mean_of": MEAN_OF,
        "averaged": any(chart.averaged for chart in charts),
        "points": POINTS,
    }
    return render_page("run", data, values)


@dataclass(frozen=True)
class Chart:
    """One panel with the lines of all runs.

    Attributes:
        lines: per run (step, value) by rising step; empty where it did not log it.
        summary: per run the first and the last value; None where there is none. Of a training
            metric they are means of a few records.
        averaged: some points are means over neighbours.
        low, high: range of the axis; it begins at 0 where no value is below, and a share has all
            of 0 to 1.
    """

    panel: Panel
    lines: list[list[tuple[float, float]]]
    summary: list[tuple[float, float] | None]
    averaged: bool
    low: float
    high: float

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "title": self.panel.title,
            "smooth": self.panel.smooth,
            "low": self.low,
            "high": self.high,
            "lines": [
                [[step, float(f"{value:.6g}")] for step, value in line] for line in self.lines
            ],
        }


def _chart(panel: Panel, runs: Sequence[Run]) -> Chart:
    lines, summary, averaged = [], [], False
    for run in runs:
        points = panel.points(run.records)
        few = _averaged(points)
        averaged |= len(few) < len(points)
        lines.append(few)
        summary.append(_ends(points, panel.smooth))
    values = [value for line in lines for _, value in line]
    low, high = panel.limits(values)
    return Chart(panel, lines, summary, averaged, low, high)


def _ends(points: list[tuple[float, float]], smooth: bool) -> tuple[float, float] | None:
    if not points:
        return None
    values = [value for _, value in points]
    if not smooth:
        return values[0], values[-1]
    # The means of as many records from either end.
    return moving_mean(values[:MEAN_OF], MEAN_OF)[-1], moving_mean(values, MEAN_OF)[-1]


def _averaged(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / POINTS)
    if size <= 1:
        return points
    parts = [points[at : at + size] for at in range(0, len(points), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def _last_step(run: Run) -> int:
    return int(max((record["step"] for record in run.records), default=0))
