"""The page of an alignment: all of the text is on it, and its numbers are the library's."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizer_zoo as zoo
import torch

from xtoken import ChunkKind, Pair
from xtoken.data.conversations import Conversation
from xtoken.data.examples import Example
from xtoken.errors import NonFiniteError, OptionError, PairError
from xtoken.losses import LOSSES
from xtoken.report.aligned_text import TOKENS_PER_CHUNK, AlignedText, aligned_text, first_chunks
from xtoken.report.alignment_page import alignment_page
from xtoken.report.page import PageNames
from xtoken.teachers.load_model import load_causal_lm
from xtoken.vocab.display import visible, visible_token

from html_reading import Node, page_data, read_page

NAMES = PageNames("the student", "the teacher", "a text")
HOSTILE = (
    "In 1969 a <b>computer</b> & 384,400 km: 机器学习 👍🏽 café\n"
    "</script><script>alert(1)</script><!-- {{ 7 * 7 }} {% raw %} \u2028 ]]> ' \" `${x}` &lt;\n"
    "اللغة العربية\r\n\ta\u0301\x00\x07"
)


@pytest.fixture(name="pair", scope="module")
def _pair() -> Pair:
    return Pair(zoo.byte_level_bpe(), zoo.deepseek(), cache_dir=False)


@pytest.fixture(name="models", scope="module")
def _models(folder: Path) -> tuple[Pair, torch.nn.Module, torch.nn.Module]:
    pair = Pair(folder / "student", folder / "teacher", cache_dir=False)
    student = load_causal_lm(folder / "student", side="student")
    return pair, student, load_causal_lm(folder / "teacher", side="teacher")


def chunk_buttons(root: Node) -> list[Node]:
    return root.all("button", "chunk")


def shown_tokens(root: Node, side: int) -> list[str]:
    """The tokens of all chunks on the upper (0) or lower (1) side."""
    rows = [button.all("span", "side")[side] for button in chunk_buttons(root)]
    return [token.text for row in rows for token in row.all("bdi", "token")]


@pytest.mark.parametrize("text", [HOSTILE, "", "a", "<|end_of_text|>", " \n\n\t "])
def test_every_token_of_any_text_is_on_the_page_once_a_side(pair: Pair, text: str) -> None:
    root = read_page(alignment_page(aligned_text(pair, text, limit=1000), NAMES))
    data = page_data(root)
    for at, side in enumerate(pair.sides):
        ids = side.encode([text])[0]
        assert shown_tokens(root, at) == [visible_token(side.vocab, token) for token in ids]
        listed = data["tokens"][side.name]
        assert [token[1] for token in listed] == ids
        assert [bytes.fromhex(token[2]) for token in listed] == [
            side.vocab.token_bytes(token) for token in ids
        ]
    alignment = pair.align(text)
    assert [chunk["kind"] for chunk in data["chunks"]] == [
        ChunkKind(kind).name for kind in alignment.kind.tolist()
    ]
    assert [chunk["student"][1] for chunk in data["chunks"]] == alignment.student_bounds[
        1:
    ].tolist()
    table = root.all("details")[0].all("table")[0]
    assert len(table.all("tr")) == len(alignment) + 1


def test_what_a_name_or_a_text_holds_is_never_markup(pair: Pair) -> None:
    names = PageNames("</title><script>1</script>", "a & b", "</h1>")
    root = read_page(alignment_page(aligned_text(pair, HOSTILE, limit=1000), names))
    assert len(root.all("script")) == 2
    assert "</title><script>1</script>" in root.all("title")[0].text
    assert "49" not in root.all("ol")[0].text.split()


def test_a_cut_character_is_whole_where_the_other_side_has_it_whole(pair: Pair) -> None:
    text = "x 机 y"
    root = read_page(alignment_page(aligned_text(pair, text, limit=100), NAMES))
    data = page_data(root)
    cut = [chunk for chunk in data["chunks"] if chunk["shape"].startswith("3:")]
    assert cut, "the student spells 机 by its bytes"
    # The teacher has it whole, so nothing more has to be said.
    assert "机" in shown_tokens(root, 1)


def in_whole_characters(text: AlignedText) -> AlignedText:
    """The same text with no chunk that cuts a character."""
    from xtoken import Aligner

    aligner = Aligner(text.pair.student_vocab, text.pair.teacher_vocab, whole_characters=True)
    example = text.example
    alignment = aligner.align(example.student_ids, example.teacher_ids)
    return replace(text, example=replace(example, alignment=alignment))


def test_a_chunk_of_bytes_on_both_sides_shows_its_text() -> None:
    pair = Pair(zoo.byte_level_bpe(), zoo.byte_level_bpe(2000, 1), cache_dir=False)
    root = read_page(
        alignment_page(in_whole_characters(aligned_text(pair, "x 机 y", limit=100)), NAMES)
    )
    wholes = [chunk["whole"] for chunk in page_data(root)["chunks"] if chunk["whole"]]
    assert len(wholes) == 1
    assert wholes[0].endswith(visible("机".encode()))
    ribbons = [ribbon.text for ribbon in root.all("bdi", "ribbon") if ribbon.text]
    assert ribbons == wholes


def test_each_kind_is_told_without_colour() -> None:
    pair = Pair(zoo.byte_level_bpe(), zoo.sentencepiece_bpe(), cache_dir=False)
    text = "a <|end_of_text|> b \u00e9 </s>"
    root = read_page(alignment_page(aligned_text(pair, text, limit=100), NAMES))
    legend = root.all("ul", "legend")[0].text
    for button, chunk in zip(chunk_buttons(root), page_data(root)["chunks"], strict=True):
        sides = [side.text for side in button.all("span", "side")]
        if chunk["kind"] in ("STUDENT_ONLY", "TEACHER_ONLY"):
            assert "∅" in sides
            assert "∅" in legend
        if chunk["kind"] == "MISMATCH":
            assert button.all("bdi", "ribbon")[0].text.startswith("≠")
            assert "≠" in legend
        assert chunk["meaning"] in (button.attributes["aria-label"] or "")
    kinds = {chunk["kind"] for chunk in page_data(root)["chunks"]}
    assert kinds & {"STUDENT_ONLY", "TEACHER_ONLY"}


def test_a_long_text_is_cut_and_the_page_says_so(pair: Pair) -> None:
    text = zoo.TEXT[0][:3000]
    whole = pair.align(text)
    page = alignment_page(aligned_text(pair, text, limit=40), NAMES)
    root = read_page(page)
    assert f"The first 40 of {len(whole):,} chunks are shown" in root.text
    assert len(page_data(root)["chunks"]) == 40
    # What corresponds is told of all of it.
    assert f"{whole.coverage.student_tokens:,}" in root.all("table")[0].text
    with pytest.raises(OptionError, match="limit = 0 is out of range"):
        aligned_text(pair, text, limit=0)


def test_a_chunk_too_long_for_a_page_ends_it_and_the_page_says_so() -> None:
    pair = Pair(zoo.byte_level_bpe(), zoo.byte_level_bpe(2000, 1), cache_dir=False)
    same, one, other = zoo.TEXT[0][:200], zoo.TEXT[1][:40_000], "机器学习" * 4000
    ids = [
        side.encode([same + text])[0] for side, text in zip(pair.sides, (one, other), strict=True)
    ]
    alignment = pair.align(*ids)
    longest = max(
        int(np.diff(b).max()) for b in (alignment.student_bounds, alignment.teacher_bounds)
    )
    assert longest > 2000
    example = Example.whole(*ids, alignment)
    shown = first_chunks(example, 200)
    assert 0 < len(shown.alignment) < len(alignment)
    for mine, whole in (
        (shown.student_ids, example.student_ids), (shown.teacher_ids, example.teacher_ids)
    ):  # fmt: skip
        assert len(mine) <= 200 * TOKENS_PER_CHUNK
        assert mine.tolist() == whole[: len(mine)].tolist()
    text = AlignedText(pair, shown, alignment.coverage, len(alignment), (1, 1), next_tokens=longest)
    assert f"the next one holds {longest:,} tokens" in read_page(alignment_page(text, NAMES)).text


def test_without_models_the_page_has_the_row_the_prefixes_and_the_cell() -> None:
    reverse = Pair(zoo.byte_level_bpe(), zoo.byte_level_bpe(2000, 1), cache_dir=False)
    text = aligned_text(reverse, "in 201", limit=10)
    chunks = page_data(read_page(alignment_page(text, NAMES)))["chunks"]
    (chunk,) = [chunk for chunk in chunks if chunk["shape"] == "1:3"]
    p_kl, prefix, exact = chunk["losses"]
    row = p_kl["comparisons"][0]["lines"]
    expected = reverse.explain("201").entries
    assert [line["weight"] for line in row] == pytest.approx([e.weight for e in expected], abs=1e-6)
    assert [line.get("own", False) for line in row] == [True, False, False]
    trie = reverse.tries.student
    pieces = trie.pieces(reverse.explain("201").student_id).tolist()
    titles = [comparison["title"] for comparison in prefix["comparisons"]]
    assert titles[:2] == ["after 2", "after 2 0"]
    for depth, comparison in enumerate(prefix["comparisons"], 1):
        node = trie.find(pieces[:depth])
        assert node is not None
        lines = [*comparison["lines"], *([comparison["rest"]] if "rest" in comparison else [])]
        assert sum(line["tokens"] for line in lines) == len(trie.below(node))
        assert sum(line.get("own", False) for line in lines) == 1
    cell = exact["comparisons"][0]
    members = [*cell["lines"], *([cell["rest"]] if "rest" in cell else [])]
    assert sum(line["tokens"] for line in members) == 111  # 2, 20 to 29, 200 to 299
    assert any(line["label"] == "201" and line.get("own") for line in members)


def lines_of(table: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of a comparison with that of the rest."""
    return [*table["lines"], *([table["rest"]] if "rest" in table else [])]


