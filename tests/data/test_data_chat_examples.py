"""Conversations under two tokenizers with two chat templates: alignment, masks, losses."""

from __future__ import annotations

import functools
import itertools
import unicodedata
from typing import Any

import numpy as np
import pytest
import torch
from chat_families import family
from test_data_chat_template import CONTENTS, conversation

from xtoken import Aligner, ChunkKind, Vocab
from xtoken.data import Conversation, Example, make_examples
from xtoken.distillation import DistillCollator
from xtoken.errors import DataError
from xtoken.pair import Pair
from xtoken.tensors.chunks import ChunkBatch
from xtoken.training import DistillConfig

PAIRS = [
    ("smollm2", "deepseek"),
    ("llama3", "smollm2"),
    ("gemma", "llama3"),
    ("mistral", "deepseek"),
    ("qwen3", "llama3"),
    ("llama3", "qwen3"),
]
# Contents without white space around them, which some templates trim.
TIDY = [name for name in CONTENTS if name != "white space"]


@functools.cache
def vocab(name: str) -> Vocab:
    return Vocab.from_tokenizer(family(name).tokenizer)


@functools.cache
def aligner(student: str, teacher: str) -> Aligner:
    return Aligner(vocab(student), vocab(teacher))


def examples(
    pair: tuple[str, str], *talks: Conversation | str, max_tokens: int = 4000
) -> list[Example]:
    student, teacher = (family(name).tokenizer for name in pair)
    return make_examples(
        talks, student, teacher, max_tokens=max_tokens, aligner=aligner(*pair)
    ).examples


def usable(example: Example) -> ChunkBatch:
    masks = example.student_loss_mask, example.teacher_loss_mask
    chunks = ChunkBatch.from_alignments([example.alignment])
    return chunks.usable(*(torch.from_numpy(mask)[None] for mask in masks))


