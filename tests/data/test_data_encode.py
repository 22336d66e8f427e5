"""Heads of long texts: what is kept is what the whole text gives."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from chat_families import ending, family
from real_texts import TOPICS
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from xtoken.data import Conversation, Encoded, Encoder
from xtoken.data.encode import print_document
from xtoken.errors import ArgumentTypeError, OptionError
from xtoken.vocab.side import Side

PROSE = "\n".join(text for _, text in sorted(TOPICS.items()))
SIZE = 24_000
LONG = {
    name: (unit * (SIZE // len(unit) + 1))[:SIZE]
    for name, unit in {
        "prose": PROSE,
        "one word": "abcdefghij",
        "one letter": "a",
        "spaces": " ",
        "line breaks": "\n",
        "rules": "=" * 300 + "\n",
        "numbers": "".join(map(str, range(7000))),
        "no space": "从教师那里学到了年",
        "combining": "e\u0301",
        "emoji": "👩‍👩‍👧‍👦",
        "prose without spaces": "".join(PROSE.split()),
    }.items()
}
FAMILIES = ("smollm2", "deepseek", "gemma", "mistral", "qwen3")


def first(encoded: Encoded, count: int) -> tuple[list[int], list[bool]]:
    return encoded.ids[:count].tolist(), encoded.loss_mask[:count].tolist()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("case", LONG)
def test_the_head_of_a_long_text_has_the_tokens_of_the_whole(case: str, name: str) -> None:
    encoder = Encoder(family(name).tokenizer)
    (whole,) = encoder.encode([LONG[case]])
    for max_tokens in (2, 32, 500):
        (head,) = encoder.encode([LONG[case]], max_tokens=max_tokens)
        assert first(head, max_tokens + 1) == first(whole, max_tokens + 1)


@pytest.mark.parametrize("name", ["smollm2", "gemma", "qwen3"])
@pytest.mark.parametrize("where", ["question", "answer", "both"])
def test_the_head_of_a_long_conversation_has_the_tokens_mask_and_turns_of_the_whole(
    where: str, name: str
) -> None:
    encoder = Encoder(family(name).tokenizer)
    question = "Why? " + (PROSE[:SIZE] if where != "answer" else "")
    answer = "Because. " + (PROSE[:SIZE] if where != "question" else "")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    talk = Conversation.from_messages(messages)
    printed = [row[0] for row in print_document(talk, [encoder])]
    (whole,) = encoder.encode(printed)
    for max_tokens in (2, 32, 500):
        (head,) = encoder.encode(printed, max_tokens=max_tokens)
        assert len(head.ids) < len(whole.ids)
        cut, expected = head.cut(max_tokens), whole.cut(max_tokens)
        assert first(cut, max_tokens) == first(expected, max_tokens)
        assert cut.turns.tolist() == expected.turns.tolist()
        assert cut.stops.tolist() == expected.stops.tolist()


@pytest.mark.parametrize("splits", [True, False])
def test_unigram_decides_all_tokens_of_a_word_together(splits: bool) -> None:
    """So that the head of a word has other tokens than the word; without a pre-tokenizer all of a
    text is one."""
    rules = [("<unk>", 0.0), ("▁", -3.0), ("=", -4.0), ("==", -4.5), ("===", -4.6), ("=====", -5.0)]
    tokenizer = Tokenizer(models.Unigram([*rules, ("a", -3.0)], 0, False))
    if splits:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    encoder = Encoder(tokenizer)
    for text in ("=" * 5912, "=" * 5912 + " a", "a " + "=" * 7003, "a " * 4000):
        (whole,) = encoder.encode([text])
        (head,) = encoder.encode([text], max_tokens=8)
        assert first(head, 8) == first(whole, 8)


def test_a_text_that_is_not_much_longer_is_tokenized_whole() -> None:
    encoder = Encoder(ending("chatml").tokenizer)
    text = PROSE[:2000]
    (whole,) = encoder.encode([text])
    (same,) = encoder.encode([text], max_tokens=32)
    assert same.ids.tolist() == whole.ids.tolist()


def test_a_line_of_5_mb_costs_what_is_kept_of_it() -> None:
    encoder = Encoder(ending("chatml").tokenizer)
    text = (PROSE * 12)[:5_000_000]
    encoder.encode(["warm"])
    started = time.perf_counter()
    (head,) = encoder.encode([text], max_tokens=32)
    # The whole takes seconds.
    assert time.perf_counter() - started < 0.5
    assert 96 <= len(head.ids) < 2000


WORDS = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Encoder(WORDS).encode("ab"), r"printed is str, expected a list of texts"),
        (lambda: Encoder(WORDS).encode(["a", 5]), r"printed\[1\] is int, expected a list"),
        (lambda: Encoder(WORDS).encode(["a"], max_tokens="2"), r"max_tokens = '2' is out of"),
        (lambda: Encoder(WORDS, date="today"), r"date is str, expected date; pass a datetime"),
        (lambda: Side("student", WORDS).encode("ab"), r"texts is str, expected a list of texts"),
        (lambda: Side("student", WORDS).encode(["a", None]), r"texts\[1\] is NoneType, expected"),
    ],
)
def test_one_text_is_no_list_of_texts_and_other_classes_are_named(
    call: Callable[[], object], message: str
) -> None:
    with pytest.raises((ArgumentTypeError, OptionError), match=message):
        call()


def test_a_text_may_be_of_a_class_of_its_own() -> None:
    encoder = Encoder(family("smollm2").tokenizer)
    texts = ["One line.", "And another of 201."]
    found = encoder.encode([*np.array(texts), *texts])
    assert [first(each, 9) for each in found[:2]] == [first(each, 9) for each in found[2:]]
