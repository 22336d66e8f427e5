"""An alignment in a terminal: two rows, readable without colour and at any width."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import pytest
import tokenizer_zoo as zoo
from rich.cells import cell_len
from rich.console import Console

from xtoken import ChunkKind, Pair
from xtoken.cli.align_view import alignment_view
from xtoken.vocab.display import visible_token

TEXT = (
    "In 1969 机器学习的模型 cafe\u0301 👍🏽 e \u0301x\n"
    "antidisestablishmentarianism <|end_of_text|> 0123456789\n\tعربي\n"
)


@pytest.fixture(name="pair", scope="module")
def _pair() -> Pair:
    return Pair(zoo.byte_level_bpe(), zoo.sentencepiece_bpe(), cache_dir=False)


def view(pair: Pair, text: str, width: int, *, colour: bool = False) -> list[str]:
    ids = [side.encode([text])[0] for side in pair.sides]
    file = io.StringIO()
    system = "standard" if colour else None
    console = Console(file=file, width=width, color_system=system, force_terminal=colour)  # type: ignore[arg-type]
    console.print(alignment_view(pair.align(*ids), *pair.sides, *ids, 10_000))
    return file.getvalue().splitlines()


def row(lines: list[str], name: str) -> str:
    """What stands in the lines of one side, without gaps and signs of continuation."""
    shown = [line.removeprefix(f"{name}  ") for line in lines if line.startswith(f"{name}  ")]
    return "".join(shown).replace(" ", "").replace("…", "")


@pytest.mark.parametrize("width", [17, 20, 33, 80, 200])
def test_no_token_is_lost_at_any_width(pair: Pair, width: int) -> None:
    lines = view(pair, TEXT, width)
    for side in pair.sides:
        shown = re.sub(r"\[\d+\]|[│≠=∅◌]", "", row(lines, side.name))
        # A chunk that is whole is shown by its text, other tokens by their own signs.
        whole = row(view(pair, TEXT, 10_000), side.name)
        assert shown == re.sub(r"\[\d+\]|[│≠=∅◌]", "", whole)
        assert len(shown) > 40
    assert all(
        cell_len(line) <= max(width, 17) for line in lines if re.match("student|teacher", line)
    )


def test_the_two_rows_of_a_line_stand_under_each_other(pair: Pair) -> None:
    lines = view(pair, TEXT, 60)
    for upper, lower in pairwise(lines):
        if upper.startswith("student  "):
            assert lower.startswith("teacher  ")
            assert cell_len(upper) == cell_len(lower)


def test_kinds_are_told_by_signs_without_colour(pair: Pair) -> None:
    plain = view(pair, "a <|end_of_text|>", 100)
    assert not any("\x1b" in line for line in plain)
    assert any("∅" in line for line in plain)
    legend = " ".join(plain)
    assert "exact exact" not in legend
    assert "≠ bytes differ" in legend
    coloured = " ".join(view(pair, "a <|end_of_text|>", 100, colour=True))
    assert "\x1b[" in coloured
    assert "exact" in re.sub(r"\x1b\[[0-9;]*m", "", coloured)


def test_special_tokens_of_one_role_have_a_sign_of_their_own() -> None:
    one, other = zoo.byte_level_bpe(), zoo.byte_level_bpe(2000, 1)
    pair = Pair(one, other, cache_dir=False)
    ids = [vocab.roles["bos"] for vocab in (pair.student_vocab, pair.teacher_vocab)]
    alignment = pair.align([ids[0]], [ids[1]])
    assert alignment.kind.tolist() == [ChunkKind.SPECIAL]
    file = io.StringIO()
    shown = alignment_view(alignment, *pair.sides, [ids[0]], [ids[1]], 10)
    Console(file=file, width=80, color_system=None).print(shown)
    assert "teacher  =<|begin_of_text|>" in file.getvalue()


@pytest.fixture(name="byte_level", scope="module")
def _byte_level() -> Pair:
    return Pair(zoo.byte_level_bpe(), zoo.deepseek(), cache_dir=False)


def test_a_character_is_whole_where_its_chunk_is_whole(byte_level: Pair) -> None:
    lines = view(byte_level, "x 机 y", 80)
    assert "机[" in row(lines, "student") or "机" in row(lines, "student")
    assert "机" in row(lines, "teacher")
    assert "\\x" not in row(lines, "student")


def test_a_mark_alone_has_a_base_and_does_not_sit_on_a_separator(byte_level: Pair) -> None:
    joined = "".join(view(byte_level, "e \u0301x", 80))
    marks = [at for at, character in enumerate(joined) if character == "\u0301"]
    assert marks
    assert all(joined[at - 1] in "◌e" or joined[at - 1].isalpha() for at in marks)


def test_a_narrow_terminal_has_the_coverage_in_sentences(pair: Pair) -> None:
    ids = [side.encode([TEXT])[0] for side in pair.sides]
    coverage = pair.align(*ids).coverage
    narrow = " ".join(" ".join(view(pair, TEXT, 30)).split())
    assert f"student: {coverage.student_bytes:,} bytes" in narrow
    assert f"{coverage.student_byte_share:.3%} of them in exact chunks" in narrow
    assert f"{coverage.chunks:,} chunks, {coverage.exact_chunks:,} exact" in narrow
    assert "┃" not in narrow
    assert any("┃" in line for line in view(pair, TEXT, 100))


def test_the_tokens_of_a_wide_terminal_are_those_of_the_text(pair: Pair) -> None:
    text = "in 201 days"
    ids = pair.student.encode([text])[0]
    shown = row(view(pair, text, 200), "student").replace("∅", "")
    assert shown.replace("│", "") == "".join(visible_token(pair.student_vocab, i) for i in ids)
