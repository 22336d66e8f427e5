"""The pages' scripts in a real browser: what it makes of the data, and that nothing fails."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import tokenizer_zoo as zoo

from xtoken import Pair
from xtoken.report.aligned_text import aligned_text
from xtoken.report.alignment_page import alignment_page
from xtoken.report.page import PageNames
from xtoken.report.pair_page import pair_page
from xtoken.report.run_page import Run, run_page

from html_reading import Node, read_tree

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no chromium")

NAMES = PageNames("one", "</script>other", "a text")


@pytest.fixture(name="pair", scope="module")
def _pair() -> Pair:
    return Pair(zoo.byte_level_bpe(), zoo.byte_level_bpe(2000, 1), cache_dir=False)


def rendered(page: str, folder: Path) -> Node:
    """The page as the browser has it once its script has run."""
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         f"--user-data-dir={folder / 'profile'}", file.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return read_tree(done.stdout)


def test_an_alignment_opens_on_a_chunk_that_is_cut_differently(pair: Pair, tmp_path: Path) -> None:
    text = aligned_text(pair, "in 201 <b>days</b> </script>", limit=100)
    root = rendered(alignment_page(text, NAMES), tmp_path)
    (detail,) = [node for node in root.all("section") if node.attributes.get("id") == "detail"]
    assert "(1:3)" in detail.all("h2")[0].text
    tokens = [row.all("code")[0].text for row in detail.all("tbody")[0].all("tr")]
    assert tokens == ["201", "2", "0", "1"]
    row = [[cell.text for cell in line.all("td")] for line in detail.all("tbody")[1].all("tr")]
    weights = [f"{entry.weight:.4f}" for entry in pair.explain("201").entries]
    assert [cells[0] for cells in row] == weights
    assert len(detail.all("h3")) == 3
    buttons = root.all("button", "chunk")
    assert [button.attributes.get("tabindex") for button in buttons].count("0") == 1


def test_a_pair_opens_on_its_rows_and_tells_the_first_ones_story(
    pair: Pair, tmp_path: Path
) -> None:
    root = rendered(pair_page(pair.audit(), pair.projection, NAMES, rows=2000), tmp_path)
    (story,) = [node for node in root.all("section") if node.attributes.get("id") == "story"]
    heads = [head.text for head in story.all("h3")]
    assert [head.split(":")[0] for head in heads] == [
        "Pieces", "Weights", "Cell", "Neighbours in the trie"
    ]  # fmt: skip
    (body,) = [node for node in root.all("tbody") if node.attributes.get("id") == "rows"]
    assert len(body.all("tr")) == 200
    assert body.all("tr")[0].all("bdi")[0].text == story.all("h2")[0].all("bdi")[0].text
    assert root.all("h1")[0].text == "Student one, teacher </script>other"


def test_runs_are_drawn_with_whole_steps_and_a_letter_at_each_line(tmp_path: Path) -> None:
    records = [{"step": s, "ce": 5.0 / s, "teacher_mass": 0.9} for s in (1, 2, 3)]
    root = rendered(run_page([Run("a", records), Run("b", records[:2])]), tmp_path)
    charts = root.all("svg")[2:]
    assert len(charts) == 2
    for chart in charts:
        lines = [path for path in chart.all("path") if "raw" not in path.classes]
        assert len(lines) == 2
        letters = [text.text for text in chart.all("text", "name")]
        assert sorted(letters) == ["A", "B"]
        label = chart.attributes["aria-label"] or ""
        assert "A, a: " in label
        assert "B, b: " in label
        ticks = [text.text for text in chart.all("text") if text.attributes.get("y") == "192"]
        assert ticks == ["1", "2", "3"]
