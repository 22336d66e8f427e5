"""Rows that are for some teachers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_texts, write_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtoken.errors import DataError, OptionError
from xtoken.pair import Pair
from xtoken.teachers import LiveTeacher, StoreKey, TopKStore
from xtoken.training import DistillArguments, DistillTrainer, Teacher


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
