"""The settings of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from xtoken.distillation.options import LOSS_NAMES as LOSSES
from xtoken.errors import OptionError
from xtoken.training.config import DistillConfig


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"loss": "gold", "kd_weight": 1.5, "top_k": None, "teacher_top_k": None, "merge": "mean"},
        {"loss": "ce", "steps": 3, "learning_rate": 1, "seed": 7, "device": "cpu"},
    ],
)
def test_settings_are_the_same_after_a_trip_through_json(
    values: dict[str, Any], tmp_path: Path
) -> None:
    config = DistillConfig(**values)
    config.save(tmp_path / "config.json")
    assert DistillConfig.load(tmp_path / "config.json") == config


def test_a_part_of_the_settings_leaves_the_rest_at_their_defaults() -> None:
    assert DistillConfig.from_json('{"steps": 5}') == DistillConfig(steps=5)


def test_a_subclass_has_settings_of_its_own_with_types_of_their_own() -> None:
    @dataclasses.dataclass(frozen=True)
    class Mine(DistillConfig):
        patience: int = 3

    assert Mine(patience=2, steps=5).patience == 2
    with pytest.raises(OptionError, match=r"patience = 'long', expected"):
        Mine(patience="long")  # type: ignore[arg-type]


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DistillConfig().steps = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": "kl"}, "loss = 'kl', expected one of 'prefix-kl', 'p-kl', 'exact-kl', 'h-kl'"),
        ({"steps": 0}, "steps = 0, expected at least 1; the default is 160"),
        ({"steps": 2.5}, "steps = 2.5, expected a whole number"),
        ({"steps": True}, "steps = True, expected a whole number"),
        ({"batch_size": -1}, "batch_size = -1, expected at least 1"),
        ({"temperature": 0}, "temperature = 0, expected more than 0"),
        ({"learning_rate": float("nan")}, "learning_rate = nan, expected more than 0"),
        ({"warmup_steps": 1.5}, "warmup_steps = 1.5, expected a whole number, or a share below 1"),
        ({"kd_weight": -0.5}, "kd_weight = -0.5, expected at least 0"),
        ({"kd_weight": "equal"}, "kd_weight = 'equal', expected a number or one of 'balanced'"),
        ({"top_k": 600}, "top_k = 600, expected at most teacher_top_k = 512"),
        ({"merge": "mean"}, "merge = 'mean' needs the teacher's full logits"),
        ({"loss": "prefix-kl", "merge": "last"}, "merge = 'last' under prefix-kl"),
        ({"prefix_max_depth": -1}, "prefix_max_depth = -1, expected at least 0"),
        ({"loss": "gold", "temperature": 2.0}, "temperature = 2.0 under gold needs the teacher"),
        ({"loss": "p-kl", "temperature": 2.0}, "or use p-kl without tail_bucket"),
        ({"mixed_precision": "fp16"}, "mixed_precision = 'fp16', expected one of 'no', 'bf16'"),
        ({"teacher_dtype": "half"}, "teacher_dtype = 'half', expected one of 'float32', 'bfloat"),
        ({"ce_weight": 0}, "leaves nothing to train on"),
        ({"ce_weight": 0, "loss": "ce", "kd_weight": 1}, "leaves nothing to train on"),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as raised:
        DistillConfig(**values)
    assert message in str(raised.value)


def test_bad_json_is_refused() -> None:
    with pytest.raises(OptionError, match="not JSON"):
        DistillConfig.from_json("{")
    with pytest.raises(OptionError, match="is a list, expected an object"):
        DistillConfig.from_json("[]")
    with pytest.raises(OptionError, match=r"unknown setting 'lr'; known are .*learning_rate"):
        DistillConfig.from_json('{"lr": 1}')


def test_every_loss_of_the_type_is_known_by_name() -> None:
    assert {DistillConfig(loss=loss).loss for loss in LOSSES} == set(LOSSES)  # type: ignore[arg-type]