def counted(chunks: list[dict[str, object]]) -> list[dict[str, object]]:
    return [chunk for chunk in chunks if chunk["counted"]]


TEXT = "In 196 a computer of 4,096 words flew 384 km.\nBread and 201 in 1969."


def test_the_losses_of_all_chunks_are_the_losses_of_the_library(
    models: tuple[Pair, torch.nn.Module, torch.nn.Module],
) -> None:
    pair, student, teacher = models
    text = aligned_text(pair, TEXT, limit=1000)
    page = alignment_page(text, NAMES, student=student, teacher=teacher)
    chunks = counted(page_data(read_page(page))["chunks"])
    for at, name in enumerate(("p-kl", "prefix-kl", "exact-kl")):
        distiller = pair.distiller(name)
        batch = distiller.collate([TEXT])
        with torch.no_grad():
            output = distiller(
                student(**batch.student).logits, teacher(**batch.teacher).logits, batch
            )
        views = [chunk["losses"][at] for chunk in chunks]  # type: ignore[index]
        assert {view["loss"] for view in views} == {name}
        assert len(views) == len(batch.chunks)
        mean = float(np.mean([view["value"] for view in views]))
        assert mean == pytest.approx(float(output.loss), abs=2e-5)


def test_what_a_loss_compares_adds_up_to_one(
    models: tuple[Pair, torch.nn.Module, torch.nn.Module],
) -> None:
    pair, student, teacher = models
    text = aligned_text(pair, TEXT, limit=1000)
    page = alignment_page(text, NAMES, student=student, teacher=teacher)
    chunks = counted(page_data(read_page(page))["chunks"])
    views = [view for chunk in chunks for view in chunk["losses"]]  # type: ignore[attr-defined]
    seen = set()
    for view in views:
        tables = [lines_of(table) for table in view["comparisons"] if table["lines"]]
        if view["loss"] in ("gold", "h-kl"):  # two parts of one softmax
            tables = [[line for table in tables for line in table]]
        elif view["loss"] == "alm":
            tables = tables[1:]  # the toss
        elif view["loss"] == "escd":
            tables = tables[:1]  # the root
        for lines in tables:
            seen.add(view["loss"])
            for side in ("teacher", "student"):
                assert sum(line[side] for line in lines) == pytest.approx(1.0, abs=1e-4)
    assert seen == set(LOSSES) - {"same-vocab-kl"}


