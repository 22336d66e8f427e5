"""What one process tokenizes of each kind of data: tokenize_once.py FOLDER CACHE; the answer is in
FOLDER/RANK.json, what `datasets` keeps is in CACHE."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from tiny_models import tiny_texts
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer

import xtoken.data.encode
import xtoken.vocab.side
from xtoken.data import TextSplit
from xtoken.training import (
    DistillArguments,
    DistillConfig,
    DistillMixin,
    DistillTrainer,
    Teacher,
    load_models,
    prepare,
)
from xtoken.training.batches import EXAMPLES

TEXTS = 24
encode = xtoken.vocab.side.encode_texts
encoded = 0


def counted(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
    global encoded
    encoded += len(texts)
    return encode(tokenizer, texts, **options)


for module in (xtoken.data.encode, xtoken.vocab.side):
    module.encode_texts = counted  # type: ignore[attr-defined]


class MixedTrainer(DistillMixin, Trainer):
    """A Trainer of others, on rows that are tokenized for the student."""


def main(folder: Path, cache: Path) -> None:
    datasets.config.HF_DATASETS_CACHE = cache
    texts = tiny_texts(TEXTS)
    texts[3] = " "  # is left out
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    one = [str(folder / "teacher")]
    two = [Teacher(one[0], name="a"), Teacher(one[0], name="b")]
    kept = datasets.load_dataset("json", data_files=str(folder / "data.jsonl"), split="train")
    named = [{"text": text, "for": "ab"[at % 2]} for at, text in enumerate(texts)]
    ids = kept.map(lambda row: {"input_ids": tokenizer(row["text"])["input_ids"]})

    def rows(data: Any, teachers: list[Any], **settings: Any) -> Iterator[Any]:
        args = DistillArguments(
            str(folder / "out"), use_cpu=True, report_to="none", max_tokens=64, loss="p-kl",
            **settings,
        )  # fmt: skip
        made = DistillTrainer(student, args, teachers=teachers, train_dataset=data).train_dataset
        for at in range(len(made)):
            for each in made[at][EXAMPLES]:
                yield from (each.student_ids, each.teacher_ids, each.alignment.student_bounds)

    def beside() -> Iterator[Any]:
        args = DistillArguments(
            str(folder / "out"), use_cpu=True, report_to="none", loss="p-kl",
            remove_unused_columns=True,
        )  # fmt: skip
        made = MixedTrainer(
            student, args, teachers=one, processing_class=tokenizer, train_dataset=ids,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        ).train_dataset  # fmt: skip
        yield from (made[at]["teacher0_input_ids"] for at in range(len(made)))

    def command() -> Iterator[Any]:
        models = [load_models(folder / "student", folder / "teacher") for _ in range(2)]
        config = DistillConfig(device="cpu", max_tokens=64)
        made = prepare(models, TextSplit(texts[4:], texts[:4], 0), config)
        for each in made.teachers:
            for example in [*each.train.examples, *each.held_out.examples]:
                yield from (example.student_ids, example.teacher_ids)
        yield from (made.train.cut, [one.reason for one in made.held_out.left_out])

    kinds: dict[str, Callable[[], Iterator[Any]]] = {
        "a dataset on disk": lambda: rows(kept, one),
        "a dataset in memory": lambda: rows(datasets.Dataset.from_dict({"text": texts}), one),
        "a list": lambda: rows(texts, one),
        "two teachers": lambda: rows(kept, two),
        "routes": lambda: rows(named, two, teacher_column="for"),
        "rows of another trainer": beside,
        "the command": command,
    }
    found = {}
    for name, make in kinds.items():
        before = encoded
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            content = hashlib.sha256(
                "".join(str(getattr(part, "tolist", lambda: part)()) for part in make()).encode()  # noqa: B023
            )
        told = [str(each.message) for each in caught if "left out" in str(each.message)]
        found[name] = {
            "encoded": encoded - before, "content": content.hexdigest(), "told": told
        }  # fmt: skip
    (folder / f"{os.environ.get('RANK', 'alone')}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
