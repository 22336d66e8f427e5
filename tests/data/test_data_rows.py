"""Rows of any dataset: what each is, and where it is read from."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from xtoken.data import Completion, Conversation, LeftOut, document_of, load_rows, read_documents
from xtoken.errors import DataError, MissingFileError

TALK = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
SHARED = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"name": "add", "arguments": {"a": 2, "b": 2}}
ROWS: list[dict[str, Any]] = [
    {"text": "plain text"},
    {"messages": TALK},
    {"prompt": "2 + 2 = ", "completion": "4"},
    {"conversations": SHARED},
]
DOCUMENTS = [
    "plain text",
    Conversation.from_messages(TALK),
    Completion("2 + 2 = ", "4"),
    Conversation.from_messages(TALK),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(("row", "expected"), list(zip(ROWS, DOCUMENTS, strict=True)))
def test_a_row_is_what_its_columns_say(row: dict[str, Any], expected: object) -> None:
    assert document_of(row, source="row 0") == expected
    nulls = dict.fromkeys(("text", "messages", "prompt", "completion", "conversations", "tools"))
    assert document_of(nulls | row | {"id": 7}, source="row 0") == expected


def test_the_conversations_of_sharegpt_are_those_of_openai() -> None:
    shared = [
        {"from": "human", "value": "2 + 2?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "It is 4."},
    ]
    row = {"conversations": shared, "system": "Add.", "tools": json.dumps([TOOL])}
    found = document_of(row, source="row 0")
    assert isinstance(found, Conversation)
    assert found.tools == [TOOL]
    assert [each["role"] for each in found.messages] == [
        "system", "user", "assistant", "tool", "assistant"
    ]  # fmt: skip
    assert found.messages[2]["tool_calls"] == [{"type": "function", "function": CALL}]


def test_calls_and_tools_may_be_json_as_arrow_has_no_type_for_them() -> None:
    calls = [{"type": "function", "function": CALL}]
    answer = {"role": "assistant", "content": None}
    plain = {"messages": [TALK[0], answer | {"tool_calls": calls}], "tools": [TOOL]}
    packed = {
        "messages": [TALK[0], answer | {"tool_calls": json.dumps(calls)}],
        "tools": json.dumps([TOOL]),
    }
    assert document_of(packed, source="row 0") == document_of(plain, source="row 0")
    assert document_of({"messages": TALK, "tools": ""}, source="a") == DOCUMENTS[1]


def test_of_a_prompt_of_messages_no_earlier_answer_is_learned() -> None:
    row = {"prompt": [*TALK, {"role": "user", "content": "And 3?"}], "completion": TALK[1:]}
    found = document_of(row, source="row 0")
    assert isinstance(found, Conversation)
    assert found.answers_learned == [False, True]
    assert "weight" not in TALK[1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": " "}, "row 3: completion = ' ', expected what follows"),
        ({"prompt": "a", "completion": TALK}, "prompt is a str and completion a list"),
        ({"prompt": "a\ud800", "completion": "b"}, "row 3: field 'prompt' holds half a character"),
        ({"conversations": [{"from": "bot", "value": "a"}]}, r"messages\[0\].from = 'bot', expe"),
        (
            {"conversations": [SHARED[0], {"from": "function_call", "value": "add(2)"}]},
            r"messages\[1\].value = 'add\(2\)', expected the JSON of a function call",
        ),
        ({"question": "a", "answer": "b"}, "give 'prompt' and .*: it has 'question', 'answer'"),
        ({}, "it has nothing"),
    ],
)
def test_a_row_of_another_form_is_named_with_the_remedy(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        document_of(row, source="row 3")


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    texts = ["one", "two\nlines", 'with "quotes", and é']
    table = datasets.Dataset.from_dict({"text": texts, "number": [1, 2, 3]})
    table.to_parquet(tmp_path / "data.parquet")
    table.to_csv(tmp_path / "data.csv")
    table.to_csv(tmp_path / "data.tsv", sep="\t")
    table.to_json(tmp_path / "data.jsonl", force_ascii=False)
    (tmp_path / "data.json").write_text(json.dumps([{"text": text} for text in texts]))
    with gzip.open(tmp_path / "data.jsonl.gz", "wb") as packed:
        packed.write((tmp_path / "data.jsonl").read_bytes())
    table.save_to_disk(tmp_path / "saved")
    folder = tmp_path / "folder"
    folder.mkdir()
    table.select([0]).to_parquet(folder / "train-0.parquet")
    table.select([1, 2]).to_parquet(folder / "train-1.parquet")
    table.select([0]).to_parquet(folder / "test-0.parquet")
    names = ["parquet", "csv", "tsv", "jsonl", "json", "jsonl.gz"]
    places = [*(tmp_path / f"data.{name}" for name in names), tmp_path / "saved", folder]
    for place in places:
        assert read_documents(place) == texts, place
        for streaming in (False, True):
            rows = load_rows(place, streaming=streaming)
            assert [row["text"] for row in rows] == texts, place
    assert read_documents(folder, split="test") == texts[:1]
    both = [tmp_path / "data.parquet", tmp_path / "data.csv"]
    assert read_documents(both) == texts * 2
    assert [row["text"] for row in load_rows([tmp_path / "data.csv"] * 2)] == texts * 2


def test_the_ending_alone_says_what_parts_the_fields_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "corpus.2024.tsv").write_text("text\nhello, world\nsecond, line\n")
    assert read_documents(tmp_path / "corpus.2024.tsv") == ["hello, world", "second, line"]
    with gzip.open(tmp_path / "a.b.tsv.gz", "wt") as packed:
        packed.write("text\tid\none, two\t1\n")
    assert read_documents(tmp_path / "a.b.tsv.gz") == ["one, two"]
    (tmp_path / "data.csv").write_text('text,id\n"three, four",2\n')
    rows = load_rows([tmp_path / "corpus.2024.tsv", tmp_path / "data.csv"])
    assert list(rows["text"]) == ["hello, world", "second, line", "three, four"]
    assert list(rows["id"]) == [None, None, "2"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "content",
    ["text\nhello, world\n", "text,source\nfine,wiki\nHello there,wiki,\n"],
    ids=["comma", "trailing"],
)
def test_a_table_whose_rows_have_more_fields_than_its_header_is_refused(
    tmp_path: Path, streaming: bool, content: str
) -> None:
    """pandas takes the first of them for the names of rows, without a word."""
    (tmp_path / "data.csv").write_text(content)
    with pytest.raises(DataError, match=r"csv:\d has more fields than its header.*in quotes"):
        list(load_rows(tmp_path / "data.csv", streaming=streaming))
    with pytest.raises(DataError, match="more fields than its header"):
        read_documents(tmp_path / "data.csv")


def test_a_table_says_none_where_a_text_is_none(tmp_path: Path) -> None:
    answers = ["None", "NA", "null", "nan", "007"]
    lines = ["prompt,completion", *(f"Is it?,{answer}" for answer in answers), "Is it?,"]
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in (tmp_path / "data.csv", folder / "part.csv"):
        file.write_text("\n".join(lines) + "\n")
    for place in (tmp_path / "data.csv", folder):
        found = read_documents(place, strict=False)
        assert [each.completion for each in found if isinstance(each, Completion)] == answers
        file = place / "part.csv" if place.is_dir() else place
        assert [each.source for each in found.left_out] == [f"{file}: row 5"]


def test_conversations_with_tools_survive_parquet(tmp_path: Path) -> None:
    calls = [{"type": "function", "function": CALL}]
    rows = [
        {"messages": TALK, "tools": None},
        {"messages": [TALK[0], {"role": "assistant", "tool_calls": calls}], "tools": [TOOL]},
    ]
    expected = [document_of(row, source="row") for row in rows]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    assert read_documents(tmp_path / "data.parquet") == expected


def test_rows_that_cannot_be_used_are_named_by_file_and_row(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one"}\n{"text": \n{"body": "two"}\n{"text": " "}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:2 is not JSON"):
        read_documents(path)
    found = read_documents(path, strict=False)
    assert found == ["one"]
    assert [each.source for each in found.left_out] == [f"{path}:{line}" for line in (2, 3, 4)]
    assert found.left_out[0].reason.startswith("is not JSON")
    table = datasets.Dataset.from_dict({"text": ["one", "", "two", None]})
    table.to_parquet(tmp_path / "data.parquet")
    found = read_documents(tmp_path / "data.parquet", strict=False)
    assert found == ["one", "two"]
    assert found.left_out[0] == LeftOut(f"{tmp_path / 'data.parquet'}: row 1", "its text is blank")
    assert found.left_out[1].source.endswith(": row 3")
    path.write_text('{"body": "two"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl holds no text \(.*:1: has no string in fiel"):
        read_documents(path, strict=False)


def test_a_source_that_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    broken = tmp_path / "data.parquet"
    broken.write_bytes(b"not parquet")
    for source, message in (
        (broken, "cannot be read"),
        ("owner/name", "owner/name cannot be read as a dataset with split 'train'"),
    ):
        with pytest.raises(DataError, match=message) as raised:
            read_documents(source)
        assert "\n" not in str(raised.value)
    with pytest.raises(MissingFileError, match="data file nowhere/at/all does not exist"):
        read_documents("nowhere/at/all")
    with pytest.raises(DataError, match="0 data files"):
        read_documents([])
    (tmp_path / "data.csv").write_text("text\na\n")
    with pytest.raises(DataError, match="2 files of kinds"):
        load_rows([broken, tmp_path / "data.csv"])
    with pytest.raises(DataError, match=r"with split 'trian'"):
        read_documents(tmp_path / "data.csv", split="trian")


def test_a_folder_is_read_by_any_name_and_an_empty_one_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "bare").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    for name in (".", "./", "../data", str(tmp_path / "data")):
        assert read_documents(name) == ["one", "two"], name
        assert [row["text"] for row in load_rows(name)] == ["one", "two"], name
    with pytest.raises(DataError, match=r"^\.\./bare cannot .* \.txt files of one kind in it"):
        read_documents("../bare")


def test_lists_of_messages_may_be_json_as_csv_has_them(tmp_path: Path) -> None:
    expected = document_of({"messages": TALK}, source="row")
    columns = ["messages", "conversations"]
    for column, talk in zip(columns, (TALK, SHARED), strict=True):
        assert document_of({column: json.dumps(talk)}, source="row") == expected
        datasets.Dataset.from_list([{column: json.dumps(talk)}]).to_csv(tmp_path / "data.csv")
        assert read_documents(tmp_path / "data.csv") == [expected]
        for text in ("user: 2 + 2?", "[", '"a text"'):
            with pytest.raises(DataError, match=f"row: {column} = .*, expected a list of messages"):
                document_of({column: text}, source="row")
    for prompt, completion in ((TALK[:1], TALK[1:]), (SHARED[:1], SHARED[1:])):
        packed = {"prompt": json.dumps(prompt), "completion": json.dumps(completion)}
        plain = {"prompt": prompt, "completion": completion}
        assert document_of(packed, source="row") == document_of(plain, source="row")
    for text in ("[1, 2]", "[]", "{}", '[{"name": "add"}]'):
        row = {"prompt": text, "completion": text}
        assert document_of(row, source="row") == Completion(text, text, "row")
    with pytest.raises(DataError, match="prompt is a list and completion a str"):
        document_of({"prompt": json.dumps(TALK), "completion": "4"}, source="row")
