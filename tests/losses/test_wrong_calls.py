"""Each seam names the class and the call that was meant, in one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from loss_cases import make_case
from tokenizer_zoo import byte_level_bpe
from torch import Tensor

from xtoken import Aligner, Projection, Vocab, XTokenError
from xtoken.errors import ArgumentTypeError, PairError, ShapeError
from xtoken.losses import (
    LOSSES,
    CommonSet,
    LmHead,
    LossInputs,
    LossOptions,
    PairParts,
    TeacherTopK,
    TrieSlots,
    cross_entropy,
    p_kl,
)
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.projection import SparseProjection
from xtoken.trie import PairTries
from xtoken.vocab.fingerprints import PairFingerprint

TEXT = "the same text, and 201 of it"


@pytest.fixture(scope="module")
def tokenizers():
    return byte_level_bpe(900, digits=3), byte_level_bpe(700, digits=1)


@pytest.fixture(scope="module")
def projection(tokenizers) -> Projection:
    return Projection.build(*tokenizers, cache_dir=False)


@pytest.fixture(scope="module")
def alignment(tokenizers):
    return Aligner(*tokenizers).align(*(one.encode(TEXT).ids for one in tokenizers))


def assert_one_line(error: pytest.ExceptionInfo[XTokenError]) -> None:
    assert "\n" not in str(error.value)
    assert isinstance(error.value, XTokenError)


def test_inputs_of_another_class_name_the_call_that_makes_them(alignment, tokenizers) -> None:
    case = make_case(0)
    student, teacher, chunks = case.student_logits, case.teacher_logits, case.usable
    aligner = Aligner(*tokenizers)
    batch = aligner.align_batch([tokenizers[0].encode(TEXT).ids], [tokenizers[1].encode(TEXT).ids])
    for match, call in {
        "chunks is xtoken.Alignment, expected ChunkBatch; pass ChunkBatch.usable_from_alignments": (
            lambda: LossInputs(student, teacher, alignment)
        ),
        "chunks is xtoken.AlignmentBatch, expected ChunkBatch; pass ChunkBatch": (
            lambda: LossInputs(student, teacher, batch)
        ),
        "student is numpy.ndarray, expected Tensor or LmHead or VocabShard or SharedLogits; pass": (
            lambda: LossInputs(student.detach().numpy(), teacher, chunks)
        ),
        "teacher is dict, expected Tensor or TeacherTopK or TeacherSpread or LmHead; pass": (
            lambda: LossInputs(student, {"ids": 1}, chunks)
        ),
        "student_ids is list, expected Tensor; pass student_ids as an int64 tensor": (
            lambda: LossInputs(student, teacher, chunks, student_ids=[[1]])
        ),
        "chunk_weights is list, expected Tensor; pass a float tensor, one per chunk": (
            lambda: LossInputs(student, teacher, chunks, chunk_weights=[1.0] * len(chunks))
        ),
        "ids is dict, expected Tensor; pass TeacherTopK.from_logits": (
            lambda: TeacherTopK({"ids": 1}, {"log_probs": 2})
        ),
        "mask is list, expected Tensor": (lambda: cross_entropy(student, case.student_ids, [True])),
    }.items():
        with pytest.raises(ArgumentTypeError, match=match) as error:
            call()
        assert_one_line(error)


@pytest.mark.parametrize("name", LOSSES)
def test_a_pair_of_another_class_is_refused_by_every_loss(
    name: str, projection, tokenizers
) -> None:
    case = make_case(0)
    inputs = LossInputs(case.student_logits, case.teacher_logits, case.usable)
    wrong = {
        "xtoken.Projection": projection,
        "xtoken.SparseProjection": case.projection,
        "xtoken.Vocab": Vocab.from_tokenizer(tokenizers[0]),
        "numpy.ndarray": np.zeros(3),
    }
    for kind, pair in wrong.items():
        match = f"pair is {kind}, expected PairParts; pass PairParts.from_projection"
        with pytest.raises(ArgumentTypeError, match=match) as error:
            LOSSES[name].function(inputs, pair)
        assert_one_line(error)
    with pytest.raises(ArgumentTypeError, match=r"inputs is torch\.Tensor, expected LossInputs"):
        LOSSES[name].function(case.student_logits, case.pair)
    with pytest.raises(ArgumentTypeError, match="options is dict, expected LossOptions"):
        LOSSES[name].function(inputs, case.pair, {"top_k": 3})


@pytest.mark.parametrize(
    "name", ["p-kl", "prefix-kl", "gold", "h-kl", "bpm", "escd", "strict-top-k", "partition-kl"]
)
def test_a_missing_part_names_the_call_that_makes_it(name: str) -> None:
    case = make_case(0)
    ids = {"student_ids": case.student_ids, "teacher_ids": case.teacher_ids}
    match = rf"which {name} needs; pass PairParts\.from_projection\(projection, needs='{name}'\)"
    with pytest.raises(PairError, match=match) as error:
        case.loss(name, pair=PairParts((13, 11)), **ids)
    assert_one_line(error)


def test_parts_of_another_class_name_what_was_meant(tokenizers, projection) -> None:
    for match, call in {
        "projection is tokenizers.Tokenizer, expected Projection; pass xtoken.Projection.build": (
            lambda: PairParts.from_projection(tokenizers[0], needs="p-kl")
        ),
        "projection is xtoken.Projection, expected SparseProjection": (
            lambda: PairParts(projection.shape, projection=projection)
        ),
        "trie is tokenizers.Tokenizer, expected PieceTrie; pass PairTries.build": (
            lambda: TrieSlots(tokenizers[0])
        ),
        "student_trie is xtoken.PieceTrie, expected TrieSlots": (
            lambda: PairParts(
                projection.shape, student_trie=PairTries.from_projection(projection).student
            )
        ),
        "student_ids is list, expected Tensor": lambda: CommonSet([1], [2]),
        r"projection is numpy.ndarray, expected Projection": (
            lambda: SparseProjection.from_projection(np.zeros((2, 2)))
        ),
        r"alignments is xtoken.Alignment, expected AlignmentBatch or list or tuple": (
            lambda: ChunkBatch.from_alignments(Aligner(*tokenizers).align([1], [1]))
        ),
        r"alignments\[0\] is dict, expected Alignment": lambda: ChunkBatch.from_alignments([{}]),
    }.items():
        with pytest.raises(ArgumentTypeError, match=match) as error:
            call()
        assert_one_line(error)


def test_logits_of_one_sample_without_a_batch_are_refused() -> None:
    case = make_case(0)
    with pytest.raises(ShapeError, match=r"expected float \[B, T_s, V_s\]"):
        case.loss("p-kl", student=case.student_logits[0])
    with pytest.raises(ShapeError, match=r"expected \[B, T_t, V_t\] logits"):
        case.loss("p-kl", teacher=case.teacher_logits[0])


def test_what_was_made_for_another_pair_is_refused_at_every_seam(tokenizers, projection) -> None:
    other = PairFingerprint("a" * 32, projection.teacher_fingerprint)
    pair = PairParts.from_projection(projection, needs={"projection", "tries"})
    encoded = [one.encode(TEXT).ids for one in tokenizers]
    alignment = Aligner(*tokenizers).align(*encoded)
    assert alignment.pair == projection.pair == pair.fingerprint
    chunks = ChunkBatch.from_alignments([alignment])
    assert chunks.pair == projection.pair
    masks = [torch.ones(1, len(ids), dtype=torch.bool) for ids in encoded]
    usable = chunks.usable(*masks)
    logits = [torch.zeros(1, len(ids), n) for ids, n in zip(encoded, projection.shape, strict=True)]
    assert torch.isfinite(p_kl(LossInputs(*logits, usable), pair).loss)
    with pytest.raises(PairError, match=r"chunks is of student a{12}, expected [0-9a-f]{12}; pass"):
        p_kl(LossInputs(*logits, replace(usable, pair=other)), pair)
    stored = TeacherTopK.from_logits(logits[1], 3, teacher_fingerprint="b" * 32)
    with pytest.raises(PairError, match=r"teacher is of teacher b{12}, expected"):
        p_kl(LossInputs(logits[0], stored, usable), pair)
    sparse = SparseProjection.from_projection(projection)
    sparse.fingerprint = other
    with pytest.raises(PairError, match="student_trie is of student"):
        PairParts(projection.shape, projection=sparse, student_trie=pair.student_trie)
    with pytest.raises(PairError, match="projection is of student"):
        PairParts(projection.shape, projection=sparse, fingerprint=projection.pair)
    foreign = replace(alignment, pair=other)
    with pytest.raises(PairError, match=r"alignments is of student a{12}"):
        ChunkBatch.from_alignments([alignment, foreign])
    with pytest.raises(PairError, match="base is of student"):
        sparse.to_projection(projection)


def test_the_fingerprints_of_a_pair_do_not_make_two_alignments_differ(alignment) -> None:
    assert replace(alignment, pair=None) == alignment


def test_options_are_checked_where_they_are_made() -> None:
    nan, inf = float("nan"), float("inf")
    for name, values in {
        "temperature": (0, -1.0, nan, inf, True, "1"),
        "beta": (0.0, 1.0, -0.5, nan, True),
        "top_k": (0, -1, 1.5, True, "all"),
        "block_size": (0, -1, 2.5, True),
        "common_weight": (-1.0, nan, inf, True),
        "uld_weight": (-1.0, nan, inf),
        "max_depth": (-1, 0.5, True),
        "depth_weights": ((), (1.0, -1.0), (nan,), (True,), 1.0),
        "min_mass": (-0.1, 1.0, nan),
        "merge": ("sum", None),
        "direction": ("both", 0),
        "top_k_scope": ("batch",),
        "tail_bucket": ("always", None),
        "end": (None, "yes"),
        "mirror": (2,),
        "full_metrics": ("no",),
    }.items():
        for value in values:
            with pytest.raises(XTokenError, match=f"{name} = ") as error:
                LossOptions(**{name: value})
            assert type(error.value).__name__ == "OptionError"
            assert_one_line(error)


@pytest.mark.parametrize(
    "normalizer", [0, -1.0, float("nan"), float("inf"), True, torch.tensor(0), torch.tensor(-1.0)]
)
def test_a_normalizer_that_is_not_above_zero_is_refused(normalizer) -> None:
    case = make_case(0)
    with pytest.raises(XTokenError, match=r"normalizer = .* must be above 0"):
        case.loss("p-kl", normalizer=normalizer)
    with pytest.raises(XTokenError, match=r"normalizer = .* must be above 0"):
        cross_entropy(case.student_logits, case.student_ids, case.student_mask, normalizer)


HIDDEN, WEIGHT = torch.zeros(2, 5, 4), torch.zeros(9, 4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": WEIGHT.to(torch.int8)}, r"weight is torch\.int8, .*lm_head\.weight, dequ"),
        ({"weight": WEIGHT > 0}, r"weight is torch\.bool, expected float32"),
        ({"weight": WEIGHT.to(torch.float8_e4m3fn)}, r"weight is torch\.float8_e4m3fn, expected"),
        ({"weight": torch.nn.Linear(4, 9)}, r"weight is torch\.Linear, expected Tensor; pass"),
        ({"weight": WEIGHT.tolist()}, "weight is list, expected Tensor"),
        ({"weight": WEIGHT.to_sparse()}, r"weight is torch\.sparse_coo, expected a dense tensor"),
        ({"weight": WEIGHT.to("meta")}, "weight is on the device meta and holds nothing"),
        ({"hidden": HIDDEN.long()}, r"hidden is torch\.int64, expected float32"),
        ({"hidden": HIDDEN.numpy()}, r"hidden is numpy\.ndarray, expected Tensor; pass the last"),
        ({"hidden": HIDDEN.to(torch.complex64)}, r"hidden is torch\.complex64, expected float32"),
        ({"bias": torch.ones(9, dtype=torch.int64)}, r"bias is torch\.int64, expected float32"),
        ({"scale": torch.tensor(2.0, requires_grad=True)}, r"scale = .*, expected a number, which"),
        ({"scale": "2"}, "scale = '2', expected a number"),
        ({"scale": None}, "scale = None, expected a number"),
        ({"scale": math.nan}, "scale = nan, expected a finite number"),
        ({"softcap": "30"}, "softcap = '30', expected a number"),
        ({"softcap": math.inf}, "softcap = inf, expected a finite number"),
    ],
)
def test_a_head_that_cannot_make_logits_is_refused_by_name(
    changed: dict[str, object], message: str
) -> None:
    given = {"hidden": HIDDEN, "weight": WEIGHT} | changed
    with pytest.raises(XTokenError, match=message) as error:
        LmHead(**given)  # type: ignore[arg-type]
    assert_one_line(error)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Tensor.long, r"is torch\.int64, expected float32"),
        (Tensor.to_sparse, r"is torch\.sparse_coo, expected a dense tensor"),
        (lambda logits: logits.to("meta"), "is on the device meta and holds nothing"),
    ],
)
def test_logits_that_cannot_be_read_are_refused_on_both_sides(
    made: Callable[[Tensor], Tensor], message: str
) -> None:
    case = make_case(0)
    for given, name in (
        ({"student": made(case.student_logits)}, "student_logits"),
        ({"teacher": made(case.teacher_logits)}, "teacher"),
    ):
        with pytest.raises(XTokenError, match=f"^{name} {message}") as error:
            case.loss("p-kl", **given)
        assert_one_line(error)
