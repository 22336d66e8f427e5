"""Tokenized columns: a plain function of columns, kept by datasets, and examples again."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from tiny_models import tiny_texts
from transformers import AutoTokenizer

from xtoken import Pair
from xtoken.data import ColumnExamples, Example, example_from_columns
from xtoken.errors import ArgumentTypeError, DataError, OptionError, PairError, ShapeError

TEXTS = tiny_texts(12)


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    return Pair(folder / "student", folder / "teacher")


def same(one: Example, other: Example) -> None:
    for name in ("student_ids", "teacher_ids", "student_loss_mask", "teacher_loss_mask"):
        assert getattr(one, name).dtype == getattr(other, name).dtype
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert one.alignment == other.alignment
    assert one.alignment.pair == other.alignment.pair


def row(columns: dict[str, Any], index: int) -> dict[str, Any]:
    return {name: values[index] for name, values in columns.items()}


def test_columns_hold_the_examples_of_the_pair(pair: Pair) -> None:
    for max_tokens in (None, 40):
        columns = pair.tokenize({"text": TEXTS, "number": range(12)}, max_tokens=max_tokens)
        assert {len(values) for values in columns.values()} == {len(TEXTS)}
        made = pair.examples(TEXTS, max_tokens=max_tokens)
        assert sum(columns["cut"]) == made.cut
        for index, example in enumerate(made.examples):
            same(example_from_columns(row(columns, index), pair.fingerprints), example)


def test_rows_that_cannot_be_used_are_rows_with_a_reason(pair: Pair) -> None:
    columns = pair.tokenize({"text": [TEXTS[0], " ", None, TEXTS[1], "half \ud800"]})
    assert columns["part"] == [0] * 5
    assert [any(mask) for mask in columns["student_loss_mask"]] == [True, False, False, True, False]
    assert columns["left_out"][0] == columns["left_out"][3] == ""
    assert columns["left_out"][1] == "its text is blank"
    assert columns["left_out"][2].startswith("has no string in field 'text'")
    assert "half a character" in columns["left_out"][4]
    with pytest.raises(DataError, match="was left out: its text is blank; filter such rows"):
        example_from_columns(row(columns, 1))


def test_what_is_no_columns_of_equal_length_is_refused(pair: Pair) -> None:
    for wrong in (None, 5, [], TEXTS):
        with pytest.raises(ArgumentTypeError, match=r"expected columns by name, as datasets\.map"):
            pair.tokenize(wrong)  # type: ignore[arg-type]
    for column in ("one text", 5, None):
        with pytest.raises(ArgumentTypeError, match=r"the column 'text' is a .*; pass batched=T"):
            pair.tokenize({"text": column})  # type: ignore[dict-item]
    with pytest.raises(ShapeError, match="expected equally many"):
        pair.tokenize({"text": TEXTS, "messages": [None]})


def test_datasets_keeps_them_and_gives_them_back(pair: Pair, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["", *TEXTS, " "]})
    rows.save_to_disk(tmp_path / "rows")
    rows = datasets.load_from_disk(tmp_path / "rows")
    options: dict[str, Any] = {"batched": True, "remove_columns": ["text"], "batch_size": 5}
    made = rows.map(pair.tokenize, fn_kwargs={"max_tokens": 60}, num_proc=2, **options)
    files = made.cache_files
    examples = ColumnExamples(made, pair.fingerprints)
    assert len(examples) == len(TEXTS)
    assert [(each.source, each.reason) for each in examples.left_out] == [
        ("row 0", "its text is blank"),
        ("row 13", "its text is blank"),
    ]
    expected = pair.examples(TEXTS, max_tokens=60)
    assert examples.cut == expected.cut
    for mine, other in zip(examples, expected.examples, strict=True):
        same(mine, other)
    # Another process with the same tokenizers finds the files.
    again = pickle.loads(pickle.dumps(pair))
    found = rows.map(again.tokenize, fn_kwargs={"max_tokens": 60}, num_proc=2, **options)
    assert found.cache_files == files
    # Columns have their types where nothing but rows without an example comes first.
    blank = Dataset.from_dict({"text": [" "] * 20 + TEXTS[:1]})
    mapped = blank.map(pair.tokenize, writer_batch_size=5, **options)
    assert len(ColumnExamples(mapped)) == 1
    stream = rows.to_iterable_dataset().map(pair.tokenize, batched=True, remove_columns=["text"])
    assert sum(not each["left_out"] for each in stream) == len(TEXTS)


def test_a_pair_is_recognized_by_its_tokenizers_however_far_it_has_come(folder: Path) -> None:
    for sources in (
        (folder / "student", folder / "teacher"),
        tuple(AutoTokenizer.from_pretrained(folder / name) for name in ("student", "teacher")),
    ):
        pair = Pair(*sources)
        before = Hasher.hash(pair.tokenize)
        pair.tokenize({"text": TEXTS})
        assert pair.projection is not None
        assert Hasher.hash(pair.tokenize) == before
        again = pickle.loads(pickle.dumps(pair))
        assert again.fingerprint == pair.fingerprint
        assert Hasher.hash(again.tokenize) == before
        assert Hasher.hash(pair.with_options(top_k=2).tokenize) != before
    other = AutoTokenizer.from_pretrained(folder / "teacher")
    other.chat_template = "{{ messages[0].content }}"
    assert Hasher.hash(Pair(folder / "student", other).tokenize) != before


def test_a_chat_template_of_ones_own_goes_along_to_other_processes(folder: Path) -> None:
    pair = Pair(folder / "student", folder / "teacher")
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    for tokenizer in (pair.student_tokenizer, pair.teacher_tokenizer):
        tokenizer.chat_template = template
    talk = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
    batch = {"messages": [talk, talk[:1]]}
    columns = pickle.loads(pickle.dumps(pair)).tokenize(batch)
    assert columns["student_ids"][0] == pair.tokenize(batch)["student_ids"][0]
    assert 0 < sum(columns["student_loss_mask"][0]) < len(columns["student_ids"][0])
    assert "none of 1 messages is of role 'assistant'" in columns["left_out"][1]


def test_a_collator_takes_tokenized_rows(pair: Pair) -> None:
    distiller = pair.distiller("p-kl", max_tokens=50)
    columns = pair.tokenize({"text": TEXTS[:4]}, max_tokens=50)
    rows = [row(columns, index) for index in range(4)]
    expected = distiller.collate(TEXTS[:4])
    for batch in (distiller.collator(rows), distiller.collate(rows)):
        assert torch.equal(batch.student_ids, expected.student_ids)
        assert torch.equal(batch.chunks.teacher_end, expected.chunks.teacher_end)
        assert batch.coverage == expected.coverage


def test_rows_of_another_pair_and_damaged_ones_are_refused(pair: Pair, folder: Path) -> None:
    columns = pair.tokenize({"text": TEXTS[:2]})
    other = Pair(folder / "teacher", folder / "student")
    with pytest.raises(PairError, match="a tokenized row is of student"):
        other.distiller("p-kl").collate([row(columns, 0)])
    rows = Dataset.from_dict(columns)
    with pytest.raises(PairError, match="tokenize the rows with this pair's tokenize"):
        ColumnExamples(rows, other.fingerprints)
    cut = row(columns, 0) | {"student_ids": columns["student_ids"][0][:-1]}
    with pytest.raises(ShapeError, match="cut no column alone"):
        example_from_columns(cut)
    with pytest.raises(DataError, match="none of 1 tokenized rows can be used: row 0: its text"):
        ColumnExamples(Dataset.from_dict(pair.tokenize({"text": [" "]})))
    with pytest.raises(OptionError, match="max_tokens = 1"):
        pair.tokenize({"text": TEXTS}, max_tokens=1)
