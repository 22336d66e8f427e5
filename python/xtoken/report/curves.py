"""The curves of one or more runs as a PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtoken._extras import installed, needs_extra
from xtoken._files import temporary_beside
from xtoken.errors import MissingExtraError, OptionError
from xtoken.report.panels import MEAN_OF, Panel, Records, moving_mean, panels_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
_WIDTH = 13.0
_DPI = 110
_STEP_LABEL = -0.117  # below the labels of the ticks, in heights of a panel
# What a picture of a run shows, where it was logged; the page of a run has all.
_DRAWN = (
    "eval_bits_per_byte", "ce", "kd", "eval_numeral_mass", "eval_digit_mass", "eval_numeral_nll",
    "teacher_mass", "coverage", "learning_rate",
)  # fmt: skip
# Lines are told apart without colour too.
_DASHES = ("solid", "dashed", "dotted", "dashdot", (0, (12, 3)))


def draw_curves(runs: Mapping[str, Records], path: Path | str) -> None:
    """Draw the training and held-out curves of runs into one picture, a line per run.

    A panel begins at 0 unless a value is below, and a share has all of 0 to 1. Panels that no run
    has a value for are left out.

    Args:
        runs: records by the name of the run; a record has `step` and any of the panels' names.
        path: where the PNG is written.

    Raises:
        OptionError: there is no run.
        MissingExtraError: matplotlib is not installed.
    """
    figure = curves_figure(runs)
    from PIL import Image  # which matplotlib brings

    # As `savefig` would write it, but without alpha and with less search: half the time.
    canvas: Any = figure.canvas  # matplotlib declares its methods without types
    canvas.draw()
    drawn = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    picture = drawn.convert("RGB")
    with temporary_beside(path) as temporary:
        picture.save(temporary, format="png", compress_level=2, dpi=(_DPI, _DPI))


def check_curves() -> None:
    """Refuse to train towards a picture that cannot be drawn at the end.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if not installed("matplotlib"):
        raise MissingExtraError(
            "curves.png needs matplotlib, which is not installed; pip install "
            '"xtoken[train]", or set curves to false (--no-curves)'
        )


def curves_figure(runs: Mapping[str, Records]) -> Figure:
    """The picture of `draw_curves`.

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

    panels = [panel for panel in panels_of(list(runs.values())) if panel.name in _DRAWN]
    panels.sort(key=lambda panel: _DRAWN.index(panel.name))
    rows = max(1, -(-len(panels) // _COLUMNS))
    height = 0.9 + 3.2 * rows
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI)
    FigureCanvasAgg(figure)
    places = _places(rows, height)
    axes = figure.subplots(rows, _COLUMNS, squeeze=False, gridspec_kw=places).flat
    steps = [record["step"] for records in runs.values() for record in records] or [0]
    first, last = min(steps), max(steps)
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, panel, runs)
        # One range for all, so that panels can be compared; a single step is no fraction wide.
        room = 0.02 * (last - first) or 1
        axis.set_xlim(first - room, last + room)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(f"{', '.join(runs)}: up to step {last:,.0f}", fontsize=12, y=0.99, va="top")
    lines = {line.get_label(): line for axis in figure.axes for line in axis.get_lines()}
    names = [name for name in runs if name in lines]
    if names:
        figure.legend(
            [lines[name] for name in names], names, loc="lower center", ncols=len(names),
            fontsize=9, title=f"strong: mean of the last {MEAN_OF} records; faint: each record",
            title_fontsize=8, frameon=False,
        )  # fmt: skip
    else:
        axes[0].text(0.5, 0.5, "no record yet", ha="center", transform=axes[0].transAxes)
    return figure


def _places(rows: int, height: float) -> dict[str, float]:
    """Where panels are, of sizes in inches: matplotlib's own layouts draw everything twice."""
    left, right, top, bottom, across, down = 0.5, 0.15, 0.62, 1.0, 0.65, 0.7
    across *= _COLUMNS / (_WIDTH - left - right - (_COLUMNS - 1) * across)
    down *= rows / (height - top - bottom - (rows - 1) * down)
    return {
        "left": left / _WIDTH, "right": 1 - right / _WIDTH, "wspace": across,
        "top": 1 - top / height, "bottom": bottom / height, "hspace": down,
    }  # fmt: skip


def _draw(axis: Axes, panel: Panel, runs: Mapping[str, Records]) -> None:
    from matplotlib.ticker import MaxNLocator

    drawn: list[float] = []
    for index, (run, records) in enumerate(runs.items()):
        points = panel.points(records)
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        drawn += values
        colour, dashes = f"C{index % 10}", _DASHES[index % len(_DASHES)]
        if panel.smooth:
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        shown = moving_mean(values, MEAN_OF) if panel.smooth else values
        few = not panel.smooth and len(points) <= 60
        axis.plot(
            steps, shown, color=colour, label=run, linestyle=dashes, marker="o" if few else "",
            markersize=3,
        )  # fmt: skip
    low, high = panel.limits(drawn)
    room = 0.0 if panel.share and high == 1 and low == 0 else 0.04 * (high - low)
    axis.set_ylim(low - (room if low < 0 else 0), high + room)
    held_out = "held-out " if panel.name.startswith("eval_") else ""
    # Both at a place that is told: to look for one takes a third of the drawing.
    axis.set_title(held_out + panel.title, fontsize=9, y=1.0)
    axis.set_xlabel("step", fontsize=8)
    axis.xaxis.set_label_coords(0.5, _STEP_LABEL)
    axis.yaxis.set_label_coords(0.0, 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    axis.locator_params(axis="y", nbins=5)
    axis.ticklabel_format(axis="y", scilimits=(-2, 4))  # so that no label is wide
    axis.grid(alpha=0.3)
