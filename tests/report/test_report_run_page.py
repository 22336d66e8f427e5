"""The page of runs: every metric that was logged, on axes that hide nothing."""

from __future__ import annotations

import math

import pytest

from xtoken.errors import OptionError
from xtoken.report.panels import MEAN_OF, panels_of
from xtoken.report.run_page import POINTS, Run, run_page

from html_reading import page_data, read_page


def records(steps: int, offset: float = 0.0) -> list[dict[str, float]]:
    made: list[dict[str, float]] = [{"step": 0, "eval_bits_per_byte": 3.5, "eval_tokens": 70}]
    made += [
        {"step": s, "ce": 9 / s + offset, "kd": 1.0 + s, "teacher_mass": 0.9, "coverage": 0.99}
        for s in range(1, steps + 1)
    ]
    return [*made, {"step": steps, "eval_bits_per_byte": 2.5, "eval_numeral_mass": math.nan}]


def charts(page: str) -> dict[str, dict[str, object]]:
    return {chart["title"]: chart for chart in page_data(read_page(page))["charts"]}


def test_each_metric_is_a_chart_with_a_line_of_each_run_at_its_values() -> None:
    runs = [Run("<b>one", records(9), {"loss": "p-kl"}), Run("two", records(4, 1.0))]
    page = run_page(runs)
    root = read_page(page)
    found = charts(page)
    assert set(found) == {
        "bits per byte", "cross-entropy (nats per token)", "distillation loss (nats per chunk)",
        "teacher's mass kept", "student's tokens in exact chunks",
    }  # fmt: skip
    lines = found["cross-entropy (nats per token)"]["lines"]
    for line, run in zip(lines, runs, strict=True):  # type: ignore[call-overload]
        expected = [[r["step"], r["ce"]] for r in run.records if "ce" in r]
        assert line == [[step, pytest.approx(value, rel=1e-5)] for step, value in expected]
    assert page_data(root)["runs"] == ["<b>one", "two"]
    assert root.all("h1")[0].text == "<b>one, two"
    assert "p-kl" in root.all("table")[0].text


def test_an_axis_begins_at_zero_and_a_share_has_all_of_it() -> None:
    found = charts(run_page([Run("a", [*records(9), {"step": 10, "kd": -0.5}])]))
    assert (found["bits per byte"]["low"], found["bits per byte"]["high"]) == (0.0, 3.5)
    assert (found["teacher's mass kept"]["low"], found["teacher's mass kept"]["high"]) == (0.0, 1.0)
    assert found["distillation loss (nats per chunk)"]["low"] == -0.5


def test_the_table_has_the_first_and_the_last_values_of_each_run() -> None:
    root = read_page(run_page([Run("a", records(40)), Run("b", [{"step": 1, "kd": 2.0}])]))
    rows = {row.all("th")[0].text: row for row in root.all("tr") if row.all("td")}
    first, second = (cell.text for cell in rows["bits per byte"].all("td"))
    assert first == "3.5 → 2.5"
    assert second == "not logged"
    early = sum(1.0 + s for s in range(1, MEAN_OF + 1)) / MEAN_OF
    late = sum(1.0 + s for s in range(41 - MEAN_OF, 41)) / MEAN_OF
    title = f"distillation loss (nats per chunk), mean of {MEAN_OF}"
    assert rows[title].all("td")[0].text == f"{early:.4g} → {late:.4g}"


def test_classes_and_teachers_are_told_by_the_names_of_their_metrics() -> None:
    logged = {"step": 1, "kl/Latin letters": 0.5, "teacher1/teacher_mass": 0.75, "new_thing": 3.0}
    found = {panel.name: panel for panel in panels_of([[logged]])}
    assert found["kl/Latin letters"].group == "By class"
    assert found["kl/Latin letters"].title.startswith("Latin letters: KL")
    assert found["teacher1/teacher_mass"].title == "teacher 1: teacher's mass kept"
    assert found["teacher1/teacher_mass"].share
    assert found["new_thing"].group == "Other metrics"


def test_a_long_run_is_averaged_to_what_a_screen_can_show_and_the_page_says_so() -> None:
    page = run_page([Run("a", records(10_000))])
    line = charts(page)["distillation loss (nats per chunk)"]["lines"][0]  # type: ignore[index]
    assert len(line) <= POINTS
    assert line[-1][0] == 10_000
    size = math.ceil(10_000 / POINTS)
    assert line[0] == [size, pytest.approx(sum(1.0 + s for s in range(1, size + 1)) / size)]
    assert "averaged over neighbouring" in read_page(page).text
    assert "averaged over neighbouring" not in read_page(run_page([Run("a", records(9))])).text


def test_nothing_to_show_and_too_much_are_refused() -> None:
    with pytest.raises(OptionError, match="a: no record yet"):
        run_page([Run("a", [{"step": 0, "ce": math.nan}])])
    with pytest.raises(OptionError, match="9 runs, expected 1 to 8"):
        run_page([Run(str(at), records(3)) for at in range(9)])
    with pytest.raises(OptionError, match="0 runs"):
        run_page([])
