"""The mixin over a plain Trainer: its losses are the same, whatever a collator makes of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_texts
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from xtoken.training import DistillMixin, DistillSettings


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


def step(
    folder: Path, out: Path, collator: str, **settings: Any
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """One step over all rows: what is logged, and the gradient."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    ids = [tokenizer(text)["input_ids"][:60] for text in tiny_texts(6)]
    # The first tokens of a row are its prompt.
    labels = [[-100] * 5 + row[5:] for row in ids]
    keep = KeepGradient()
    trainer = MixedTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "student"),
        TrainingArguments(
            str(out), max_steps=1, per_device_train_batch_size=6, logging_steps=1,
            max_grad_norm=1e9, report_to="none", use_cpu=True, disable_tqdm=True,
        ),
        teachers=str(folder / "teacher"),
        distill=DistillSettings(**settings),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": labels}),
        processing_class=tokenizer,
        data_collator=COLLATORS[collator](tokenizer),
        callbacks=[keep],
    )  # fmt: skip
    trainer.train()
    return next(each for each in trainer.state.log_history if "kd" in each), keep.gradient


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
