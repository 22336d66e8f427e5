"""Rows that are for some teachers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_texts, write_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtoken.data.stream import DocumentStream
from xtoken.distillation import DistillCollator
from xtoken.errors import DataError, OptionError
from xtoken.pair import Pair
from xtoken.teachers import LiveTeacher, StoreKey, TopKStore
from xtoken.training import DistillArguments, DistillTrainer, Teacher
from xtoken.training.stream import TrainingStream


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("routing")
    write_pair(path)
    return path


def student(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "student").train()


def trainer(folder: Path, teachers: list[Any], rows: list[Any], **changed: Any) -> DistillTrainer:
    given: dict[str, Any] = {
        "max_steps": 2, "max_tokens": 60, "report_to": [], "use_cpu": True, "logging_steps": 1,
        "per_device_train_batch_size": 4, "disable_tqdm": True, "save_strategy": "no",
        "kd_weight": 1.0, "loss": "p-kl", "top_k": 32,
    }  # fmt: skip
    arguments = DistillArguments(str(folder / "out"), **(given | changed))
    return DistillTrainer(student(folder), arguments, teachers=teachers, train_dataset=rows)


def teacher(folder: Path, name: str, **options: Any) -> Teacher:
    """`word` shares the student's tokenizer, `digit` spells numerals digit by digit."""
    place = folder / {"word": "student", "digit": "teacher"}[name]
    return Teacher(str(place), name=name, **options)


def gradient(made: DistillTrainer, rows: list[Any]) -> torch.Tensor:
    model = made.model
    model.zero_grad()
    made.compute_loss(model, made._prepare_inputs(made.data_collator(rows))).backward()
    return torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])


