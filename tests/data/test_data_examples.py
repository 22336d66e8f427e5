"""Texts under both tokenizers, and padded batches of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizer_zoo as zoo
import torch
from tiny_models import tiny_texts, write_pair
from transformers import AutoTokenizer

from xtoken import Aligner, Pair, Vocab
from xtoken.data import Completion, Encoder, Example, make_examples
from xtoken.distillation import DistillCollator
from xtoken.errors import ArgumentTypeError, DataError, OptionError

TEXTS = tiny_texts(30)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, object]:
    student, teacher = write_pair(tmp_path_factory.mktemp("pair"))
    return AutoTokenizer.from_pretrained(student), AutoTokenizer.from_pretrained(teacher)


@pytest.fixture(scope="module")
def examples(tokenizers: tuple[object, object]) -> list[Example]:
    return make_examples(TEXTS, *tokenizers, max_tokens=1000).examples


def test_an_example_holds_what_both_tokenizers_make_of_the_text(
    tokenizers: tuple, examples: list[Example]
) -> None:
    student, teacher = tokenizers
    assert len(examples) == len(TEXTS)
    for text, example in zip(TEXTS, examples, strict=True):
        assert example.student_ids.tolist() == student(text).input_ids
        assert example.teacher_ids.tolist() == teacher(text).input_ids
        # The student's BOS stands alone; all the text is in exact chunks.
        assert example.alignment.student_bounds[-1] == len(example.student_ids)
        assert example.alignment.coverage.student_byte_share == 1.0
        assert example.alignment.coverage.exact_student_tokens == len(example.student_ids) - 1


@pytest.mark.parametrize("max_tokens", [2, 7, 40])
def test_a_long_text_is_cut_where_both_sides_hold_the_same_text(
    tokenizers: tuple, max_tokens: int
) -> None:
    student, teacher = map(Vocab.from_tokenizer, tokenizers)
    made = make_examples(TEXTS, *tokenizers, max_tokens=max_tokens)
    assert made.cut == len(TEXTS)
    assert len(made) + made.empty == len(TEXTS)
    for example in made.examples:
        assert 2 <= len(example.student_ids) <= max_tokens
        assert len(example.teacher_ids) <= max_tokens
        left = b"".join(student.token_bytes(int(i)) for i in example.student_ids[1:])
        right = b"".join(teacher.token_bytes(int(i)) for i in example.teacher_ids)
        assert left == right
        assert example.alignment.coverage.teacher_byte_share == 1.0


def test_a_cut_keeps_as_much_as_fits(tokenizers: tuple) -> None:
    (whole,) = make_examples(TEXTS[:1], *tokenizers, max_tokens=1000).examples
    (cut,) = make_examples(TEXTS[:1], *tokenizers, max_tokens=30).examples
    bounds = zip(whole.alignment.student_bounds, whole.alignment.teacher_bounds, strict=True)
    fitting = [bound for bound in bounds if max(bound) <= 30]
    assert (len(cut.student_ids), len(cut.teacher_ids)) == fitting[-1]


def test_progress_is_told_up_to_the_end(tokenizers: tuple) -> None:
    seen: list[tuple[int, int]] = []
    texts = ["some text"] * 300
    make_examples(
        texts, *tokenizers, max_tokens=9, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(256, 300), (300, 300)]


def test_texts_without_two_tokens_are_left_out_and_counted(tokenizers: tuple) -> None:
    made = make_examples(["", TEXTS[0]], *tokenizers, max_tokens=100)
    assert (len(made), made.empty) == (1, 1)
    with pytest.raises(DataError, match="none of 1 documents can be used: its text is blank"):
        make_examples([""], *tokenizers, max_tokens=100)
    with pytest.raises(OptionError, match="max_tokens = 1 is out of range; expected a whole"):
        make_examples(TEXTS, *tokenizers, max_tokens=1)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [1, 64])
def test_a_batch_holds_each_example_and_padding_beside_it(
    examples: list[Example], side: str, multiple: int
) -> None:
    collator = DistillCollator(3, 5, padding_side=side, pad_to_multiple_of=multiple)  # type: ignore[arg-type]
    picked = examples[4:9]
    batch = collator(picked)
    for name, pad in (("student", 3), ("teacher", 5)):
        ids = getattr(batch, name)["input_ids"]
        attention = getattr(batch, name)["attention_mask"]
        loss = getattr(batch, f"{name}_loss_mask")
        assert ids.shape[1] % multiple == 0
        for row, example in enumerate(picked):
            expected = getattr(example, f"{name}_ids")
            real = attention[row].bool()
            assert ids[row, real].tolist() == expected.tolist()
            assert (ids[row, ~real] == pad).all()
            assert real[0 if side == "right" else -1]
            assert loss[row, real].tolist() == [False] + [True] * (len(expected) - 1)
            assert not loss[row, ~real].any()


@pytest.mark.parametrize("side", ["right", "left"])
def test_chunks_of_a_batch_spell_the_same_bytes_on_both_sides(
    tokenizers: tuple, examples: list[Example], side: str
) -> None:
    student, teacher = map(Vocab.from_tokenizer, tokenizers)
    picked = examples[10:14]
    batch = DistillCollator(padding_side=side)(picked)  # type: ignore[arg-type]
    chunks = batch.chunks
    # All chunks but the student's BOS and the first of the text, which no teacher token precedes.
    assert len(chunks) == sum(len(example.alignment) - 2 for example in picked)
    for index in range(len(chunks)):
        row = int(chunks.sample[index])
        left = batch.student_ids[row, chunks.student_start[index] : chunks.student_end[index]]
        right = batch.teacher_ids[row, chunks.teacher_start[index] : chunks.teacher_end[index]]
        assert student.decode_bytes(left.tolist()) == teacher.decode_bytes(right.tolist())


def test_a_loss_mask_of_an_example_is_kept(examples: list[Example]) -> None:
    example = examples[0]
    mask = np.zeros(len(example.student_ids), dtype=np.bool_)
    mask[5:8] = True
    masked = Example(
        example.student_ids,
        example.teacher_ids,
        mask,
        example.teacher_loss_mask,
        example.alignment,
    )
    batch = DistillCollator()([masked])
    assert torch.equal(batch.student_loss_mask[0], torch.from_numpy(mask))


def test_bad_arguments_of_the_collator_are_refused() -> None:
    with pytest.raises(DataError, match="a batch of 0 examples"):
        DistillCollator()([])
    with pytest.raises(ValueError, match="padding_side = 'top', expected one of right, left"):
        DistillCollator(padding_side="top")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pad_to_multiple_of = 0"):
        DistillCollator(pad_to_multiple_of=0)


def test_an_aligner_can_be_given(tokenizers: tuple, tmp_path: Path) -> None:
    aligner = Aligner(*map(Vocab.from_tokenizer, tokenizers))
    made = make_examples(TEXTS[:2], *tokenizers, max_tokens=50, aligner=aligner)
    again = make_examples(TEXTS[:2], *tokenizers, max_tokens=50)
    assert json.dumps([e.alignment.kind.tolist() for e in made.examples]) == json.dumps(
        [e.alignment.kind.tolist() for e in again.examples]
    )


@pytest.mark.parametrize("name", ["byte_level_bpe", "sentencepiece_bpe", "unigram"])
def test_no_token_that_lies_in_a_prompt_is_learned_however_the_seam_moves_it(name: str) -> None:
    tokenizer = getattr(zoo, name)()
    vocab, encoder = Vocab.from_tokenizer(tokenizer), Encoder(tokenizer)
    moved = 0
    for text in TEXTS[:10]:
        for cut in range(5, min(len(text), 120) - 1, 3):
            prompt, completion = text[:cut], text[cut:]
            if not completion.strip():
                continue
            (found,) = encoder.encode([Completion(prompt, completion)])
            sizes = [len(vocab.token_bytes(token)) for token in found.ids.tolist()]
            ends = np.cumsum(sizes)
            inside = (ends <= ends[-1] - len(completion.encode())) & (np.array(sizes) > 0)
            assert not (found.loss_mask & inside).any(), (prompt, completion)
            alone = tokenizer.encode(prompt).ids
            moved += found.ids.tolist()[: len(alone)] != alone
    assert moved > 5


def test_rows_and_lists_of_messages_are_read_and_what_is_none_is_refused(
    tokenizers: tuple,
) -> None:
    text = TEXTS[0]
    (plain,) = make_examples([text], *tokenizers, max_tokens=None).examples
    rows = [{"text": text}, {"prompt": text[:9], "completion": text[9:]}, {"words": text}]
    made = make_examples(rows[:2], *tokenizers, max_tokens=None).examples
    for example in made:
        assert example.student_ids.tolist() == plain.student_ids.tolist()
    for documents, found in (("abc def", "documents is a str"), ({"text": [text]}, "a dict")):
        with pytest.raises(ArgumentTypeError, match=found):
            make_examples(documents, *tokenizers, max_tokens=None)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"documents\[1\] is a NoneType; pass a text"):
        make_examples([text, None], *tokenizers, max_tokens=None)  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"documents\[2\] has no string in field 'text'"):
        make_examples(rows, *tokenizers, max_tokens=None)
    talk = [{"role": role, "content": text} for role in ("user", "assistant")]
    with pytest.raises(DataError, match="the student's tokenizer has no chat template"):
        make_examples([talk], *tokenizers, max_tokens=None)


def test_rows_that_cannot_be_read_are_left_out_and_named(folder: Path) -> None:
    pair = Pair(folder / "student", folder / "teacher")
    made = pair.examples([{"words": "none"}, TEXTS[0], " "], strict=False)
    assert len(made) == 1
    assert [each.source for each in made.left_out] == ["documents[0]", "documents[2]"]
