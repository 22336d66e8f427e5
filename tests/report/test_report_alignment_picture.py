"""An alignment as an SVG: every token is there, and what a screen reader says."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import tokenizer_zoo as zoo

from xtoken import Pair
from xtoken.report.alignment_picture import alignment_svg
from xtoken.vocab.display import visible_token

SVG = "{http://www.w3.org/2000/svg}"
TEXT = "In 1969 a <b>computer</b> flew 384,400 km & back: 机器学习."


def test_every_token_is_drawn_once_and_the_description_counts_them() -> None:
    pair = Pair(zoo.byte_level_bpe(), zoo.deepseek(), cache_dir=False)
    root = ElementTree.fromstring(alignment_svg(pair, TEXT))
    drawn = [node.text for node in root.iter(f"{SVG}text") if node.get("class") != "label"]
    sides = [
        [visible_token(side.vocab, token) for token in side.encode([TEXT])[0]]
        for side in pair.sides
    ]
    assert sorted(drawn) == sorted([*sides[0], *sides[1]])  # type: ignore[type-var]
    chunks = len(pair.align(TEXT))
    description = next(root.iter(f"{SVG}desc")).text or ""
    assert description.startswith(f"{len(sides[0])} student tokens")
    assert f"in {chunks} chunks" in description
    assert len(list(root.iter(f"{SVG}path"))) == chunks
    assert "prefers-color-scheme:dark" in (next(root.iter(f"{SVG}style")).text or "")


def test_long_texts_break_into_lines_of_the_picture() -> None:
    pair = Pair(zoo.byte_level_bpe(), zoo.byte_level_bpe(digits=1), cache_dir=False)
    heights = [
        float((ElementTree.fromstring(alignment_svg(pair, text)).get("viewBox") or "").split()[3])
        for text in (TEXT, TEXT * 3)
    ]
    assert heights[1] > 2 * heights[0]
