"""The mixin over a plain Trainer: its losses are the same, whatever a collator makes of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from tiny_models import tiny_texts
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from xtoken.errors import DataError, OptionError
from xtoken.training import DistillArguments, DistillMixin, DistillSettings, DistillTrainer


class MixedTrainer(DistillMixin, Trainer):
    """A Trainer of others, on rows that are tokenized for the student."""


class KeepGradient(TrainerCallback):
    def __init__(self) -> None:
        self.gradient: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model: torch.nn.Module, **_) -> None:
        self.gradient = {name: each.grad.clone() for name, each in model.named_parameters()}


def padded(side: str) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        tokenizer.padding_side = side
        return DataCollatorForSeq2Seq(tokenizer)

    return make


COLLATORS: dict[str, Callable[[Any], Any]] = {
    "right": padded("right"),
    "left": padded("left"),
    "flattened": lambda tokenizer: DataCollatorWithFlattening(),
}


def tokenized(tokenizer: Any) -> list[dict[str, list[int]]]:
    rows = [tokenizer(text)["input_ids"][:60] for text in tiny_texts(6)]
    # The first tokens of a row are its prompt.
    return [{"input_ids": row, "labels": [-100] * 5 + row[5:]} for row in rows]


def step(
    folder: Path,
    out: Path,
    collator: str,
    dataset: Callable[[Any], Any] = Dataset.from_list,
    **settings: Any,
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """One step over all rows: what is logged, and the gradient."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    keep = KeepGradient()
    trainer = MixedTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "student"),
        TrainingArguments(
            str(out), max_steps=1, per_device_train_batch_size=6, logging_steps=1,
            max_grad_norm=1e9, report_to="none", use_cpu=True, disable_tqdm=True,
        ),
        teachers=str(folder / "teacher"),
        distill=DistillSettings(**settings),
        train_dataset=dataset(tokenized(tokenizer)),
        processing_class=tokenizer,
        data_collator=COLLATORS[collator](tokenizer),
        callbacks=[keep],
    )  # fmt: skip
    trainer.train()
    return next(each for each in trainer.state.log_history if "loss" in each), keep.gradient


@pytest.mark.parametrize("loss", ["p-kl", "prefix-kl", "gold"])
def test_padding_on_either_side_and_none_give_the_same_losses_and_gradient(
    folder: Path, tmp_path: Path, loss: str
) -> None:
    expected, gradient = step(folder, tmp_path, "right", loss=loss)
    assert expected["chunks"] > 100
    scale = max(float(each.abs().max()) for each in gradient.values())
    for collator in ("left", "flattened"):
        found, other = step(folder, tmp_path, collator, loss=loss)
        for name in ("loss", "ce", "kd", "kd_scale", "chunks", "coverage", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), (collator, name)
        assert other.keys() == gradient.keys()
        for name, value in gradient.items():
            torch.testing.assert_close(
                other[name], value, rtol=1e-3, atol=1e-5 * scale, msg=f"{collator}: {name}"
            )


def streamed(rows: list[Any]) -> Any:
    return IterableDataset.from_generator(lambda: iter(rows))


STREAMS: dict[str, Callable[[list[Any]], Any]] = {
    "generator": streamed,
    "mapped": lambda rows: streamed([{"row": row} for row in rows]).map(
        lambda each: each["row"], remove_columns=["row"]
    ),
    "of a dataset": lambda rows: Dataset.from_list(rows).to_iterable_dataset(),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_that_does_not_know_its_columns_is_distilled_too(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    expected, gradient = step(folder, tmp_path, "flattened", loss="p-kl")
    found, other = step(folder, tmp_path, "flattened", STREAMS[kind], loss="p-kl")
    for name in ("loss", "ce", "kd", "chunks"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    assert all(torch.allclose(other[name], each, atol=1e-5) for name, each in gradient.items())


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> Any:
        return self.rows[at]


def transformed(rows: list[Any]) -> Dataset:
    names = ("input_ids", "labels")
    return Dataset.from_list(rows).with_transform(
        lambda batch: {name: batch[name] for name in names}
    )


def joined(rows: list[Any]) -> Dataset:
    """The first row alone has the teacher's columns."""
    side = {
        "teacher0_input_ids": [[1, 2]],
        "teacher0_student_bounds": [[0, len(rows[0]["input_ids"])]],
        "teacher0_teacher_bounds": [[0, 2]],
        "teacher0_chunk_kinds": [[1]],
        "teacher0_byte_counts": [[9, 9, 0, 0]],
    }
    return concatenate_datasets([Dataset.from_list([rows[0] | side]), Dataset.from_list(rows[1:])])


@pytest.mark.parametrize(
    ("made", "kind"),
    [(list, "list"), (Rows, "Rows"), (transformed, "Dataset"), (joined, "Dataset")],
)
def test_rows_that_get_no_teachers_side_end_a_run_whose_loss_is_made_of_it(
    folder: Path, tmp_path: Path, made: Callable[[list[Any]], Any], kind: str
) -> None:
    message = (
        rf"^a batch of train_dataset \({kind}\) has rows without 'teacher0_input_ids'.*pass a D"
    )
    with pytest.raises(DataError, match=message):
        step(folder, tmp_path, "right", made, loss="p-kl")


def test_rows_without_a_teachers_side_are_trained_on_by_a_loss_that_asks_none(
    folder: Path, tmp_path: Path
) -> None:
    logged, _ = step(folder, tmp_path, "right", list, loss="ce")
    assert logged["loss"] > 0
    assert "kd" not in logged


def test_a_collator_that_makes_no_teachers_side_ends_a_run_whose_loss_is_made_of_it(
    folder: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    tokenizer.pad_token = tokenizer.eos_token
    trainer = DistillTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "student"),
        DistillArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True),
        DataCollatorForLanguageModeling(tokenizer, mlm=False),
        Dataset.from_list(tokenized(tokenizer)).remove_columns("labels"),
        processing_class=tokenizer,
        teachers=str(folder / "teacher"),
    )
    message = "^data_collator = DataCollatorForLanguageModeling makes no 'teacher_side'"
    with pytest.raises(OptionError, match=message):
        trainer.train()
