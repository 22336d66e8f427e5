"""A file gives the same rows plain, packed, in a directory and as a stream."""

from __future__ import annotations

import bz2
import gc
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from real_texts import TOPICS

from xtoken.data import Completion, load_rows, read_documents
from xtoken.data.stream import DocumentStream
from xtoken.errors import DataError

PACKERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
LONG = "\ufeff" + "\r\n\r\n".join(
    [*list(TOPICS.values())[:30], "one\r\nline\x0cfeed\u2028on", "two"]
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def places(tmp_path: Path, name: str, content: str) -> list[Path]:
    """The same content as a file, packed, and as the one file of a directory, packed or not."""
    plain = tmp_path / name
    plain.write_text(content, newline="", encoding="utf-8")
    found = [plain]
    for suffix, opener in PACKERS.items():
        found.append(tmp_path / f"{name}{suffix}")
        with opener(found[-1], "wb") as packed:
            packed.write(plain.read_bytes())
    for each in (found[0], found[1]):
        folder = tmp_path / f"folder{each.suffix}"
        folder.mkdir()
        (folder / each.name).write_bytes(each.read_bytes())
        found.append(folder)
    return found


def test_a_text_gives_the_same_passages_wherever_it_lies(tmp_path: Path) -> None:
    first, *others = places(tmp_path, "data.txt", LONG)
    expected = read_documents(first)
    assert 5 < len(expected) < LONG.replace("\r", "").count("\n\n")  # of several paragraphs
    assert expected[-1].endswith("one\nline\x0cfeed\u2028on\n\ntwo")  # type: ignore[union-attr]
    for place in (first, *others):
        assert read_documents(place) == expected, place
        assert [row.document for row in DocumentStream(place)] == expected, place
        for streaming in (False, True):
            rows = load_rows(place, streaming=streaming)
            assert [row["text"] for row in rows] == expected, (place, streaming)


def test_a_passage_ends_where_its_file_ends(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in ("a", "b"):
        (tmp_path / "texts" / f"{name}.txt").write_text(f"{name} 1\n\n{name} 2\n")
    assert read_documents(tmp_path / "texts") == ["a 1\n\na 2\n", "b 1\n\nb 2\n"]


ANSWERS = [f"word {number}" for number in range(10_050)]
ANSWERS += ["000", "007", "3.140", "1e5", "TRUE", "false", "NA", "2024-01-05", "1" * 200_000]


def test_each_field_of_a_table_is_the_text_that_is_written(tmp_path: Path) -> None:
    """pandas makes numbers of a block of them, and of the next one texts."""
    lines = ["prompt,completion", *(f"q,{answer}" for answer in ANSWERS), "q,"]
    expected = [Completion("q", answer) for answer in ANSWERS]
    for place in places(tmp_path, "data.csv", "\n".join(lines) + "\n"):
        found = read_documents(place, strict=False)
        assert list(found) == expected, place
        assert len(found.left_out) == 1
        for streaming in (False, True):
            rows = list(load_rows(place, streaming=streaming))
            assert [row["completion"] for row in rows] == [*ANSWERS, None], (place, streaming)


def test_a_quote_that_is_never_closed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('text,id\n"one, two,1\nthree,2\n')
    with pytest.raises(DataError, match=r"data\.csv:3 is no row of a table \(unexpected end"):
        read_documents(path)
    path.write_text('text,id,,id\n"a ""b"", c",1,2,3\nsaid "d",4\n\n')
    row = {"text": 'a "b", c', "id": "1", "Unnamed: 2": "2", "id.1": "3"}
    rest = dict.fromkeys(row) | {"text": 'said "d"', "id": "4"}
    assert list(load_rows(path)) == [row, rest]


DATES = ["2024-01-05", "2024-02-06 10:00:00", "2024-03-07T00:00:00Z"]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "list.json"])
def test_a_text_that_looks_like_a_date_is_a_text(tmp_path: Path, name: str) -> None:
    calls = [{"id": "1", "arguments": {"when": date}} for date in DATES]
    rows = [
        {"prompt": "When?", "completion": date, "calls": [call], "number": 1}
        for date, call in zip(DATES, calls, strict=True)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    content = json.dumps(rows, indent=1) if name == "list.json" else lines
    for place in places(tmp_path, name, content):
        assert list(read_documents(place)) == [Completion("When?", date) for date in DATES], place
        for streaming in (False, True):
            assert list(load_rows(place, streaming=streaming)) == rows, (place, streaming)


def test_rows_of_other_columns_are_padded_in_a_stream(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "one"}\n{"text": "two", "id": 3}\n')
    rows = list(load_rows(tmp_path / "data.jsonl", streaming=True))
    assert rows == [{"text": "one", "id": None}, {"text": "two", "id": 3}]


def test_splits_of_a_directory_are_sliced_and_rewritten_files_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    for name, count in (("train", 8), ("test", 2)):
        lines = ["text", *(f"{name} {number}" for number in range(count))]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    assert read_documents(folder, split="test") == ["test 0", "test 1"]
    assert list(load_rows(folder, split="train[:25%]")["text"]) == ["train 0", "train 1"]
    both = load_rows(folder, split="train[6:]+test")
    assert list(both["text"]) == ["train 6", "train 7", "test 0", "test 1"]
    for streaming in (False, True):
        with pytest.raises(DataError, match=r"split 'dev' \(expected one of train, test\)"):
            load_rows(folder, split="dev", streaming=streaming)
    (folder / "test.csv").write_text("text\nanother\n")
    assert list(load_rows(folder, split="test")["text"]) == ["another"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    packed = tmp_path / "data.txt.gz"
    packed.write_bytes(gzip.compress(b"one\n\ntwo\n" * 500)[:-12])
    (tmp_path / "latin.csv").write_bytes("text\ncaf\u00e9\n".encode("latin-1"))
    for path, message in (
        (packed, r"data\.txt\.gz cannot be read after line \d+ \("),
        (tmp_path / "latin.csv", r"latin\.csv is not UTF-8 soon after line \d, 0xe9"),
    ):
        with pytest.raises(DataError, match=message):
            read_documents(path)
        with pytest.raises(DataError, match=message):
            load_rows(path)


# What datasets reads as a stream it does not close where it is not read to the end.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_directory_whose_card_says_how_is_read_by_datasets(
    tmp_path: Path, streaming: bool
) -> None:
    card = "configs:\n- config_name: default\n  data_files: part.csv\n  sep: ';'\n"
    for name, text in (("fine", "hello, world"), ("wide", "hello; world")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\n{card}---\n")
        (tmp_path / name / "part.csv").write_text(f"text;id\n{text};1\n")
    assert read_documents(tmp_path / "fine") == ["hello, world"]
    rows = list(load_rows(tmp_path / "fine", streaming=streaming))
    assert rows == [{"text": "hello, world", "id": 1}]
    with pytest.raises(DataError, match="more fields than its header"):
        list(load_rows(tmp_path / "wide", streaming=streaming))
    gc.collect()
