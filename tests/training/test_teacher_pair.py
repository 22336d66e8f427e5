"""Which two tokenizers a teacher and the student have; a teacher of another is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtoken import Pair
from xtoken.errors import PairError
from xtoken.training import DistillSettings, Teacher
from xtoken.training.teaching import Teaching, teach


def of(pair: Pair, *teachers: Any) -> Teaching:
    return teach(list(teachers), pair, DistillSettings(top_k=8), torch.device("cpu"))


def test_a_teacher_of_another_tokenizer_than_its_pairs_is_refused(folder: Path) -> None:
    """Both heads have 1,700 columns, so no shape tells them apart."""
    student, teacher = folder / "student", folder / "teacher"
    pair = Pair(student, teacher, cache_dir=False)
    wrong = rf"of the teacher .*{student.name} is .*, of the pair's teacher .*another tokenizer"
    model = AutoModelForCausalLM.from_pretrained(student)
    for teachers in ([student], [str(student)], [model], [teacher, student]):
        with pytest.raises(PairError, match=wrong):
            of(pair, *teachers)
    # Where one was named for it, it is taken at its word.
    assert of(pair, Teacher(student, teacher)).pairs[0].fingerprints == pair.fingerprints
    assert of(pair, teacher, Teacher(student, student)).pairs[1].fingerprints != pair.fingerprints


def test_special_and_further_tokens_make_no_other_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mine|>"]})
    pair = Pair(folder / "student", tokenizer.backend_tokenizer, cache_dir=False)
    assert pair.teacher_vocab != Pair(folder / "student", folder / "teacher").teacher_vocab
    assert of(pair, folder / "teacher").pairs == [pair]
