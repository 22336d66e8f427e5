"""What all pages share: the look reads well in light and dark, data never becomes markup."""

from __future__ import annotations

import json
import re
from importlib.resources import files

import pytest

from xtoken.report.page import percent, render_page
from xtoken.report.run_page import Run, run_page

from html_reading import page_data, read_page

STYLE = files("xtoken.report").joinpath("templates", "style.css").read_text(encoding="utf-8")
SURFACES = ("page", "surface", "raised")
CHUNKS = ("exact-a", "exact-b", "differs", "only", "special")
LINES = ("one", "two", "three", "four", "five", "six")


def colours(scheme: str) -> dict[str, str]:
    """The variables of a scheme; the dark ones replace the light ones."""
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[:2]
    found = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{3,6});", light))
    if scheme == "dark":
        found |= dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{3,6});", dark))
    return found


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    digits = colour[1:]
    if len(digits) == 3:
        digits = "".join(2 * digit for digit in digits)
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_ratio_is_that_of_wcag() -> None:
    assert contrast("#fff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa_on_all_that_it_stands_on(scheme: str) -> None:
    found = colours(scheme)
    for surface in SURFACES:
        for text in ("ink", "soft", "link"):
            assert contrast(found[text], found[surface]) >= 4.5, (scheme, text, surface)
    for chunk in CHUNKS:
        assert contrast(found["ink"], found[chunk]) >= 4.5, (scheme, chunk)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lines_and_edges_have_the_contrast_of_graphics(scheme: str) -> None:
    found = colours(scheme)
    for name in (*LINES, "focus", *(f"{chunk}-line" for chunk in CHUNKS)):
        assert contrast(found[name], found["surface"]) >= 3, (scheme, name)
    for bar in ("one", "two", "three"):
        assert contrast(found[bar], found["track"]) >= 3, (scheme, bar)


def test_runs_are_told_apart_without_colour() -> None:
    dashes = re.findall(r"\.run-\d \{ stroke: [^;]+;(?: stroke-dasharray: ([^;]+);)? \}", STYLE)
    assert len(dashes) == len(set(dashes)) == 8


@pytest.mark.parametrize(
    "text", ["</script><script>1</script>", "<!--", "]]>", "\u2028\u2029", "&lt;", "{{ 1 }}", "\\"]
)
def test_no_text_ends_the_data_or_begins_anything_in_it(text: str) -> None:
    page = run_page([Run(text, [{"step": 1, "ce": 2.0}])])
    root = read_page(page)
    assert page_data(root)["runs"] == [text]
    assert len(root.all("script")) == 2
    assert root.all("h1")[0].text == text


def test_a_page_is_the_same_each_time() -> None:
    runs = [Run("a", [{"step": 1, "ce": 2.0}, {"step": 2, "ce": 1.0}])]
    assert run_page(runs) == run_page(runs)


def test_the_data_are_plain_json() -> None:
    page = run_page([Run("a", [{"step": 1, "ce": 2.0}])])
    assert json.dumps(page_data(read_page(page)))
    with pytest.raises(ValueError, match="JSON"):
        render_page("run", {"value": float("nan")})


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 1000, "0 %"),
        (1000, 1000, "100 %"),
        (9999, 10_000, "99.9 %"),
        (1, 5000, "< 0.1 %"),
        (0, 0, "0 %"),
    ],
)
def test_none_and_all_are_said_of_none_and_all_alone(part: int, whole: int, text: str) -> None:
    assert percent(part, whole) == text
