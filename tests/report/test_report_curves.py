"""The picture of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from xtoken.report.curves import curves_figure, draw_curves
from xtoken.report.panels import moving_mean


def records(steps: int) -> list[dict[str, float]]:
    trained = [{"step": s, "ce": 5.0 / s, "learning_rate": 1e-3} for s in range(1, steps + 1)]
    return [*trained, {"step": steps, "eval_bits_per_byte": 2.0, "eval_numeral_mass": float("nan")}]


def test_runs_of_different_length_and_content_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    draw_curves({"p-kl": [{"step": 1, "kd": 2.0}, *records(9)], "ce": records(3)}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_run_without_records_is_drawn_empty(tmp_path: Path) -> None:
    draw_curves({"ce": []}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 runs, expected at least 1"):
        draw_curves({}, tmp_path / "curves.png")


def test_steps_are_whole_and_of_one_range_on_all_panels() -> None:
    for steps in (1, 2, 5, 320):
        figure = curves_figure({"a": records(steps)})
        drawn = [axis for axis in figure.axes if axis.axison]
        assert drawn
        figure.canvas.draw()
        for axis in drawn:
            low, high = axis.get_xlim()
            shown = [tick for tick in axis.get_xticks() if low <= tick <= high]
            assert shown
            assert all(tick == int(tick) for tick in shown), (steps, shown)
        assert len({axis.get_xlim() for axis in drawn}) == 1


def test_an_axis_begins_at_zero_and_a_share_has_all_of_it() -> None:
    made = [{"step": s, "ce": 4.0 + s, "teacher_mass": 0.9, "kd": -0.5 + s} for s in (0, 1, 2)]
    axes = {axis.get_title(): axis for axis in curves_figure({"a": made}).axes if axis.axison}
    assert axes["cross-entropy (nats per token)"].get_ylim()[0] == 0
    assert axes["teacher's mass kept"].get_ylim() == (0, 1)
    assert axes["distillation loss (nats per chunk)"].get_ylim()[0] < -0.5


def test_each_run_has_a_line_in_the_legend_told_apart_without_colour() -> None:
    names = ["p-kl", "ce", "gold"]
    figure = curves_figure({name: records(9) for name in names})
    assert figure.get_suptitle() == "p-kl, ce, gold: up to step 9"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    assert len({str(line.get_linestyle()) for line in legend.get_lines()}) == 3
    assert "mean of the last 15 records" in legend.get_title().get_text()


def test_the_strong_line_is_the_mean_that_the_legend_names() -> None:
    made = records(40)
    (axis,) = [a for a in curves_figure({"a": made}).axes if a.get_title().startswith("cross")]
    values = [record["ce"] for record in made if "ce" in record]
    faint, strong = axis.get_lines()
    assert list(faint.get_ydata()) == values
    assert list(strong.get_ydata()) == moving_mean(values, 15)
    assert moving_mean(values, 15)[-1] == pytest.approx(sum(values[-15:]) / 15)


def test_panels_that_nobody_logged_are_left_out() -> None:
    titles = [a.get_title() for a in curves_figure({"a": records(3)}).axes if a.axison]
    assert titles == ["held-out bits per byte", "cross-entropy (nats per token)", "learning rate"]