def test_exact_kl_has_a_target_for_each_student_token_that_it_names(
    models: tuple[Pair, torch.nn.Module, torch.nn.Module],
) -> None:
    pair, student, teacher = models
    text = aligned_text(pair, TEXT, limit=1000)
    data = page_data(read_page(alignment_page(text, NAMES, student=student, teacher=teacher)))
    several = bounded = deeper = 0
    for chunk in counted(data["chunks"]):
        tables = chunk["losses"][2]["comparisons"]  # type: ignore[index]
        tokens = data["tokens"]["student"][slice(*chunk["student"])]  # type: ignore[misc]
        titles = [f"student tokens at {token[0]}" for token in tokens]
        deep = [" that share" in table["title"] for table in tables]
        deeper += sum(deep)
        # At the token before: what parts from the text behind its first teacher tokens.
        for before, table in itertools.pairwise(tables):
            if " that share" in table["title"]:
                assert table["title"].split(" that share")[0] == before["title"].split(" that")[0]
                assert any(line["label"] == "go on as the text does" for line in lines_of(before))
        tables = [table for table, is_deep in zip(tables, deep, strict=True) if not is_deep]
        named = [table["title"].split("; all other")[0] for table in tables]
        assert named == titles[: len(named)]
        assert named
        several += len(named) > 1
        bounded += sum("; all other tokens: at most" in table["title"] for table in tables)
        for token, table in zip(tokens, tables, strict=False):
            own = [line for line in table["lines"] if line.get("own")]
            own = [line for line in own if line["label"] != "go on as the text does"]
            assert all(token[0] in line["label"].split(" ") for line in own)
    assert several
    assert bounded  # inside teacher tokens
    assert deeper


