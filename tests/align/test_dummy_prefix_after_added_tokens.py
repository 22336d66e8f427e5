"""The space that a tokenizer puts after any added token is a virtual prefix and no difference."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from xtoken import Aligner, Vocab


def plain() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def sentencepiece(scheme: str | None) -> Tokenizer:
    vocab = {"<unk>": 0} | {c: i for i, c in enumerate("▁abcdefghijklmnopqrstuvwxyz<>/", 1)}
    for joined in ("▁the", "▁t", "▁th"):
        vocab[joined] = len(vocab)
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    if scheme is None:
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def with_prefix() -> Tokenizer:
    made = plain()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return made


STUDENTS = {
    "Prepend": lambda: sentencepiece(None),
    "Metaspace always": lambda: sentencepiece("always"),
    "Metaspace first": lambda: sentencepiece("first"),
    "byte level": with_prefix,
}
TEXTS = (
    "so<think>the end",
    "<think>the end</think>so",
    "<think></think>the",
    "so <think> the end",
    "a<think><think>the",
)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", STUDENTS)
def test_a_space_after_an_added_token_is_no_difference(name: str, special: bool) -> None:
    sides = STUDENTS[name](), plain()
    for side in sides:
        side.add_tokens(
            [AddedToken(t, special=special, normalized=False) for t in ("<think>", "</think>")]
        )
    student, teacher = sides
    aligner, mirrored = Aligner(student, teacher), Aligner(teacher, student)
    for text in TEXTS:
        s, t = student.encode(text).ids, teacher.encode(text).ids
        coverage = aligner.align(s, t).coverage
        assert coverage.exact_bytes == coverage.teacher_bytes, text
        coverage = mirrored.align(t, s).coverage
        assert coverage.exact_bytes == coverage.student_bytes, text


@pytest.mark.parametrize("name", STUDENTS)
def test_decoded_bytes_lack_the_space_after_added_text(name: str) -> None:
    tokenizer = STUDENTS[name]()
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    vocab = Vocab.from_tokenizer(tokenizer)
    for text in ("so<think>the end", "<think>so"):
        assert vocab.decode_bytes(tokenizer.encode(text).ids) == text.encode()


def test_a_space_that_the_text_holds_after_added_text_stays_a_difference() -> None:
    student, teacher = sentencepiece(None), plain()
    for side in (student, teacher):
        side.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    s, t = student.encode("<think> the").ids, teacher.encode("<think>the").ids
    coverage = Aligner(student, teacher).align(s, t).coverage
    assert coverage.exact_bytes < coverage.student_bytes


def test_the_fingerprint_of_an_aligner_sees_the_dummy_prefix() -> None:
    first, every = sentencepiece("first"), sentencepiece("always")
    one, other = Aligner(first, plain()), Aligner(every, plain())
    assert one.student_vocab.fingerprint == other.student_vocab.fingerprint
    assert one.fingerprint != other.fingerprint
