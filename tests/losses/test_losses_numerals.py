"""The paper's failure and its cure, on real tokenizers: numerals of three digits against digits."""

from __future__ import annotations

import pytest
import torch
from tokenizer_zoo import byte_level_bpe, deepseek, vocab

from xtoken import Aligner, Projection
from xtoken.losses import LossInputs, LossOptions, PairParts, gold, p_kl
from xtoken.tensors.chunks import ChunkBatch

NUMERALS = ["10", "42", "99", "201", "314", "777", "999"]


@pytest.fixture(scope="module")
def aligner() -> Aligner:
    return Aligner(vocab(deepseek()), vocab(byte_level_bpe(700, digits=1)))


@pytest.fixture(scope="module")
def projection(aligner: Aligner) -> Projection:
    return Projection.build(aligner.student_vocab, aligner.teacher_vocab, cache_dir=False)


@pytest.mark.parametrize("numeral", NUMERALS)
def test_a_teacher_sure_of_the_digits_raises_the_numeral_under_p_kl_and_lowers_it_under_gold(
    numeral: str, aligner: Aligner, projection: Projection
) -> None:
    student, teacher = deepseek(), byte_level_bpe(700, digits=1)
    text = f"x={numeral}."
    student_ids = student.encode(text, add_special_tokens=False).ids
    teacher_ids = teacher.encode(text, add_special_tokens=False).ids
    token = student.token_to_id(numeral)
    digits = [teacher.token_to_id(digit) for digit in numeral]
    alignment = aligner.align(student_ids, teacher_ids)
    masks = [torch.ones(1, len(ids), dtype=torch.bool) for ids in (student_ids, teacher_ids)]
    chunks = ChunkBatch.from_alignments([alignment]).usable(*masks)
    at = student_ids.index(token)
    chunk = chunks.select(chunks.student_start == at)
    assert int(chunk.student_end - chunk.student_start) == 1
    assert int(chunk.teacher_end - chunk.teacher_start) == len(numeral)

    generator = torch.Generator().manual_seed(0)
    v_s, v_t = projection.shape
    student_logits = torch.randn(1, len(student_ids), v_s, generator=generator).requires_grad_()
    teacher_logits = torch.randn(1, len(teacher_ids), v_t, generator=generator)
    first = int(chunk.teacher_start)
    for place, digit in enumerate(digits):
        teacher_logits[0, first + place - 1, digit] = 20.0

    pair = PairParts.from_projection(projection, needs={"projection", "strict_common"})
    inputs = LossInputs(student_logits, teacher_logits, chunk)
    losses = {
        "all columns": p_kl(inputs, pair),
        "top-k of the chunk": p_kl(inputs, pair, LossOptions(top_k=64)),
        "top-k of the batch": p_kl(inputs, pair, LossOptions(top_k=64, top_k_scope="microbatch")),
        "gold": gold(inputs, pair),
    }
    for name, result in losses.items():
        (grad,) = torch.autograd.grad(result.loss, student_logits)
        slope = grad[0, at - 1, token].item()
        assert slope > 0 if name == "gold" else slope < 0, name
