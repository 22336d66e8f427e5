"""`Vocab.segment` and W's rows: what the whole tokenizer emits, not its model alone."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import tokenizer_zoo as zoo
from real_texts import TOPICS
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from xtoken import Aligner, Projection, Vocab
from xtoken.align.alignment import ChunkKind
from xtoken.errors import UnsupportedTokenizerError

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def of_merges(merges: list[tuple[str, str]], digits: str) -> Tokenizer:
    vocab = {char: i for i, char in enumerate(ALPHABET)}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(digits), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return made


def test_a_long_number_is_cut_as_the_teachers_pre_tokenizer_cuts_it() -> None:
    teacher = of_merges([("2", "0"), ("2", "3"), ("20", "2")], r"\p{N}{1,3}")
    student = of_merges([("2", "0"), ("2", "3"), ("20", "23")], r"\p{N}+")
    emitted = teacher.encode("2023").ids
    w = Projection.build(student, teacher, decay=0.0, cache_dir=False)
    number = student.token_to_id("2023")
    assert w.token_pieces(number) == emitted
    assert Vocab.from_tokenizer(teacher).segment(b"2023") == emitted
    assert w.indices[w.indptr[number]] == emitted[0]


def llama_like() -> Tokenizer:
    """Byte-level BPE with Llama-3's pattern, whose merges know longer numbers than it emits."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    made = zoo.byte_level_bpe(3000, 4)
    made = Tokenizer.from_str(made.to_str())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return made


def t5_like() -> Tokenizer:
    return zoo.unigram()


def gemma_like() -> Tokenizer:
    """SentencePiece with a space for a space, and added tokens that are text."""
    made = Tokenizer.from_str(zoo.sentencepiece_bpe().to_str())
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("the", "\n\n")])
    return made


def qwen_like() -> Tokenizer:
    made = Tokenizer.from_str(zoo.byte_level_bpe(2500, 1).to_str())
    made.normalizer = normalizers.NFC()
    return made


TEACHERS = {
    "Llama-3": llama_like,
    "DeepSeek": zoo.deepseek,
    "GPT-2's regular expression": lambda: zoo.byte_level_bpe(2000, 2),
    "Qwen": qwen_like,
    "Gemma": gemma_like,
    "Mistral": zoo.mistral,
    "T5": t5_like,
}


