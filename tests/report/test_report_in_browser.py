"""The pages' scripts in a real browser: what it makes of the data, of the mouse and of keys."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizer_zoo as zoo
from headless_browser import CHROMIUM, FLAGS, Browser

from xtoken import Pair
from xtoken.losses import LOSSES
from xtoken.report.aligned_text import aligned_text
from xtoken.report.alignment_page import alignment_page
from xtoken.report.page import PageNames
from xtoken.report.pair_page import pair_page
from xtoken.report.run_page import Run, run_page
from xtoken.teachers.load_model import load_causal_lm
from xtoken.vocab.display import quoted

from html_reading import Node, read_tree

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

NAMES = PageNames("one", "</script>other", "a text")


@pytest.fixture(name="pair", scope="module")
def _pair() -> Pair:
    return Pair(zoo.byte_level_bpe(), zoo.byte_level_bpe(2000, 1), cache_dir=False)


def rendered(page: str, folder: Path) -> Node:
    """The page as the browser has it once its script has run."""
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, *FLAGS, "--dump-dom",
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


@pytest.fixture(name="browser", scope="module")
def _browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(name="with_models", scope="module")
def _with_models(folder: Path) -> str:
    """An alignment with all losses of it."""
    pair = Pair(folder / "student", folder / "teacher", cache_dir=False)
    text = aligned_text(pair, "In 196 a computer of 4,096 words.", limit=100)
    student = load_causal_lm(folder / "student", side="student")
    teacher = load_causal_lm(folder / "teacher", side="teacher")
    return alignment_page(text, NAMES, student=student, teacher=teacher)


HEAD = "document.querySelector('#detail h2').firstChild.textContent"
PRESSED = (
    "[...document.querySelectorAll('button.chunk[aria-pressed=true]')].map(b => +b.dataset.chunk)"
)
FIRST_CODES = "[...document.querySelectorAll('#detail > table code')].map(c => c.textContent)"


def test_the_mouse_and_the_keys_choose_the_chunk_that_is_told(pair: Pair, browser: Browser) -> None:
    text = aligned_text(pair, "in 201 days", limit=100)
    chunks, tokens = text.chunks(), text.tokens()

    def told(at: int) -> None:
        chunk = chunks[at]
        browser.until(f"{HEAD} === 'Chunk {at + 1} ({chunk.shape})'")
        own = [*tokens[0][slice(*chunk.student)], *tokens[1][slice(*chunk.teacher)]]
        assert browser.value(FIRST_CODES) == [token.label for token in own]

    browser.show(alignment_page(text, NAMES))
    first = next(chunk.index for chunk in chunks if chunk.shape == "1:3")
    told(first)
    for at in (0, len(chunks) - 1, 1):  # as the mouse goes
        browser.point_at("button.chunk", at)
        told(at)
    assert browser.value(PRESSED) == []
    browser.click("button.chunk", first)
    told(first)
    assert browser.value(PRESSED) == [first]
    browser.point_at("button.chunk", 0)  # one that is kept stays
    told(first)
    browser.press("ArrowRight")
    told(first + 1)
    assert browser.value(PRESSED) == [first + 1]
    assert browser.value("+document.activeElement.dataset.chunk") == first + 1
    browser.press("ArrowLeft")
    told(first)
    browser.press("Escape")
    assert browser.value(PRESSED) == []
    browser.point_at("button.chunk", 1)
    told(1)
    assert browser.errors == []


def test_a_loss_that_is_opened_stays_open_from_chunk_to_chunk(
    with_models: str, browser: Browser
) -> None:
    browser.show(with_models)
    losses = "[...document.querySelectorAll('#detail .loss')]"
    opened = (
        f"{losses}.filter(d => d.open).map(d => d.querySelector('h3').textContent.split(':')[0])"
    )
    assert browser.value(f"{losses}.length") == len(LOSSES)
    assert browser.value(opened) == ["P\u2011KL"]
    browser.click("button.chunk", 3)
    browser.value(f"{losses}.find(d => d.textContent.startsWith('GOLD')).id = 'gold'")
    browser.click("#gold summary")
    browser.until(f"{opened}.length === 2")
    browser.click("button.chunk", 5)
    browser.until(f"{HEAD}.startsWith('Chunk 6 ')")
    assert browser.value(opened) == ["P\u2011KL", "GOLD"]
    shown = "document.querySelectorAll('#detail .loss[open] table').length"
    assert browser.value(shown) == 3
    assert browser.errors == []


def test_what_is_typed_into_the_search_of_a_pair_is_told(pair: Pair, browser: Browser) -> None:
    browser.show(pair_page(pair.audit(), pair.projection, NAMES, rows=5000))
    browser.click("#search")
    browser.write("201")
    token = pair.explain("201").student_id
    name = json.dumps(quoted(pair.student_vocab, token))
    browser.until(f"document.querySelector('#story h2 code').textContent === {name}")
    assert browser.value("document.querySelector('#rows td').textContent") == str(token)
    rows = "[...document.querySelectorAll('#rows tr')].map(r => r.textContent)"
    assert 0 < len(browser.value(rows)) < 50
    second = "document.querySelectorAll('#story tbody:first-of-type td:nth-child(2)')"
    weights = f"[...{second}].map(c => c.textContent).slice(0, 3)"
    assert browser.value(weights) == [f"{e.weight:.4f}" for e in pair.explain("201").entries]
    browser.write("zzz")
    browser.until("document.querySelector('#story').textContent.startsWith('No row')")
    assert browser.value(rows) == []
    assert browser.errors == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["alignment", "pair", "run"])
def test_no_page_is_wider_than_a_phone(
    name: str, dark: bool, pair: Pair, with_models: str, browser: Browser
) -> None:
    if name == "alignment":
        page = with_models
    elif name == "pair":
        page = pair_page(pair.audit(), pair.projection, NAMES, rows=2000)
    else:
        page = run_page([Run("a", [{"step": s, "ce": 5.0 / s} for s in (1, 2, 3)])])
    browser.show(page, width=400, height=800, dark=dark)
    if name == "alignment":
        browser.click("button.chunk", 3)
        browser.value("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    elif name == "pair":
        browser.click("#rows button", 0)
    widths = "[document.documentElement, ...document.querySelectorAll('#detail, #story')]"
    for scrolled, seen in browser.value(f"{widths}.map(n => [n.scrollWidth, n.clientWidth])"):
        assert scrolled <= seen <= 400
    assert browser.value("innerWidth") == 400
    page_colour = browser.value("getComputedStyle(document.body).backgroundColor")
    lightness = [int(x) for x in page_colour.removeprefix("rgb(").rstrip(")").split(",")]
    assert (max(lightness) < 60) == dark
    assert browser.errors == []
