"""Arguments as people know them, with ours beside them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments

from xtoken.errors import OptionError
from xtoken.losses.inputs import LossOptions
from xtoken.training import DistillArguments, DistillSettings
from xtoken.training.config import DistillConfig
from xtoken.training.config_arguments import training_arguments


def test_the_arguments_are_those_of_transformers_and_all_options_of_the_losses() -> None:
    names = {each.name for each in dataclasses.fields(DistillArguments)}
    assert names >= {each.name for each in dataclasses.fields(TrainingArguments)}
    assert names >= {each.name for each in dataclasses.fields(LossOptions)}
    assert names >= {"loss", "kd_weight", "ce_weight", "threshold", "learnable_projection"}
    ours = {each.name for each in dataclasses.fields(DistillSettings)}
    assert not ours & {each.name for each in dataclasses.fields(TrainingArguments)}


def test_the_defaults_suit_a_pretrained_student(tmp_path: Path) -> None:
    args = DistillArguments("out", report_to="none")
    assert args.learning_rate == 2e-5
    assert args.lr_scheduler_type.value == "cosine"
    assert args.get_warmup_steps(1000) == 30
    command = training_arguments(DistillConfig(steps=1000, device="cpu"), tmp_path)
    assert command.learning_rate == args.learning_rate
    assert command.get_warmup_steps(1000) == 30
    assert not args.remove_unused_columns
    assert (args.loss, args.kd_weight, args.ce_weight) == ("prefix-kl", "balanced", 1.0)


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("bits_per_byte", False), ("eval_bits_per_byte", False), ("de_numeral_nll", False),
        ("eval_de_bits_per_byte/Latin letters", False), ("loss", False), ("numeral_mass", True),
    ],
)  # fmt: skip
def test_which_score_is_better_is_known(metric: str, greater: bool) -> None:
    assert DistillArguments("out", metric_for_best_model=metric).greater_is_better is greater
    for said in (True, False):
        args = DistillArguments("out", metric_for_best_model=metric, greater_is_better=said)
        assert args.greater_is_better is said


def test_every_argument_has_a_flag_with_help() -> None:
    parser = HfArgumentParser(DistillArguments)
    (args,) = parser.parse_args_into_dataclasses(
        [
            *("--output_dir", "out", "--loss", "p-kl", "--kd_weight", "0.5", "--top_k", "8"),
            *("--tail_bucket", "False", "--learning_rate", "1e-4", "--depth_weights", "1", "0.5"),
        ]
    )
    assert (args.loss, args.kd_weight, args.top_k, args.tail_bucket) == ("p-kl", 0.5, 8, False)
    assert (args.learning_rate, args.depth_weights) == (1e-4, [1.0, 0.5])
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", "out"])
    assert args.kd_weight == "balanced"
    (args,) = parser.parse_args_into_dataclasses(
        [
            *("--output_dir", "out", "--top_k", "none", "--max_tokens", "None"),
            *("--temperature", "null", "--tail_bucket", "true", "--fused", "False"),
            *("--fused_teacher", "auto", "--cells", "TRUE"),
        ]
    )
    assert (args.top_k, args.max_tokens, args.temperature) == (None, None, None)
    assert (args.tail_bucket, args.fused, args.fused_teacher) == (True, False, "auto")
    assert args.cells is True
    for each in dataclasses.fields(DistillSettings):
        assert each.metadata["help"], each.name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": "kl"}, "loss = 'kl', expected one of prefix-kl"),
        ({"beta": 2.0}, "beta = 2.0 must be inside"),
        ({"temperature": 0.0}, "temperature = 0.0 must be above 0"),
        ({"fused": "yes"}, "fused = 'yes', expected True, False or 'auto'"),
        (
            {"max_tokens": 1},
            "max_tokens = 1 is out of range; expected a whole number",
        ),
        ({"projection_learning_rate": 0.0}, "projection_learning_rate = 0.0, expected above 0"),
        ({"projection_learning_rate": None}, "projection_learning_rate = None, expected above 0"),
        ({"max_tokens": "64"}, "max_tokens = '64' is out of range; expected a whole number"),
        ({"on_policy_fraction": "0.5"}, "on_policy_fraction = '0.5', expected at least 0"),
        ({"on_policy_top_p": None}, "on_policy_top_p = None, expected above 0"),
        ({"on_policy_max_new_tokens": 1.5}, "on_policy_max_new_tokens = 1.5, expected at least 1"),
        ({"depth_weights": 2.0}, "depth_weights = 2.0, expected one finite weight"),
        ({"depth_weights": None}, "depth_weights = None, expected one finite weight"),
        ({"kd_weight": "x"}, "kd_weight = 'x' is out of range; expected a number of at least 0"),
        ({"teacher_weighting": "sure"}, "teacher_weighting = 'sure', expected one of ce, entropy"),
        ({"teacher_dtype": "int8"}, "teacher_dtype = 'int8', expected one of auto, float32"),
        ({"teacher_column": 3}, "teacher_column = 3, expected the name of a column"),
        ({"threshold": 7}, "threshold = 7 is out of range; expected 0 < t <= 1"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(values: dict, message: str) -> None:
    for made in (DistillSettings, DistillArguments):
        with pytest.raises(OptionError, match=message):
            made(**values)


def test_an_option_that_no_loss_reads_is_refused_and_one_at_rest_is_not() -> None:
    settings = DistillSettings(max_depth=2)
    settings.check_read(["gold", "prefix-kl"])
    with pytest.raises(OptionError, match="max_depth = 2 is not an option of gold or p-kl"):
        settings.check_read(["gold", "p-kl"])
    DistillSettings(top_k=None).check_read(["gold"])
    DistillSettings(threshold=0.9).check_read(["p-kl", "h-kl"])
    with pytest.raises(OptionError, match=r"threshold = 0\.9 is not an option of p-kl or gold"):
        DistillSettings(threshold=0.9).check_read(["p-kl", "gold"])
    DistillSettings().check_read(["uld"])
    DistillSettings(top_k=None, compiled=True).check_read(["ce"])
    with pytest.raises(OptionError, match=r"min_mass = 0\.1 is not an option of ce; it has no"):
        DistillSettings(min_mass=0.1).check_read(["ce"])