def test_the_columns_of_p_kl_are_the_two_distributions_by_their_definition(
    models: tuple[Pair, torch.nn.Module, torch.nn.Module],
) -> None:
    pair, student, teacher = models
    text = aligned_text(pair, TEXT, limit=1000)
    data = page_data(read_page(alignment_page(text, NAMES, student=student, teacher=teacher)))
    projection = pair.projection
    dense = np.zeros(projection.shape)
    for row in range(len(dense)):
        indices, weights = projection.csr.row(row)
        dense[row, indices] = weights
    reached = dense.sum(0) > 0
    with torch.no_grad():
        sides = [
            model(torch.from_numpy(ids)[None]).logits[0].double().softmax(-1).numpy()
            for model, ids in (
                (student, text.example.student_ids), (teacher, text.example.teacher_ids)
            )
        ]  # fmt: skip
    for chunk in counted(data["chunks"]):
        place = [chunk[side][0] - 1 for side in ("student", "teacher")]  # type: ignore[index]
        p = sides[0][place[0], : len(dense)] @ dense
        q = np.where(reached, sides[1][place[1], : dense.shape[1]], 0.0)
        p, q = p / p.sum(), q / q.sum()
        lines = chunk["losses"][0]["comparisons"][0]["lines"]  # type: ignore[index]
        named = {visible_token(pair.teacher_vocab, t): t for t in np.flatnonzero(reached).tolist()}
        for line in lines:
            column = named[line["label"]]
            assert line["teacher"] == pytest.approx(q[column], abs=1e-5)
            assert line["student"] == pytest.approx(p[column], abs=1e-5)
        own = [named[line["label"]] for line in lines if line.get("own")]
        column = int(text.example.teacher_ids[place[1] + 1])
        assert own == ([column] if reached[column] else [])
        lost = f"{visible_token(pair.teacher_vocab, column)}, is reached by no row of W"
        assert (lost in chunk["losses"][0].get("note", "")) == (not reached[column])  # type: ignore[index]