@functools.cache
def student() -> Tokenizer:
    """Numbers of any length, words with marks: much that other pre-tokenizers cut."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s?\S+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=6000, initial_alphabet=ALPHABET, special_tokens=["<eos>"], show_progress=False
    )
    numbers = [" ".join(str(n) for n in range(990, 3000))] * 10
    made.train_from_iterator([*TOPICS.values(), *numbers], trainer)
    return made


@pytest.mark.parametrize("name", TEACHERS)
def test_on_real_text_the_first_piece_of_a_row_is_the_teachers_first_token_of_the_chunk(
    name: str,
) -> None:
    teacher = TEACHERS[name]()
    aligner = Aligner(zoo.vocab(student()), zoo.vocab(teacher))
    w = Projection.build(aligner.student_vocab, aligner.teacher_vocab, cache_dir=False)
    compared = 0
    texts = [*list(TOPICS.values())[:25], "in 2023, 1999 of 2004's 'default' " * 20]
    for text in texts:
        encoded = teacher.encode(text, add_special_tokens=False)
        s, t, words = student().encode(text).ids, encoded.ids, [None, *encoded.word_ids, None]
        cuts = len(set(words)) > 9
        chunks = aligner.align(s, t)
        ends = itertools.pairwise(chunks.student_bounds.tolist())
        of_teacher = itertools.pairwise(chunks.teacher_bounds.tolist())
        for (start, end), (at, to), kind in zip(
            ends, of_teacher, chunks.kind.tolist(), strict=True
        ):
            # Within a word what surrounds a chunk decides too, which no row can know.
            whole = not cuts or (words[at] != words[at + 1] and words[to] != words[to + 1])
            pieces = w.token_pieces(s[start]) if end == start + 1 and whole else []
            token = aligner.student_vocab.token_bytes(s[start]) if pieces else b""
            # Not where the teacher puts a space of its own.
            own = at < to and token.startswith(aligner.teacher_vocab.token_bytes(t[at]))
            if kind == int(ChunkKind.EXACT) and len(pieces) > 1 and own:
                assert pieces[0] == t[at], (text[:60], token)
                compared += 1
    assert compared > 100


@pytest.mark.parametrize("name", TEACHERS)
def test_pieces_are_what_the_tokenizer_emits_inside_a_text(name: str) -> None:
    teacher = TEACHERS[name]()
    vocab, words = zoo.vocab(teacher), zoo.vocab(student())
    compared = split = 0
    for token_id in range(0, len(words), 3):
        token = words.token_bytes(token_id)
        # After a letter and a line break nothing joins what follows, and no dummy prefix is put.
        if not token or token[:1] in b"\n\r\t\x0b\x0c\x1c\x1d\x1e\x1f\x85" or not is_text(token):
            continue
        before = teacher.encode("a\nb.", add_special_tokens=False).ids
        emitted = teacher.encode("a\nb." + token.decode(), add_special_tokens=False).ids
        if emitted[: len(before)] != before:
            continue
        rest = emitted[len(before) :]
        if b"".join(vocab.token_bytes(i) for i in rest) == token:
            assert zoo.same_pieces(teacher, vocab.segment(token), rest), token
            compared += 1
            split += len(rest) > 1
    assert compared > 300
    assert split > 100


def is_text(token: bytes) -> bool:
    try:
        return bool(token.decode())
    except UnicodeDecodeError:
        return False


def test_no_space_of_its_own_is_put_inside_a_text() -> None:
    for made in (pre_tokenizers.Metaspace(), pre_tokenizers.Metaspace(prepend_scheme="first")):
        tokenizer = Tokenizer.from_str(zoo.sentencepiece_bpe().to_str())
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = made
        vocab = Vocab.from_tokenizer(tokenizer)
        pieces = vocab.segment(b"the cat")
        assert pieces is not None
        assert b"".join(map(vocab.token_bytes, pieces)) == b"the cat"
    level = Tokenizer.from_str(zoo.byte_level_bpe(2000, 2).to_str())
    level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    vocab = Vocab.from_tokenizer(level)
    pieces = vocab.segment(b"zzz qqq")
    assert pieces is not None
    assert b"".join(map(vocab.token_bytes, pieces)) == b"zzz qqq"


def test_text_that_the_normalizer_changes_goes_to_the_model_as_bytes() -> None:
    teacher = qwen_like()
    vocab = Vocab.from_tokenizer(teacher)
    decomposed = "e\u0301".encode()
    pieces = vocab.segment(decomposed)
    assert pieces is not None
    assert b"".join(map(vocab.token_bytes, pieces)) == decomposed


def test_added_text_is_matched_before_the_model_sees_the_rest() -> None:
    tokenizer = gemma_like()
    vocab = Vocab.from_tokenizer(tokenizer)
    for text in ("xthex", "\n\n\n", "the\n\nthe", " the"):
        assert vocab.segment(text.encode()) == tokenizer.encode(text).ids, text


def test_the_model_fingerprint_sees_the_pre_tokenizer_and_not_how_it_is_written() -> None:
    two, three = (of_merges([("2", "0")], rf"\p{{N}}{{1,{n}}}") for n in (2, 3))
    one, other = Vocab.from_tokenizer(two), Vocab.from_tokenizer(three)
    assert one.fingerprint == other.fingerprint
    assert one.model_fingerprint != other.model_fingerprint
    nested = Tokenizer.from_str(two.to_str())
    nested.pre_tokenizer = pre_tokenizers.Sequence([nested.pre_tokenizer])
    assert Vocab.from_tokenizer(nested).model_fingerprint == one.model_fingerprint


def test_a_rank_file_is_cut_by_the_pattern_that_is_given() -> None:
    tokens = [bytes([byte]) for byte in range(256)] + [b"20", b"23", b"202"]
    plain = Vocab.from_tokens(tokens, ranked=True)
    cut = Vocab.from_tokens(tokens, ranked=True, pattern=r"\p{N}{1,3}|[^\p{N}]+")
    assert plain.segment(b"2023") == [256, 257]
    assert cut.segment(b"2023") == [258, ord("3")]
    assert cut.segment(b"\xff2023") == [0xFF, 256, 257]
    assert cut.model_fingerprint != plain.model_fingerprint
    with pytest.raises(UnsupportedTokenizerError, match="pre-tokenizer"):
        Vocab.from_tokens(tokens, ranked=True, pattern="(")


def test_a_tiktoken_encoding_brings_its_pattern() -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"20": 256, b"23": 257, b"202": 258}
    pattern = r"\p{N}{1,3}|[^\p{N}]+"
    encoding = tiktoken.Encoding(
        "small", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|eos|>": 259}
    )
    vocab = Vocab.from_tokenizer(encoding)
    for text in ("2023", "in 2023.", "202320"):
        assert vocab.segment(text.encode()) == encoding.encode(text)


def test_a_pre_tokenizer_that_cannot_be_read_leaves_the_tokens_and_refuses_to_segment() -> None:
    text = of_merges([("2", "0")], r"\p{N}{1,3}").to_str()
    vocab = Vocab.from_tokenizer_json(text.replace("p{N}{1,3}", "p{N").encode())
    assert vocab.token_bytes(256) == b"20"
    with pytest.raises(UnsupportedTokenizerError, match="pre-tokenizer"):
        vocab.segment(b"20")


def test_every_row_spells_its_token() -> None:
    for name in TEACHERS:
        teacher = zoo.vocab(TEACHERS[name]())
        w = Projection.build(student(), teacher, cache_dir=False)
        assert w.student is not None
        for token_id in range(0, len(w.student), 7):
            if pieces := w.token_pieces(token_id):
                spelled = b"".join(teacher.token_bytes(piece) for piece in pieces)
                assert spelled == w.student.token_bytes(token_id)
        assert np.isfinite(w.weights).all()
