"""Students that predict no next token, or read other rows than they are given: refused or named."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from small_models import small_model
from test_distill_trainer import make, student_of
from test_training_trl import close, rows, step
from transformers import AutoTokenizer

from xtoken import Pair
from xtoken.errors import ModelSourceError, OptionError
from xtoken.training import Teacher
from xtoken.training.on_policy import GeneratingSampler, SampleRequest


def sizes(folder: Path) -> tuple[int, int]:
    return Pair(folder / "student", folder / "teacher").sizes


@pytest.mark.parametrize("name", ["bert", "masked bert", "xlnet"])
def test_a_student_that_sees_the_tokens_that_follow_is_refused(
    folder: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ModelSourceError, match=r"the student \w+ sees the tokens that follow"):
        make(folder, tmp_path, small_model(name, sizes(folder)[0]))


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_an_encoder_decoder_is_no_student(folder: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelSourceError, match=r"the student \w+ is an encoder-decoder"):
        make(folder, tmp_path, small_model(name, sizes(folder)[0]))


def test_a_student_is_left_in_its_mode_and_with_its_random_numbers(
    folder: Path, tmp_path: Path
) -> None:
    model = student_of(folder)
    model.train()
    modes = [each.training for each in model.modules()]
    torch.manual_seed(3)
    make(folder, tmp_path, student_of(folder))  # a Trainer seeds them itself
    expected = torch.rand(3)
    seen: list[bool] = []
    head = model.lm_head
    head.register_forward_hook(lambda module, args, output: seen.append(module.training))
    make(folder, tmp_path, model)
    assert torch.equal(torch.rand(3), expected)
    assert [each.training for each in model.modules()] == modes
    assert seen == [False]


@pytest.mark.parametrize("name", ["rwkv", "bart's decoder"])
def test_a_student_that_reads_padding_is_not_padded_on_the_left(
    folder: Path, tmp_path: Path, name: str
) -> None:
    model = small_model(name, sizes(folder)[0])
    with pytest.raises(OptionError, match=r"padding_side = 'left', but the student \w+ has other"):
        make(folder, tmp_path, model, options={"padding_side": "left"})
    make(folder, tmp_path, model, options={"padding_side": "right"})


def test_of_a_model_that_reads_padding_prompts_of_one_length_are_answered_together() -> None:
    model = small_model("bart's decoder")
    sampler = GeneratingSampler(model, 0)
    prompts = [[40, 41, 42, 43, 44, 45], [60, 61], [70, 71]]
    answer = sampler(SampleRequest(prompts, 5, 0.0, 1.0, (), 3))
    one_by_one = [sampler(SampleRequest([each], 5, 0.0, 1.0, (), 3))[0] for each in prompts]
    assert answer == one_by_one


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # TRL's
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["gpt-oss", "opt", "bloom"])
def test_packed_rows_teach_what_padded_ones_do(folder: Path, tmp_path: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    found = []
    for packing in (False, True):
        teacher = Teacher(small_model(name, sizes(folder)[1]), tokenizer=tokenizer)
        found.append(step(folder, tmp_path, rows(), teachers=teacher, packing=packing)[0])
    close(found[1], found[0])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # TRL's
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_student_that_reads_packed_documents_together_is_named_once(
    folder: Path, tmp_path: Path
) -> None:
    model = small_model("opt", sizes(folder)[0])
    with pytest.warns(UserWarning, match="the student OPTForCausalLM reads the documents of a pac"):
        step(folder, tmp_path, rows(), model=model, packing=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the student")
        step(folder, tmp_path, rows(), packing=True)
