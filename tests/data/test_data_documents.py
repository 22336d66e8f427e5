"""Texts from files, and the split that keeps the held-out part unseen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from real_texts import TOPICS as BY_NAME

from xtoken.data import Documents, Encoder, LeftOut, read_documents, read_texts
from xtoken.data.documents import cut_passages, keep_apart, split_held_out
from xtoken.data.encode import print_document
from xtoken.errors import DataError

# Two topics have the same text.
TOPICS = list(dict.fromkeys(text for _, text in sorted(BY_NAME.items())))
LONGEST = max(TOPICS, key=len)


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_jsonl_gives_its_texts_in_order_and_leaves_out_empty_ones(tmp_path: Path) -> None:
    texts = [*TOPICS[:5], "  \n", "caf\u00e9 \u4f60\u597d \U0001f600\nsecond line\u2028third"]
    path = write_jsonl(tmp_path / "data.jsonl", texts)
    assert read_texts(path) == [*texts[:5], texts[6]]


def test_a_line_separator_inside_a_json_string_does_not_cut_the_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a\u2028b\x85c"}\n', encoding="utf-8")
    assert read_texts(path) == ["a\u2028b\x85c"]


def test_jsonl_reads_another_field_when_told(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", ["one"], field="body")
    assert read_texts(path, text_field="body") == ["one"]


def test_txt_is_cut_at_blank_lines_and_loses_no_word(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text(LONGEST, encoding="utf-8")
    texts = read_texts(path)
    assert len(texts) > 1
    assert " ".join(texts).split() == LONGEST.split()


@pytest.mark.parametrize("max_chars", [1, 50, 400, 10**6])
def test_passages_keep_every_word_and_exceed_the_limit_only_by_one_line(max_chars: int) -> None:
    for text in TOPICS[:20]:
        passages = cut_passages(text, max_chars)
        assert " ".join(passages).split() == text.split()
        for passage in passages:
            assert len(passage) <= max_chars or "\n" not in passage


def test_the_split_is_disjoint_complete_and_independent_of_order() -> None:
    split = split_held_out([*TOPICS, *TOPICS[:3]], 0.3)
    assert split.dropped == 3
    assert not set(split.train) & set(split.held_out)
    assert sorted([*split.train, *split.held_out]) == sorted(TOPICS)
    again = split_held_out(TOPICS[::-1], 0.3)
    assert set(again.held_out) == set(split.held_out)


def test_more_documents_do_not_move_a_document_to_the_other_side() -> None:
    few, many = split_held_out(TOPICS[:40], 0.3), split_held_out(TOPICS, 0.3)
    assert set(few.held_out) <= set(many.held_out)
    assert set(few.train) <= set(many.train)


def test_a_text_on_both_sides_is_dropped_from_training() -> None:
    split = keep_apart([*TOPICS[:10], TOPICS[0]], TOPICS[8:12])
    assert split.train == TOPICS[:8]
    assert split.held_out == TOPICS[8:12]
    assert split.dropped == 3


def test_bad_files_are_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist; pass a \.jsonl"):
        read_texts(tmp_path / "none.jsonl")
    (tmp_path / "data.docx").write_text("a,b")
    with pytest.raises(DataError, match=r"ends in '\.docx', expected one of \.jsonl, \.json, \.p"):
        read_texts(tmp_path / "data.docx")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(DataError, match=r"broken\.jsonl:2 is not JSON"):
        read_texts(broken)
    with pytest.raises(DataError, match=r":1 has no string in field 'body'"):
        read_texts(write_jsonl(tmp_path / "data.jsonl", ["one"]), text_field="body")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="holds no text"):
        read_texts(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8 at byte 3"):
        read_texts(tmp_path / "latin.txt")


def test_a_split_that_leaves_a_side_empty_is_refused() -> None:
    with pytest.raises(DataError, match="1 distinct documents give"):
        split_held_out(["only one"], 0.5)
    with pytest.raises(ValueError, match=r"fraction = 1\.0, expected between 0 and 1"):
        split_held_out(TOPICS, 1.0)
    with pytest.raises(DataError, match="0 training and 2 held-out"):
        keep_apart(["a", "b"], ["a", "b"])
    with pytest.raises(ValueError, match="max_chars = 0"):
        cut_passages("text", 0)


BAD_LINES = {
    "half a character": ('"\\ud800"', r"field 'text' holds half a character, '\\ud800', at 0; exp"),
    "half in the middle": ('"ab\\ud83d cd"', r"field 'text' holds half a character.*at 2"),
    "5,000 digits": ("9" * 5000, r"is not JSON \(a number of too many digits\); write one object"),
    "deep lists": ("[" * 100_000, r"is not JSON \(lists or objects nested too deeply\)"),
    "deep objects": ('{"a":' * 100_000, r"is not JSON \(lists or objects nested too deeply\)"),
}


@pytest.mark.parametrize("case", BAD_LINES)
@pytest.mark.parametrize("field", ["text", "messages"])
def test_a_line_that_cannot_be_read_is_one_error_with_file_and_line(
    case: str, field: str, tmp_path: Path
) -> None:
    value, message = BAD_LINES[case]
    if field == "messages" and case.startswith("half"):
        value = f'[{{"role": "user", "content": {value}}}, {{"role": "assistant", "content": "a"}}]'
        message = message.replace("field 'text'", r"messages\[0\]\.content")
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{{"{field}": {value}}}\n')
    with pytest.raises(DataError, match=rf"data\.jsonl:2:? {message}") as raised:
        read_documents(path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


def test_half_a_character_is_refused_by_the_encoder_too() -> None:
    with pytest.raises(DataError, match=r"text 'ab.ud800' holds half a character"):
        print_document("ab\ud800", [Encoder(None)])


@pytest.mark.parametrize("name", ["data.jsonl", "data.txt"])
def test_a_file_of_another_encoding_is_named_with_line_and_byte(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes('{"text": "one"}\n{"text": "caf\u00e9"}\n'.encode("latin-1"))
    with pytest.raises(
        DataError, match=rf"{name}:2 is not UTF-8 at byte 29 of the file, 0xe9; conv"
    ):
        read_documents(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    with pytest.raises(DataError, match=rf"{name}:2 is not UTF-8 at byte 32 of the file, 0xe9"):
        read_documents(path)
    path.write_bytes("text".encode("utf-16"))
    with pytest.raises(DataError, match=rf"{name}:1 is not UTF-8 at byte 0 of the file, 0xff"):
        read_documents(path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    lines = tmp_path / "data.jsonl"
    # Two files, each with its mark, joined.
    lines.write_bytes('\ufeff{"text": "one"}\r\n\ufeff{"text": "two"}\n'.encode())
    assert read_documents(lines) == ["one", "two"]
    passages = tmp_path / "data.txt"
    passages.write_bytes("\ufeffone\r\n\r\ntwo".encode())
    assert read_documents(passages) == ["one\n\ntwo"]


def test_blank_texts_are_left_out_and_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", ["one", " ", "two", ""])
    documents = read_documents(path)
    assert isinstance(documents, Documents)
    assert documents == ["one", "two"]
    assert documents.left_out == (
        LeftOut(f"{path}:2", "its text is blank"),
        LeftOut(f"{path}:4", "its text is blank"),
    )