@functools.cache
def examples_of_cases(pair: tuple[str, str]) -> dict[str, list[Example]]:
    """Those of all contents, made in one go."""
    system = None if "gemma" in pair else "Be brief and honest."
    # Qwen3's normalizer composes characters that the other side has loose.
    form = "NFC" if "qwen3" in pair else None
    cases = {
        case: [unicodedata.normalize(form, content) if form else content for content in contents]
        for case, contents in CONTENTS.items()
    }
    found = iter(examples(pair, *(conversation(item, system=system) for item in cases.values())))
    answers = {case: len(contents) // 2 if form else 1 for case, contents in cases.items()}
    made = {case: list(itertools.islice(found, count)) for case, count in answers.items()}
    assert next(found, None) is None
    return made


def compared_text(example: Example, student: str) -> str:
    """What the student says in chunks of text that a loss counts."""
    chunks = usable(example)
    # An end of turn among them would make the space after it a dummy prefix.
    chunks = chunks.select(chunks.kind == int(ChunkKind.EXACT))
    ids: list[int] = []
    for start, end in zip(chunks.student_start, chunks.student_end, strict=True):
        ids += example.student_ids[start:end].tolist()
    return vocab(student).decode_bytes(ids).decode()


def answers(contents: list[str]) -> list[str]:
    return contents[1::2]


@pytest.mark.parametrize("case", TIDY)
@pytest.mark.parametrize("pair", PAIRS)
def test_all_that_the_assistant_says_is_in_chunks_that_a_loss_counts(
    pair: tuple[str, str], case: str
) -> None:
    found = examples_of_cases(pair)[case]
    said = "".join(compared_text(example, pair[0]) for example in found)
    expected = "".join(answers(CONTENTS[case]))
    if "qwen3" in pair:
        expected = unicodedata.normalize("NFC", expected)
    if pair[0] == "mistral":  # a space that its template puts before each answer
        said, expected = said.replace(" ", ""), expected.replace(" ", "")
    assert said == expected


@pytest.mark.parametrize("pair", PAIRS)
def test_where_a_template_trims_an_answer_only_its_edges_are_lost(pair: tuple[str, str]) -> None:
    contents = ["go", "\n\n  one two three four \n\n", "on", "\tfive six seven   "]
    found = examples(pair, conversation(contents))
    said = " ".join(compared_text(example, pair[0]) for example in found)
    assert {"two", "three", "six"} <= set(said.split())


@pytest.mark.parametrize("case", CONTENTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_chunks_tile_both_sides_and_cross_no_edge_of_a_turn(
    pair: tuple[str, str], case: str
) -> None:
    student, teacher = map(vocab, pair)
    for example in examples_of_cases(pair)[case]:
        for ids, mask, bounds in (
            (example.student_ids, example.student_loss_mask, example.alignment.student_bounds),
            (example.teacher_ids, example.teacher_loss_mask, example.alignment.teacher_bounds),
        ):
            assert (bounds[0], bounds[-1]) == (0, len(ids))
            assert (np.diff(bounds) >= 0).all()
            edges = np.flatnonzero(np.diff(mask.astype(int))) + 1
            assert set(edges.tolist()) <= set(bounds.tolist())
        alignment = example.alignment
        for chunk in np.flatnonzero(alignment.kind == ChunkKind.EXACT):
            left = alignment.student_bounds[chunk : chunk + 2]
            right = alignment.teacher_bounds[chunk : chunk + 2]
            sides = (
                student.decode_bytes(example.student_ids[slice(*left)].tolist()),
                teacher.decode_bytes(example.teacher_ids[slice(*right)].tolist()),
            )
            # A SentencePiece tokenizer's own space before the first word counts as nothing.
            assert len({side.removeprefix(b" ") for side in sides}) == 1


def test_an_end_of_turn_is_paired_with_the_other_sides() -> None:
    (example,) = examples(("smollm2", "deepseek"), conversation(CONTENTS["several turns"]))
    alignment = example.alignment
    special = np.flatnonzero(alignment.kind == ChunkKind.SPECIAL)
    starts = alignment.student_bounds[special], alignment.teacher_bounds[special]
    said = example.student_loss_mask[starts[0]]
    assert example.teacher_loss_mask[starts[1]].tolist() == said.tolist()
    ends = [
        tokenizer.convert_ids_to_tokens(ids[starts][said].tolist())
        for tokenizer, ids, starts in zip(
            [family(name).tokenizer for name in ("smollm2", "deepseek")],
            [example.student_ids, example.teacher_ids],
            starts,
            strict=True,
        )
    ]
    assert ends == [["<|im_end|>"] * 3, ["<｜end▁of▁sentence｜>"] * 3]


def test_turns_are_aligned_with_turns_where_whole_sequences_are_not() -> None:
    pair = ("smollm2", "deepseek")
    (example,) = examples(pair, conversation(CONTENTS["one word"]))
    whole = aligner(*pair).align(example.student_ids, example.teacher_ids)
    loose = Example(
        example.student_ids,
        example.teacher_ids,
        example.student_loss_mask,
        example.teacher_loss_mask,
        whole,
    )
    assert compared_text(example, "smollm2") == "assistantuseruser"
    assert len(usable(loose)) < len(usable(example))


def test_a_template_that_drops_thoughts_makes_an_example_for_each_answer_on_both_sides() -> None:
    contents = CONTENTS["several turns"]
    for pair in (("llama3", "qwen3"), ("qwen3", "llama3"), ("smollm2", "qwen3")):
        found = examples(pair, conversation(contents))
        assert [compared_text(example, pair[0]) for example in found] == answers(contents)


def test_texts_and_conversations_keep_their_order() -> None:
    pair = ("smollm2", "llama3")
    talks = [conversation(CONTENTS["plain"]), conversation(CONTENTS["code"])]
    mixed = examples(pair, "A text.", talks[0], "Another text.", talks[1], talks[0])
    alone = [examples(pair, item)[0] for item in ("A text.", talks[0], "Another text.", talks[1])]
    for found, expected in zip(mixed, [*alone, alone[1]], strict=True):
        assert found.student_ids.tolist() == expected.student_ids.tolist()
        assert found.student_loss_mask.tolist() == expected.student_loss_mask.tolist()
        assert found.alignment == expected.alignment


@pytest.mark.parametrize("max_tokens", [2, 10, 30, 40, 60, 75])
def test_a_conversation_is_cut_where_both_sides_fit_and_counts_as_empty_without_an_answer(
    max_tokens: int,
) -> None:
    pair = ("llama3", "smollm2")
    talk = conversation(CONTENTS["several turns"], system="Be brief.")
    (whole,) = examples(pair, talk)
    assert len(whole.student_ids) > 40
    tokenizers = (family(name).tokenizer for name in pair)
    made = make_examples(
        ["A text.", talk], *tokenizers, max_tokens=max_tokens, aligner=aligner(*pair)
    )
    first_answer = int(whole.student_loss_mask.argmax())
    assert len(made) + made.empty == 2
    fits = [
        bound[0]
        for bound in zip(
            whole.alignment.student_bounds, whole.alignment.teacher_bounds, strict=True
        )
        if max(bound) <= max_tokens
    ]
    if fits[-1] <= first_answer:
        assert made.empty == 1
        return
    cut = made[1]
    length = len(cut.student_ids)
    assert length == fits[-1]
    assert len(cut.teacher_ids) <= max_tokens
    assert cut.student_ids.tolist() == whole.student_ids[:length].tolist()
    assert cut.student_loss_mask.tolist() == whole.student_loss_mask[:length].tolist()
    chunks = int(np.searchsorted(whole.alignment.student_bounds, length, side="right"))
    assert len(usable(cut)) == len(
        [end for end in usable(whole).student_end.tolist() if end <= length]
    )
    assert len(cut.alignment) <= chunks


def test_conversations_of_which_no_answer_fits_are_refused() -> None:
    tokenizers = (family(name).tokenizer for name in ("smollm2", "llama3"))
    with pytest.raises(DataError, match="none of 1 examples has a student token in the loss"):
        make_examples([conversation(CONTENTS["plain"])], *tokenizers, max_tokens=5)


def test_progress_counts_documents_and_not_their_examples() -> None:
    seen: list[tuple[int, int]] = []
    pair = ("qwen3", "llama3")
    talks = [conversation(CONTENTS["several turns"])] * 300
    made = make_examples(
        talks,
        *(family(name).tokenizer for name in pair),
        max_tokens=400,
        aligner=aligner(*pair),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert len(made) == 900
    assert seen == [(256, 300), (300, 300)]


@functools.cache
def pair() -> Pair:
    return Pair(family("llama3").tokenizer, family("qwen3").tokenizer)


@pytest.mark.parametrize("loss", ["prefix-kl", "p-kl", "h-kl", "gold", "uld", "ce"])
def test_what_the_assistant_does_not_say_has_exactly_no_gradient(loss: Any) -> None:
    found = examples(
        ("llama3", "qwen3"),
        conversation(CONTENTS["several turns"], system="Be brief."),
        conversation(CONTENTS["code"]),
    )
    batch = DistillCollator()(found)
    distiller = DistillConfig(loss=loss, top_k=64, teacher_top_k=None).distiller(pair())
    rows, columns = pair().sizes
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*batch.student_ids.shape, rows, generator=generator)
    logits.requires_grad_()
    signal = torch.randn(*batch.teacher_ids.shape, columns, generator=generator)
    distiller(logits, None if loss == "ce" else signal, batch).loss.backward()
    assert logits.grad is not None
    predictors = torch.zeros_like(batch.student_loss_mask)
    predictors[:, :-1] = batch.student_loss_mask[:, 1:]
    has_gradient = logits.grad.abs().amax(-1) > 0
    # Cross-entropy learns all that is said, the end of each turn included.
    assert torch.equal(has_gradient, predictors)
