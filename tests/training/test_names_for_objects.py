"""A path or a name in the place of a model, a tokenizer or rows is refused, never read as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_texts
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtoken.errors import ArgumentTypeError
from xtoken.training import DistillArguments, DistillTrainer


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"train_dataset": "данные.jsonl"},
            r"^train_dataset is the text 'данные\.jsonl'",
        ),
        ({"train_dataset": Path("data.jsonl")}, "read_documents"),
        ({"eval_dataset": "held.jsonl"}, "^eval_dataset is the text"),
        ({"eval_dataset": {"one": "held.jsonl"}}, "^eval_dataset is the text"),
        ({"processing_class": "student"}, r"^processing_class = 'student' is a name; pass AutoTok"),
        ({"model": "student"}, r"^model = 'student' is a name; pass AutoModelForCausalLM\.from"),
    ],
)
def test_names_are_refused(
    folder: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained(folder / "student"),
        "args": DistillArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1),
        "teachers": [str(folder / "teacher")],
        "train_dataset": tiny_texts(2),
        "processing_class": AutoTokenizer.from_pretrained(folder / "student"),
    }
    with pytest.raises(ArgumentTypeError, match=message):
        DistillTrainer(**given | changed)


def test_names_are_refused_where_they_are_scored(folder: Path, tmp_path: Path) -> None:
    trainer = DistillTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "student"),
        DistillArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1),
        teachers=[str(folder / "teacher")],
        train_dataset=tiny_texts(2),
        processing_class=AutoTokenizer.from_pretrained(folder / "student"),
    )
    for given in ("held.jsonl", Path("held.jsonl")):
        with pytest.raises(ArgumentTypeError, match=r"^test_dataset is the text 'held"):
            trainer.predict(given)
    with pytest.raises(ArgumentTypeError, match=r"^eval_dataset is the text 'held"):
        trainer.evaluate(Path("held.jsonl"))
