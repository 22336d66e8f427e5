"""The curves of one or more runs as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from xtoken._extras import needs_extra
from xtoken._files import temporary_beside
from xtoken.errors import OptionError

Records = Sequence[Mapping[str, float]]

# Panel: the record's name, the title with its unit, and how it is drawn.
PANELS = (
    ("ce", "training cross-entropy (nats per token)", "moving mean"),
    ("kd", "training distillation loss (nats per chunk)", "moving mean"),
    ("eval_bits_per_byte", "held-out bits per byte", "points"),
    ("eval_numeral_mass", "held-out mass on 2-3 digit numerals, where one is right", "points"),
    ("eval_digit_mass", "held-out mass on single digits, where a numeral is right", "points"),
    ("learning_rate", "learning rate", "line"),
)


def draw_curves(runs: Mapping[str, Records], path: Path | str) -> None:
    """Draw the training and held-out curves of runs into one picture, one colour per run.

    Args:
        runs: records by the name of the run; a record has `step` and any of the panels' names.
        path: where the PNG is written.

    Raises:
        OptionError: there is no run.
        MissingExtraError: matplotlib is not installed.
    """
    if not runs:
        raise OptionError("0 runs, expected at least 1; there is nothing to draw")
    # The object interface: no global state, no display.
    with needs_extra():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).flat
    for axis, (name, title, style) in zip(axes, PANELS, strict=True):
        for index, (run, records) in enumerate(runs.items()):
            points = [(record["step"], record[name]) for record in records if name in record]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            colour = f"C{index}"
            if style == "moving mean":
                axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
                axis.plot(steps, _moving_mean(values, 15), color=colour, label=run)
            else:
                axis.plot(
                    steps,
                    values,
                    color=colour,
                    label=run,
                    marker="o" if style == "points" else "",
                    markersize=3,
                )
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    with temporary_beside(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _moving_mean(values: Sequence[float], width: int) -> list[float]:
    means = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - width) : end]
        means.append(sum(window) / len(window))
    return means
