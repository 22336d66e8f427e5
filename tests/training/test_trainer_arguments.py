"""What the trainer is given in place of what it takes is named, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_texts
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtoken.errors import ArgumentTypeError
from xtoken.training import DistillArguments, DistillTrainer


def make(folder: Path, out: Path, **given: Any) -> DistillTrainer:
    named: dict[str, Any] = {
        "args": DistillArguments(str(out), max_steps=1, report_to=[], use_cpu=True),
        "teachers": str(folder / "teacher"),
        "train_dataset": tiny_texts(4),
        "processing_class": AutoTokenizer.from_pretrained(folder / "student"),
    }
    return DistillTrainer(AutoModelForCausalLM.from_pretrained(folder / "student"), **named | given)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"distill": {"loss": "p-kl"}}, r"distill is dict, expected DistillSettings; pass Distill"),
        ({"args": {"max_steps": 1}}, r"args is dict, expected TrainingArguments; pass DistillArg"),
    ],
)
def test_settings_of_another_class_are_named(
    folder: Path, tmp_path: Path, given: dict[str, Any], match: str
) -> None:
    with pytest.raises(ArgumentTypeError, match=match):
        make(folder, tmp_path, **given)


@pytest.mark.parametrize(("found", "said"), [(1.5, "float"), (torch.ones(3), r"\(3,\)")])
def test_a_loss_that_is_no_tensor_of_one_number_is_named(
    folder: Path, tmp_path: Path, found: float | torch.Tensor, said: str
) -> None:
    trainer = make(folder, tmp_path, compute_loss_func=lambda *_, **__: found)
    with pytest.raises(ArgumentTypeError, match=f"is {said}, expected a tensor of one number"):
        trainer.train()