def test_a_row_is_learned_from_the_teachers_that_it_names(folder: Path) -> None:
    """The gradient is that of each teacher on its own rows, by hand."""
    texts = tiny_texts(4)
    names = ["word", "digit", None, ["digit", "word"]]
    rows = [{"text": text, "for": name} for text, name in zip(texts, names, strict=True)]
    both = trainer(
        folder, [teacher(folder, "word"), teacher(folder, "digit", weight=0.5)], rows,
        teacher_column="for", ce_weight=0.0,
    )  # fmt: skip
    found = gradient(both, rows)
    expected = torch.zeros_like(found)
    for name, weight, own in (("word", 1.0, (0, 2, 3)), ("digit", 0.5, (1, 2, 3))):
        mine = [{"text": texts[at]} for at in own]
        one = trainer(folder, [teacher(folder, name)], mine, ce_weight=0.0)
        expected += weight * gradient(one, mine)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_store_is_not_asked_for_rows_of_another_teacher(folder: Path, tmp_path: Path) -> None:
    texts = tiny_texts(6)
    live = LiveTeacher.from_pretrained(folder / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    pair = Pair(AutoTokenizer.from_pretrained(folder / "student"), tokenizer)
    own = pair.examples(texts[:3], max_tokens=60)
    store = TopKStore(
        tmp_path, StoreKey(live.fingerprint, 32, "float32", pair.teacher_vocab.fingerprint)
    )
    store.fill(live, [example.teacher_ids for example in own.examples])
    rows = [{"text": text, "for": "stored" if at < 3 else "word"} for at, text in enumerate(texts)]
    made = trainer(
        folder, [teacher(folder, "word"), Teacher(store, tokenizer, name="stored")], rows,
        teacher_column="for", per_device_train_batch_size=1, max_steps=6,
    )  # fmt: skip
    made.train()
    assert len([log for log in made.state.log_history if "kd" in log]) == 6
    coverage = [log["coverage"] for log in made.state.log_history if "coverage" in log]
    assert min(coverage) > 0.9  # a row of another teacher is not uncovered


def test_names_that_no_teacher_has_are_told(folder: Path) -> None:
    teachers = [teacher(folder, "word"), teacher(folder, "digit")]
    with pytest.raises(DataError, match="'for' names 'nobody', expected one of word, digit"):
        trainer(folder, teachers, [{"text": "one two", "for": "nobody"}], teacher_column="for")
    with pytest.raises(OptionError, match=r"named digit, digit, and column 'for' cannot tell"):
        trainer(folder, [teachers[1]] * 2, ["a text"], teacher_column="for")


@pytest.mark.parametrize("kind", ["list", "dataset", "stream", "generator", "documents", "texts"])
def test_a_column_that_no_row_has_is_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    """Absent is not null, or each row would be learned from every teacher."""
    rows = [{"text": text, "for": "word"} for text in tiny_texts(4)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data: Any = {
        "list": rows,
        "dataset": Dataset.from_list(rows),
        "stream": Dataset.from_list(rows).to_iterable_dataset(),
        "generator": Dataset.from_list(rows).to_iterable_dataset().map(dict),
        "documents": TrainingStream(DocumentStream(file, teacher_column="fro")),
        "texts": [row["text"] for row in rows],
    }[kind]
    teachers = [teacher(folder, "word"), teacher(folder, "digit")]
    with pytest.raises(OptionError, match="teacher_column = 'fro', but no row has a column of"):
        trainer(folder, teachers, data, teacher_column="fro").train()


def test_rows_without_the_column_are_for_all_where_another_has_it(folder: Path) -> None:
    texts = tiny_texts(3)
    rows = [{"text": texts[0]}, {"text": texts[1], "for": "word"}, {"text": texts[2], "for": None}]
    teachers = [teacher(folder, "word"), teacher(folder, "digit")]
    made = trainer(folder, teachers, rows, teacher_column="for").train_dataset
    asked = [[bool(each.teacher_loss_mask.any()) for each in row["examples"]] for row in made]
    assert asked == [[True, True], [True, False], [True, True]]


def test_rows_to_evaluate_on_need_no_column(folder: Path) -> None:
    made = trainer(
        folder, [teacher(folder, "word"), teacher(folder, "digit")],
        [{"text": text, "for": "word"} for text in tiny_texts(4)], teacher_column="for",
    )  # fmt: skip
    assert made.evaluate(tiny_texts(2))["eval_bits_per_byte"] > 0


def test_examples_of_one_teacher_have_no_column(folder: Path) -> None:
    texts = tiny_texts(2)
    pair = Pair(folder / "student", folder / "teacher")
    with pytest.raises(OptionError, match="teacher_column = 'for' is not read of examples"):
        trainer(folder, [teacher(folder, "digit")], pair.examples(texts), teacher_column="for")  # type: ignore[arg-type]


def test_a_teacher_with_the_students_tokenizer_is_not_tokenized_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xtoken.data import encode

    counted: list[int] = []
    encode_texts = encode.encode_texts

    def count(tokenizer: Any, texts: Any, **options: Any) -> Any:
        counted.append(len(texts))
        return encode_texts(tokenizer, texts, **options)

    monkeypatch.setattr(encode, "encode_texts", count)
    texts = tiny_texts(4)
    pair = Pair(*(AutoTokenizer.from_pretrained(folder / "student") for _ in range(2)))
    found = pair.examples(texts, max_tokens=60)
    assert sum(counted) == 4
    for example in found.examples:
        assert example.student_ids.tolist() == example.teacher_ids.tolist()
    other = Pair(*(AutoTokenizer.from_pretrained(folder / n) for n in ("student", "teacher")))
    other.examples(texts, max_tokens=60)
    assert sum(counted) == 12


def test_a_collator_of_one_teacher_is_refused_beside_several(folder: Path) -> None:
    arguments = DistillArguments(str(folder / "out"), report_to=[], use_cpu=True, loss="p-kl")
    with pytest.raises(OptionError, match="DistillCollator, which pads for one teacher, and there"):
        DistillTrainer(
            student(folder), arguments, data_collator=DistillCollator(),
            teachers=[teacher(folder, "word"), teacher(folder, "digit")],
            train_dataset=tiny_texts(2),
        )  # fmt: skip
