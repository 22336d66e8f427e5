"""What is given in the place of a projection, a text or a number is named in one line."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from xtoken import Aligner, Vocab, XTokenError
from xtoken.data import Completion, Example, cut_passages, split_held_out
from xtoken.targets import TargetBuilder, Targets
from xtoken.teachers import LiveTeacher, StoreKey, TopKStore
from xtoken.teachers.served import ServedTeacher
from xtoken.tensors.byte_prefixes import BytePrefixes
from xtoken.tensors.completions import Completions
from xtoken.tensors.piece_chains import PieceChains
from xtoken.training import DistillConfig, DistillSettings
from xtoken.trie import PairTries, PieceTrie

MADE_FROM_W = [TargetBuilder, BytePrefixes, Completions, PieceChains, PairTries, PieceTrie]


@pytest.mark.parametrize("cls", MADE_FROM_W)
@pytest.mark.parametrize("given", [None, "smollm2", 3])
def test_what_is_no_projection_is_refused_by_all_that_is_made_from_one(
    cls: type, given: object
) -> None:
    with pytest.raises(XTokenError, match=r"^projection is .*; pass Projection\.build\(\.\.\.\)$"):
        cls.from_projection(given)


CALLS: list[tuple[Callable[[], object], str]] = [
    (lambda: PieceTrie.build("a", "b"), "tokens is str, expected Vocab"),  # type: ignore[arg-type]
    (lambda: Targets.joined([None]), r"parts\[0\] is NoneType, expected a list of"),  # type: ignore[list-item]
    (lambda: Example.whole(["a"], [1], None), "student_ids "),  # type: ignore[list-item, arg-type]
    (lambda: cut_passages(None, 10), "text is NoneType, expected str"),  # type: ignore[arg-type]
    (lambda: cut_passages("text", None), "max_chars = None, expected at least 1"),  # type: ignore[arg-type]
    (lambda: split_held_out(["a", "b"], "x"), "held-out fraction = 'x', expected"),  # type: ignore[arg-type]
    (lambda: split_held_out(["a", "b"], 1.0), "held-out fraction = 1.0, expected"),
    (lambda: Completion("a", None), "completion is NoneType, expected str"),  # type: ignore[arg-type]
    (lambda: Completion(1, "a"), "prompt is int, expected str"),  # type: ignore[arg-type]
    (lambda: DistillConfig.from_settings(None), "values is NoneType, expected dict"),  # type: ignore[arg-type]
]
CALLS += [
    (
        lambda: StoreKey(object(), 3, "float32"),
        "teacher is object, expected str; pass",
    ),  # type: ignore[arg-type]
    (lambda: StoreKey("a", "64", "float32"), "top_k = '64', expected at least 1"),  # type: ignore[arg-type]
    (lambda: TopKStore(__file__, StoreKey("a", 3, "float32")), "is a file; pass a folder"),
    (lambda: TopKStore("store", "key"), "key is str, expected StoreKey"),  # type: ignore[arg-type]
    (lambda: LiveTeacher(None), "model is NoneType, expected Module; pass a causal"),  # type: ignore[arg-type]
    (lambda: ServedTeacher(8000, vocab=9, top_k=3), "url is int, expected str"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "message"), CALLS)
def test_another_class_than_the_one_meant_is_named(
    call: Callable[[], object], message: str
) -> None:
    with pytest.raises(XTokenError, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kd_weight", np.float32(0.5), r"numpy\.float32; pass float\(\.\.\.\) of it"),
        ("kd_weight", torch.tensor(0.5), r"torch\.Tensor; pass float\(\.\.\.\) of it"),
        ("top_k", np.int64(3), r"numpy\.int64; pass int\(\.\.\.\) of it"),
    ],
)
def test_numbers_of_other_libraries_are_told_as_what_they_are(
    name: str, value: object, message: str
) -> None:
    with pytest.raises(XTokenError, match=f"^{name} = .* is {message}"):
        DistillSettings(**{name: value})  # type: ignore[arg-type]


def test_ids_of_other_whole_numbers_are_taken() -> None:
    one = Vocab.from_tokens([b"a", b"b"], ranked=True)
    alignment = Aligner(one, one).align([0, 1], [0, 1])
    made = Example.whole(np.array([0, 1], np.int32), [0, 1], alignment)
    assert made.student_ids.dtype == made.teacher_ids.dtype == np.int64