def test_the_probabilities_of_tokens_are_the_models(
    models: tuple[Pair, torch.nn.Module, torch.nn.Module],
) -> None:
    pair, student, teacher = models
    text = aligned_text(pair, TEXT, limit=1000)
    data = page_data(read_page(alignment_page(text, NAMES, student=student, teacher=teacher)))
    for name, model, ids in (
        ("student", student, text.example.student_ids),
        ("teacher", teacher, text.example.teacher_ids),
    ):
        with torch.no_grad():
            rows = model(torch.from_numpy(ids)[None]).logits[0].softmax(-1)
        expected = rows[:-1].gather(1, torch.from_numpy(ids[1:])[:, None])[:, 0].tolist()
        found = [token[3] for token in data["tokens"][name]]
        assert found[0] is None
        assert found[1:] == pytest.approx(expected, rel=1e-3)


def test_a_teacher_alone_gives_targets_and_no_values(
    models: tuple[Pair, torch.nn.Module, torch.nn.Module],
) -> None:
    pair, _, teacher = models
    text = aligned_text(pair, TEXT, limit=1000)
    data = page_data(read_page(alignment_page(text, NAMES, teacher=teacher)))
    assert data["models"] == ["teacher"]
    views = [view for chunk in counted(data["chunks"]) for view in chunk["losses"]]
    assert views
    for view in views:
        assert "value" not in view
        for comparison in view["comparisons"]:
            assert all("student" not in line for line in comparison["lines"])


def test_the_chunks_that_count_are_those_of_the_loss(
    models: tuple[Pair, torch.nn.Module, torch.nn.Module],
) -> None:
    pair, _, _ = models
    text = aligned_text(pair, TEXT, limit=1000)
    batch = pair.distiller("p-kl").collate([TEXT])
    flags = [chunk.counted for chunk in text.chunks()]
    assert sum(map(bool, flags)) == len(batch.chunks)
    starts = [chunk.student[0] for chunk in text.chunks() if chunk.counted]
    assert starts == batch.chunks.student_start.tolist()
    assert all(chunk.reason for chunk in text.chunks() if not chunk.counted)


def test_more_tokens_than_a_model_has_positions_are_refused_in_one_line(
    models: tuple[Pair, torch.nn.Module, torch.nn.Module],
) -> None:
    pair, student, _ = models
    text = aligned_text(pair, TEXT * 40, limit=5000)
    with pytest.raises(OptionError, match="has 512 positions"):
        alignment_page(text, NAMES, student=student)


def test_the_model_of_another_tokenizer_is_refused_in_one_line(
    models: tuple[Pair, torch.nn.Module, torch.nn.Module],
) -> None:
    pair, _, teacher = models
    text = aligned_text(pair, TEXT, limit=1000)
    with pytest.raises(PairError, match="the student's tokenizer has 1700 tokens, its model 800"):
        alignment_page(text, NAMES, student=teacher)


def test_a_model_that_predicts_nan_is_refused_in_one_line(
    models: tuple[Pair, torch.nn.Module, torch.nn.Module],
) -> None:
    pair, student, _ = models
    damaged = copy.deepcopy(student)
    with torch.no_grad():
        damaged.get_input_embeddings().weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="student's model predicts NaN"):
        alignment_page(aligned_text(pair, TEXT, limit=1000), NAMES, student=damaged)


def test_a_conversation_counts_what_the_assistant_says() -> None:
    from chat_families import family

    tokenizers = [family(name).tokenizer for name in ("qwen3", "llama3")]
    pair = Pair(*tokenizers, cache_dir=False)
    messages = [
        {"role": "user", "content": "How many km?"},
        {"role": "assistant", "content": "It is 384,400 km."},
    ]
    text = aligned_text(pair, Conversation.from_messages(messages), limit=200)
    root = read_page(alignment_page(text, NAMES))
    chunks = page_data(root)["chunks"]
    tokens = page_data(root)["tokens"]["student"]
    said = "".join(
        token[0]
        for chunk in chunks
        if chunk["counted"]
        for token in tokens[slice(*chunk["student"])]
    )
    assert "384,400·km." in said
    assert "many" not in said
    assert any(chunk["reason"].startswith("it is not learned") for chunk in chunks)
