"""Several teachers of one student: one cut of each text for all of them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from tiny_models import tiny_texts
from transformers import AutoTokenizer

import xtoken
from xtoken import Pair
from xtoken.data.examples import Example, encode_together
from xtoken.distillation.items import examples_together
from xtoken.errors import DataError, PairError

TEXTS = tiny_texts(64)
KEEPS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As Qwen3 drops what was thought: earlier answers are printed otherwise than the last.
DROPS = KEEPS.replace(
    "{{ m.content }}", "{{ m.content if m.role != 'assistant' or loop.last else m.content[:4] }}"
)


@pytest.fixture(scope="module")
def pairs(folder: Path) -> list[Pair]:
    """A teacher that spells numerals, and one with the student's own tokens."""
    return [Pair(folder / "student", folder / name) for name in ("teacher", "student")]


@pytest.mark.parametrize("max_tokens", [9, 24, 40])
def test_each_text_is_cut_once_where_it_suits_all(pairs: list[Pair], max_tokens: int) -> None:
    """Cut for each teacher alone, some texts end at different tokens of the student."""
    alone = [pair.examples(TEXTS, max_tokens=max_tokens) for pair in pairs]
    ends = [[len(each.student_ids) for each in made.examples] for made in alone]
    assert ends[0] != ends[1]
    encoders = [pair.encoders() for pair in pairs]
    together = encode_together(
        TEXTS,
        encoders[0][0],
        [teacher for _, teacher in encoders],
        [pair.aligner for pair in pairs],
        max_tokens=max_tokens,
    )
    assert len(together[0]) == len(together[1]) == len(TEXTS) - together[0].empty
    for index, (first, second) in enumerate(
        zip(*(each.examples for each in together), strict=True)
    ):
        assert np.array_equal(first.student_ids, second.student_ids)
        for pair, example in zip(pairs, (first, second), strict=True):
            assert max(len(example.student_ids), len(example.teacher_ids)) <= max_tokens
            spelled = (
                pair.student_vocab.decode_bytes(example.student_ids.tolist()),
                pair.teacher_vocab.decode_bytes(example.teacher_ids.tolist()),
            )
            assert spelled[0] == spelled[1]
            assert example.alignment.coverage.student_byte_share == 1.0
        # No later place suits both.
        places = [set(_fitting(made.examples[index])) for made in alone]
        assert len(first.student_ids) == max(places[0] & places[1])


def _fitting(example: Example) -> list[int]:
    return [int(bound) for bound in example.alignment.student_bounds]


def test_distillers_and_trainers_cut_so(pairs: list[Pair]) -> None:
    members = [pairs[0].distiller("p-kl", max_tokens=24), pairs[1].distiller("same-vocab-kl")]
    batch = xtoken.distiller(members).collate(TEXTS)
    first, second = batch.batches
    assert (first.student_ids == second.student_ids).all()
    assert first.teacher_ids.shape[1] <= 24
    assert first.tokens == second.tokens


def test_a_conversation_is_split_for_all_where_the_template_of_one_asks_for_it(
    folder: Path,
) -> None:
    student = AutoTokenizer.from_pretrained(folder / "student")
    teacher = AutoTokenizer.from_pretrained(folder / "teacher")
    student.chat_template, teacher.chat_template = KEEPS, DROPS
    pairs = [Pair(student, teacher), Pair(student, student)]
    talk = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "It is 4, I think."},
        {"role": "user", "content": "And 3 + 3?"},
        {"role": "assistant", "content": "That is 6."},
    ]
    assert [len(pair.distiller("p-kl").examples([talk])) for pair in pairs] == [2, 1]
    made = examples_together([talk], pairs, None)
    assert len(made) == 2
    for first, second in made:
        assert np.array_equal(first.student_ids, second.student_ids)
        assert np.array_equal(first.student_loss_mask, second.student_loss_mask)


@pytest.mark.parametrize("max_tokens", [2, 9, 24, 40])
def test_an_example_made_before_is_cut_as_its_text(pairs: list[Pair], max_tokens: int) -> None:
    pair = pairs[0]
    rows = pair.tokenize({"text": TEXTS})
    whole = pair.examples(TEXTS).examples
    for text, example, *values in zip(TEXTS, whole, *rows.values(), strict=True):
        row = dict(zip(rows, values, strict=True))
        try:
            ((expected,),) = examples_together([text], [pair], max_tokens)
        except DataError as error:
            for item in (example, row):
                with pytest.raises(DataError, match=re.escape(str(error))):
                    examples_together([item], [pair], max_tokens)
            continue
        for item in (example, row):
            ((found,),) = examples_together([item], [pair], max_tokens)
            assert same(found, expected)


def test_a_conversation_made_before_keeps_its_chunks_where_it_is_cut(folder: Path) -> None:
    tokenizers = [AutoTokenizer.from_pretrained(folder / name) for name in ("student", "teacher")]
    for tokenizer in tokenizers:
        tokenizer.chat_template = KEEPS
    pair = Pair(*tokenizers)
    talk = [
        {"role": role, "content": text}
        for text, role in zip(TEXTS[:6], ("user", "assistant") * 3, strict=True)
    ]
    ((whole,),) = examples_together([talk], [pair], None)
    cut = 0
    for limit in range(2, len(whole.student_ids), 7):
        try:
            ((expected,),) = examples_together([talk], [pair], limit)
        except DataError:
            continue
        ((found,),) = examples_together([whole], [pair], limit)
        assert same(found, expected)
        cut += 1
    assert cut > 5


def same(found: Example, expected: Example) -> bool:
    """Whether ids, masks and chunks are the same."""
    names = ("student_ids", "teacher_ids", "student_loss_mask", "teacher_loss_mask")
    arrays = all(np.array_equal(getattr(found, name), getattr(expected, name)) for name in names)
    return arrays and found.alignment == expected.alignment


def test_an_example_of_another_pair_is_not_cut(pairs: list[Pair]) -> None:
    (example,) = pairs[0].examples(TEXTS[:1]).examples
    with pytest.raises(PairError, match="an example is of teacher"):
        examples_together([example], pairs[1:], 8)


def test_ids_are_cut_as_texts_are(pairs: list[Pair]) -> None:
    pair = pairs[0]
    distiller = pair.distiller("p-kl", max_tokens=12)
    whole = pair.examples(TEXTS[:4]).examples
    batch = distiller.batch(
        *([getattr(each, f"{side}_ids") for each in whole] for side in ("student", "teacher"))
    )
    expected = distiller.collate(TEXTS[:4])
    assert batch.student_ids.tolist() == expected.student_ids.tolist()
    assert batch.teacher_ids.tolist() == expected.teacher_ids.tolist()
    assert len(batch.chunks) == len(expected.chunks)
