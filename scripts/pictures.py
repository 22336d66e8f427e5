"""Draw the pictures of the README and the documentation: `python scripts/pictures.py`."""

from __future__ import annotations

from pathlib import Path

from xtoken._files import write_text
from xtoken.pair import Pair
from xtoken.report.alignment_picture import alignment_svg

SENTENCE = "In 1969 a computer with 4,096 words of memory flew 384,400 km."


def main() -> None:
    """Needs the models that `make demo` leaves."""
    pair = Pair("runs/demo/student", "runs/demo/teacher")
    write_text(Path("docs/alignment.svg"), alignment_svg(pair, SENTENCE))


if __name__ == "__main__":
    main()
