"""The page of a pair: its bars are its numbers, its rows are W's, its advice is the library's."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

import pytest
import tokenizer_zoo as zoo

from xtoken import Pair, Projection
from xtoken.audit.audit import DEFAULT_LOSS, Audit, audit
from xtoken.errors import OptionError
from xtoken.report.page import PageNames, percent
from xtoken.report.pair_page import LOSSES, pair_page
from xtoken.targets import TargetBuilder
from xtoken.trie import PieceTrie
from xtoken.vocab.display import quoted

from html_reading import Node, bar_shares, number, page_data, read_page

NAMES = PageNames("</script><b>student", "b & c", "<i>notes.txt")


@pytest.fixture(name="packed", scope="module")
def _packed() -> Projection:
    """A student that packs digits under a teacher of single digits."""
    return Projection.build(zoo.byte_level_bpe(), zoo.byte_level_bpe(2000, 1), cache_dir=False)


@pytest.fixture(name="result", scope="module")
def _result(packed: Projection) -> Audit:
    return audit(packed)


@pytest.fixture(name="root", scope="module")
def _root(packed: Projection, result: Audit) -> Node:
    return read_page(pair_page(result, packed, NAMES))


def table(root: Node, title: str) -> list[list[Node]]:
    """The cells of the rows of the table in the section of a title."""
    (section,) = [s for s in root.all("section") if s.all("h2") and s.all("h2")[0].text == title]
    body = section.all("tbody")[0]
    return [[c for c in row.children if isinstance(c, Node)] for row in body.all("tr")]


def test_names_are_text_and_never_markup(root: Node) -> None:
    assert root.all("h1")[0].text == "Student </script><b>student, teacher b & c"
    assert len(root.all("script")) == 2


def test_a_bar_is_as_long_as_the_number_beside_it_says(root: Node, result: Audit) -> None:
    rows = table(root, "Student tokens by class of text")
    classes = {item.name: item for item in result.classes if item.total}
    assert len(rows) == len(classes)
    for name, bar, share, equal, by_w, outside, empty, total in rows:
        item = classes[name.text.removeprefix("▸ ").removesuffix(" (decides)").strip()]
        assert number(total.text) == item.total
        assert number(equal.text) == item.strict
        assert number(equal.text) + number(by_w.text) == item.relaxed
        assert number(outside.text) == item.total - item.relaxed - item.empty
        assert number(empty.text) == item.empty
        assert share.text == percent(item.relaxed, item.total)
        assert sum(bar_shares(bar)) == pytest.approx(item.relaxed / item.total)
    nothing = next(row for row in rows if "three-digit" in row[0].text)
    assert nothing[2].text == "0 %"
    assert sum(bar_shares(nothing[1])) == 0


def test_the_bars_of_prefix_kl_and_of_the_overlap_are_their_numbers(
    root: Node, result: Audit
) -> None:
    classes = {item.name: item for item in result.classes}
    for name, bar, share, tokens, total, _ in table(root, "What prefix KL adds"):
        item = classes[name.text]
        assert (number(tokens.text), number(total.text)) == (item.prefixed, item.total)
        assert share.text == percent(item.prefixed, item.total)
        assert bar_shares(bar) == [pytest.approx(item.prefixed / item.total)]
    rows = table(root, "What the vocabularies share")
    for row, shared in zip(rows, (result.shared_bytes, result.shared_strings), strict=True):
        assert bar_shares(row[1]) == [pytest.approx(shared / result.student_tokens)]
        assert number(row[3].text) == shared
        assert number(row[4].text) == result.student_tokens - shared


def test_a_sample_of_text_has_a_table_of_its_own_where_there_is_one(packed: Projection) -> None:
    pair = Pair(zoo.byte_level_bpe(), zoo.byte_level_bpe(2000, 1), cache_dir=False)
    result = pair.audit("In 196 and 201 it flew.")
    root = read_page(pair_page(result, packed, NAMES))
    rows = table(root, "What prefix KL compares in <i>notes.txt")
    assert len(rows) == len(result.supervision)
    for row, item in zip(rows, result.supervision, strict=True):
        assert bar_shares(row[1]) == [pytest.approx(item.compared / item.chunks)]
        assert [number(cell.text) for cell in row[3:6]] == [
            item.compared, item.chunks, item.mirrored
        ]  # fmt: skip
    without = read_page(pair_page(audit(packed), packed, NAMES))
    assert "compares in" not in without.text


def test_the_recommendation_and_the_default_are_told_apart_where_they_differ(
    packed: Projection, result: Audit, root: Node
) -> None:
    assert result.recommendation == DEFAULT_LOSS
    verdict = root.all("section", "verdict")[0].text
    assert LOSSES[DEFAULT_LOSS] in verdict
    assert "nothing has to be set" in verdict
    same = Projection.build(zoo.byte_level_bpe(), zoo.byte_level_bpe(), cache_dir=False)
    other = audit(same)
    assert other.recommendation == "p-kl"
    shown = read_page(pair_page(other, same, NAMES)).all("section", "verdict")[0].text
    assert "--loss p-kl" in shown
    assert f"is {LOSSES[DEFAULT_LOSS]}, for every pair" in shown
    assert "--loss auto" in shown


def test_every_door_has_the_default_that_the_audit_names() -> None:
    from xtoken.distillation import Distiller
    from xtoken.training import DistillArguments, DistillConfig

    assert inspect.signature(Pair.distiller).parameters["loss"].default == DEFAULT_LOSS
    assert inspect.signature(Distiller).parameters["loss"].default == DEFAULT_LOSS
    assert DistillConfig().loss == DEFAULT_LOSS
    assert inspect.signature(DistillArguments).parameters["loss"].default == DEFAULT_LOSS


def test_auto_is_what_the_page_recommends() -> None:
    for sides in ((4000, 3), (2000, 1)):
        pair = Pair(zoo.byte_level_bpe(), zoo.byte_level_bpe(*sides), cache_dir=False)
        assert pair.distiller("auto").loss_name == pair.audit().recommendation


def test_a_row_has_its_whole_story(packed: Projection, root: Node) -> None:
    data = page_data(root)
    student, teacher = packed.vocabularies()
    rows = {row[0]: row for row in data["rows"]}
    token = student.id_of(b"201")
    assert token is not None
    _, kind, rule, pieces, columns, weights, cell, nodes = rows[token]
    assert data["classes"][kind] == "three-digit numerals"
    assert data["rules"][rule] == "forward"
    explained = packed.explain("201")
    assert [data["teacher"][str(piece)] for piece in pieces] == list(explained.pieces)
    assert columns == [entry.teacher_id for entry in explained.entries]
    assert weights == pytest.approx([entry.weight for entry in explained.entries], abs=1e-6)
    assert data["student"][str(token)] == "'201'"
    roots = TargetBuilder(packed).roots
    assert cell == roots[pieces[0]]
    size, some = data["cells"][str(cell)]
    members = [
        other for other in range(len(student))
        if packed.token_pieces(other) and roots[packed.token_pieces(other)[0]] == cell
    ]  # fmt: skip
    assert size == len(members)
    assert set(some) <= set(members)
    trie = PieceTrie.from_projection(packed)
    assert [data["nodes"][node][0] for node in nodes] == [pieces[:1], pieces[:2]]
    for index in nodes:
        prefix, ways, other_ways, other_tokens = data["nodes"][index]
        node = trie.find(prefix)
        assert node is not None
        assert sum(way[1] for way in ways) + other_tokens == len(trie.below(node))
        slots = trie.slots
        assert len(ways) + other_ways == slots.slot_ptr[node + 1] - slots.slot_ptr[node]
        for piece, _, examples in ways:
            for example in examples:
                spelled = trie.pieces(example).tolist()
                assert spelled[: len(prefix)] == prefix
                assert spelled[len(prefix) :][:1] == ([] if piece < 0 else [piece])
    for name, vocab in (("student", student), ("teacher", teacher)):
        for identity, shown in data[name].items():
            assert shown == quoted(vocab, int(identity))


def test_all_that_a_row_names_has_a_name(root: Node) -> None:
    data = page_data(root)
    for token, _, _, pieces, columns, _, cell, _ in data["rows"]:
        assert str(token) in data["student"]
        assert all(str(each) in data["teacher"] for each in [*pieces, *columns])
        assert cell < 0 or str(cell) in data["cells"]
    for prefix, ways, _, _ in data["nodes"]:
        assert all(str(piece) in data["teacher"] for piece in prefix)
        assert all(piece < 0 or str(piece) in data["teacher"] for piece, _, _ in ways)
        assert all(str(token) in data["student"] for _, _, some in ways for token in some)


def test_a_page_of_few_rows_says_how_many_and_keeps_the_numerals(
    packed: Projection, result: Audit, root: Node
) -> None:
    assert "All " in root.all("section")[-2].text
    few = read_page(pair_page(result, packed, NAMES, rows=1500))
    data = page_data(few)
    assert len(data["rows"]) == 1500
    total = len(page_data(root)["rows"])
    assert f"1,500 of {total:,} rows" in few.text
    shown = {data["student"][str(row[0])] for row in data["rows"]}
    assert {f"'{number}'" for number in range(100, 1000)} <= shown
    with pytest.raises(OptionError, match="rows = 0 is out of range"):
        pair_page(result, packed, NAMES, rows=0)


def test_what_an_audit_knows_beyond_is_shown_as_it_is(packed: Projection, result: Audit) -> None:
    @dataclass(frozen=True)
    class Line:
        shape: str
        dropped: float
        chunks: int

    @dataclass(frozen=True)
    class Further(Audit):
        mass_by_shape: tuple[Line, ...] = ()
        by_kind: dict[str, float] | None = None

    fields = {name: getattr(result, name) for name in result.__dataclass_fields__}
    lines = (Line("1:1", 0.25, 1200), Line("<m>:1", 0.5, 3))
    root = read_page(
        pair_page(Further(**fields, mass_by_shape=lines, by_kind={"left": 0.125}), packed, NAMES)
    )
    rows = table(root, "Mass by shape")
    assert [[cell.text for cell in row] for row in rows] == [
        ["1:1", "0.25", "1,200"], ["<m>:1", "0.5", "3"]
    ]  # fmt: skip
    assert [[cell.text for cell in row] for row in table(root, "By kind")] == [["left", "0.125"]]


def test_a_pair_without_a_model_that_segments_still_has_a_page() -> None:
    projection = Projection.build(zoo.wordpiece(), zoo.byte_level_bpe(), cache_dir=False)
    bare = replace(projection, teacher_pieces=None, teacher_pieces_indptr=None)
    data = page_data(read_page(pair_page(audit(projection), bare, NAMES, rows=500)))
    assert set(data["lacking"]) == {"tries", "cells"}
    assert all(row[6] == -1 and not row[7] for row in data["rows"])
