"""Span alignment: its laws on real tokenizers, its twins, its limits and its errors."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tokenizer_zoo
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import xtoken
from xtoken import Aligner, Alignment, ChunkKind, Vocab
from xtoken.errors import ArgumentTypeError

from reference_alignment import finest_chunks, most_exact_bytes

ZOO = {
    "deepseek": tokenizer_zoo.deepseek,
    "byte_level": tokenizer_zoo.byte_level_bpe,
    "sentencepiece": tokenizer_zoo.mistral,
    "unigram": tokenizer_zoo.unigram,
}
PAIRS = [(s, t) for s in ZOO for t in ZOO]

_aligners: dict[tuple[str, str], Aligner] = {}


def aligner_of(student: str, teacher: str) -> Aligner:
    key = (student, teacher)
    if key not in _aligners:
        vocabs = (tokenizer_zoo.vocab(ZOO[side]()) for side in key)
        _aligners[key] = Aligner(*vocabs, threads=1)
    return _aligners[key]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def side_bytes(vocab: Vocab, ids: list[int]) -> bytes:
    return b"".join(vocab.token_bytes(token_id) for token_id in ids)


def check_laws(
    alignment: Alignment, aligner: Aligner, student: list[int], teacher: list[int]
) -> None:
    """What holds for any input: chunks tile, and each is what its kind says."""
    for bounds, ids in (
        (alignment.student_bounds, student),
        (alignment.teacher_bounds, teacher),
    ):
        assert bounds.dtype == np.int64
        assert bounds[0] == 0
        assert bounds[-1] == len(ids)
        assert (np.diff(bounds) >= 0).all()
    exact = 0
    for chunk, kind in enumerate(alignment.kind.tolist()):
        s = student[alignment.student_bounds[chunk] : alignment.student_bounds[chunk + 1]]
        t = teacher[alignment.teacher_bounds[chunk] : alignment.teacher_bounds[chunk + 1]]
        left, right = side_bytes(aligner.student_vocab, s), side_bytes(aligner.teacher_vocab, t)
        if kind == ChunkKind.EXACT:
            assert s
            assert t
            assert left == right or _but_for_a_dummy_prefix(aligner, left, right)
            exact += min(len(left), len(right))
        elif kind == ChunkKind.MISMATCH:
            assert left
            assert right
        elif kind == ChunkKind.STUDENT_ONLY:
            assert (len(s), len(t)) == (1, 0)
        elif kind == ChunkKind.TEACHER_ONLY:
            assert (len(s), len(t)) == (0, 1)
        else:
            assert kind == ChunkKind.SPECIAL
            assert (s[0], t[0]) in aligner.role_pairs
    assert alignment.coverage.exact_bytes == exact


def _but_for_a_dummy_prefix(aligner: Aligner, left: bytes, right: bytes) -> bool:
    student_may = aligner.student_vocab.dummy_prefix != "never"
    teacher_may = aligner.teacher_vocab.dummy_prefix != "never"
    return (student_may and left == b" " + right) or (teacher_may and right == b" " + left)


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_real_text_keeps_the_laws_whatever_the_tokenizers(
    student: str, teacher: str, texts: dict[str, str]
) -> None:
    aligner = aligner_of(student, teacher)
    for text in texts.values():
        s, t = encode(ZOO[student](), text[:4000]), encode(ZOO[teacher](), text[:4000])
        check_laws(aligner.align(s, t), aligner, s, t)


def test_equal_bytes_get_the_finest_common_segmentation(texts: dict[str, str]) -> None:
    aligner = aligner_of("deepseek", "byte_level")
    for name, text in texts.items():
        s, t = encode(tokenizer_zoo.deepseek(), text), encode(tokenizer_zoo.byte_level_bpe(), text)
        alignment = aligner.align(s, t)
        expected = finest_chunks(
            [aligner.student_vocab.token_bytes(i) for i in s],
            [aligner.teacher_vocab.token_bytes(i) for i in t],
        )
        bounds_s, bounds_t = alignment.student_bounds.tolist(), alignment.teacher_bounds.tolist()
        got = list(zip(bounds_s, bounds_s[1:], bounds_t, bounds_t[1:], strict=False))
        assert got == expected, name
        assert (alignment.kind == ChunkKind.EXACT).all(), name


def test_the_dummy_prefix_makes_no_mismatch(texts: dict[str, str]) -> None:
    aligner = aligner_of("sentencepiece", "deepseek")
    for name in ("english", "maths", "chinese", "emoji"):
        # A literal ▁ would become a space: a real difference.
        text = texts[name].replace("▁", "_")
        s = encode(tokenizer_zoo.mistral(), text)
        t = encode(tokenizer_zoo.deepseek(), text)
        coverage = aligner.align(s, t).coverage
        assert coverage.exact_bytes == len(text.encode()), name
        assert coverage.student_byte_share == coverage.teacher_byte_share == 1.0, name


def test_the_dummy_prefix_after_a_special_token_makes_no_mismatch() -> None:
    # Llama-2's tokenizers put a space before each part of the text between special tokens.
    mistral, deepseek = tokenizer_zoo.mistral(), tokenizer_zoo.deepseek()
    parts = ["one", "two  words", " three", "\tfour", "5"]
    s = encode(mistral, "</s>".join(parts))
    t = encode(deepseek, "<｜end▁of▁sentence｜>".join(parts))
    aligner = aligner_of("sentencepiece", "deepseek")
    alignment = aligner.align(s, t)
    check_laws(alignment, aligner, s, t)
    assert ChunkKind.MISMATCH not in alignment.kind
    assert alignment.kind.tolist().count(ChunkKind.SPECIAL) == 4
    # Where no word takes the space in, a token of its own holds it, and nothing else.
    alone = alignment.student_bounds[:-1][alignment.kind == ChunkKind.STUDENT_ONLY]
    assert [mistral.id_to_token(s[at]) for at in alone] == ["▁"] * 3
    assert alignment.coverage.exact_bytes == len("".join(parts))
    assert alignment.coverage.student_byte_share == alignment.coverage.teacher_byte_share == 1.0
    # The same where the teacher has no marker: only the student's markers stand alone.
    alignment = aligner.align(s, [i for part in parts for i in encode(deepseek, part)])
    assert set(alignment.kind) == {ChunkKind.EXACT, ChunkKind.STUDENT_ONLY}
    assert alignment.coverage.exact_bytes == len("".join(parts))


def test_a_space_after_an_unknown_token_is_text() -> None:
    student, teacher = tokenizer_zoo.sentencepiece_bpe(3000, False), tokenizer_zoo.deepseek()
    text = "the import 語 statement 語語 of 語"
    s, t = encode(student, text), encode(teacher, text)
    assert student.token_to_id("<unk>") in s
    aligner = Aligner(tokenizer_zoo.vocab(student), tokenizer_zoo.vocab(teacher))
    alignment = aligner.align(s, t)
    check_laws(alignment, aligner, s, t)
    assert aligner.student_vocab.decode_bytes(s).decode() == text.replace("語", "")
    assert alignment.coverage.exact_bytes == len(text.replace("語", ""))
    assert alignment.coverage.student_byte_share == 1.0


def test_a_bos_on_one_side_changes_nothing_else(texts: dict[str, str]) -> None:
    tokenizer = tokenizer_zoo.byte_level_bpe()
    aligner = aligner_of("byte_level", "deepseek")
    s, t = encode(tokenizer, texts["english"]), encode(tokenizer_zoo.deepseek(), texts["english"])
    plain = aligner.align(s, t)
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    with_bos = aligner.align([bos, *s], t)
    assert with_bos.kind[0] == ChunkKind.STUDENT_ONLY
    np.testing.assert_array_equal(with_bos.kind[1:], plain.kind)
    np.testing.assert_array_equal(with_bos.student_bounds[1:], plain.student_bounds + 1)
    np.testing.assert_array_equal(with_bos.teacher_bounds[1:], plain.teacher_bounds)


def test_specials_of_one_role_are_paired_unless_told_otherwise() -> None:
    student = Vocab.from_tokens([b"", b"", b"a"], {0: "<s>", 1: "</s>"})
    teacher = Vocab.from_tokens([b"a", b"", b"", b""], {1: "<bos>", 2: "<eos>", 3: "<pad>"})
    s, t = [0, 2, 1], [1, 0, 3, 2]
    paired = Aligner(student, teacher)
    assert paired.role_pairs == [(0, 1), (1, 2)]
    assert paired.align(s, t).kind.tolist() == [
        ChunkKind.SPECIAL,
        ChunkKind.EXACT,
        ChunkKind.TEACHER_ONLY,
        ChunkKind.SPECIAL,
    ]
    unpaired = Aligner(student, teacher, role_pairs=[]).align(s, t)
    assert unpaired.kind.tolist() == [2, 3, 0, 2, 3, 3]
    overridden = Aligner(student, teacher, role_pairs=[(1, 3)]).align(s, t)
    assert overridden.kind.tolist() == [2, 3, 0, 4, 3]


def test_a_difference_stays_local() -> None:
    vocab = Vocab.from_tokens([bytes([b]) for b in range(256)])
    aligner = Aligner(vocab, vocab)
    left = b"the quick brown fox jumps over the lazy dog, again and again and again, until night"
    right = left.replace(b"brown", b"red")
    alignment = aligner.align(list(left), list(right))
    kinds = alignment.kind.tolist()
    assert kinds[:10] == [ChunkKind.EXACT] * 10
    assert kinds[-60:] == [ChunkKind.EXACT] * 60
    assert alignment.coverage.exact_bytes >= len(left) - len("brown")


def test_empty_sides_give_the_documented_answers() -> None:
    vocab = Vocab.from_tokens([b"a", b"b"])
    aligner = Aligner(vocab, vocab)
    assert len(aligner.align([], [])) == 0
    assert aligner.align([], []).coverage.student_byte_share == 1.0
    assert aligner.align([0, 1], []).kind.tolist() == [ChunkKind.STUDENT_ONLY] * 2
    assert aligner.align([], [0]).kind.tolist() == [ChunkKind.TEACHER_ONLY]
    assert len(aligner.align_batch([], [])) == 0


def small() -> Aligner:
    vocab = Vocab.from_tokens([b"a", b"ab", b"b", b"c"])
    return Aligner(vocab, vocab)


def test_all_forms_of_a_batch_agree() -> None:
    aligner = small()
    student, teacher = [[0, 2, 3], [1], []], [[1, 3], [0, 2], []]
    expected = aligner.align_batch(student, teacher)
    s = np.array([[0, 2, 3], [1, 9, 9], [9, 9, 9]])
    t = np.array([[1, 3], [0, 2], [9, 9]])
    masks = {"student_mask": s != 9, "teacher_mask": t != 9}
    assert aligner.align_batch(s, t, **masks) == expected
    lengths: dict[str, Any] = {"student_lengths": [3, 1, 0], "teacher_lengths": np.array([2, 2, 0])}
    assert aligner.align_batch(s, t, **lengths) == expected
    flat = aligner.align_batch(
        np.array([0, 2, 3, 1]),
        np.array([1, 3, 0, 2]),
        student_indptr=[0, 3, 4, 4],
        teacher_indptr=np.array([0, 2, 4, 4]),
    )
    assert flat == expected
    one_by_one = [aligner.align(s, t) for s, t in zip(student, teacher, strict=True)]
    assert list(expected) == one_by_one
    assert xtoken.AlignmentBatch.stack(one_by_one) == expected
    assert expected.coverage == sum(
        (alignment.coverage for alignment in one_by_one[1:]), one_by_one[0].coverage
    )


def test_padding_on_the_left_moves_only_the_chunk_ids() -> None:
    aligner = small()
    s, t = np.array([[9, 0, 2], [9, 9, 3]]), np.array([[1, 9], [3, 9]])
    batch = aligner.align_batch(s, t, student_mask=s != 9, teacher_mask=t != 9)
    assert list(batch) == list(aligner.align_batch([[0, 2], [3]], [[1], [3]]))
    assert batch.student_chunk_ids().tolist() == [[-1, 0, 0], [-1, -1, 0]]
    assert batch.teacher_chunk_ids(width=3).tolist() == [[0, -1, -1], [0, -1, -1]]
    with pytest.raises(xtoken.ShapeError, match="width = 2 where 3 is needed"):
        batch.student_chunk_ids(width=2)


def test_chunk_ids_and_shapes_can_be_asked_for_by_kind() -> None:
    alignment = small().align([0, 2, 3, 0], [1, 2, 0])
    assert alignment.kind.tolist() == [ChunkKind.EXACT, ChunkKind.MISMATCH, ChunkKind.EXACT]
    assert alignment.student_chunk_ids().tolist() == [0, 0, 1, 2]
    assert alignment.teacher_chunk_ids([ChunkKind.EXACT]).tolist() == [0, -1, 2]
    assert alignment.shapes() == {(1, 1): 2, (2, 1): 1}
    assert alignment.shapes([ChunkKind.MISMATCH]) == {(1, 1): 1}


def test_tensors_hold_what_the_arrays_hold() -> None:
    torch = pytest.importorskip("torch")
    alignment = small().align([0, 2], [1])
    tensors = alignment.to_torch()
    assert set(tensors) == {"student_bounds", "teacher_bounds", "kind", "byte_counts"}
    assert tensors["student_bounds"].dtype == torch.int64
    assert tensors["student_bounds"].tolist() == [0, 2]


def test_the_thread_count_changes_nothing(texts: dict[str, str]) -> None:
    aligner = aligner_of("sentencepiece", "deepseek")
    # Enough tokens that threads are used at all, in sequences of very different lengths.
    pieces = [*(text[:600] for text in texts.values()), texts["english"], ""] * 12
    student = [encode(tokenizer_zoo.mistral(), text) for text in pieces]
    teacher = [encode(tokenizer_zoo.deepseek(), text) for text in pieces]
    assert sum(map(len, student + teacher)) > 2**18
    expected = aligner.align_batch(student, teacher, threads=1)
    for threads in (2, 3, 7):
        assert aligner.align_batch(student, teacher, threads=threads) == expected
    assert Aligner(aligner.student_vocab, aligner.teacher_vocab).align_batch(student, teacher) == (
        expected
    )


def test_an_aligner_is_picklable_and_keeps_its_options() -> None:
    student = Vocab.from_tokens([b"", b"a"], {0: "<s>"})
    aligner = Aligner(student, student, role_pairs=[], threads=3)
    copy = pickle.loads(pickle.dumps(aligner))
    assert copy.role_pairs == []
    assert copy.threads == 3
    assert copy.align([0, 1], [0, 1]) == aligner.align([0, 1], [0, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: a.align([4], [0]), xtoken.TokenIdError, r"student_ids\[0\] = 4 .*V = 4"),
        (lambda a: a.align([0], [0, -1]), xtoken.TokenIdError, r"teacher_ids\[1\] = -1 "),
        (
            lambda a: a.align([0], [0, 2**24 - 1]),
            xtoken.TokenIdError,
            r"teacher_ids\[1\] = 16777215",
        ),
        (
            lambda a: a.align_batch([[0], [0, 9]], [[0], [0]]),
            xtoken.TokenIdError,
            r"student_ids\[1, 1\] = 9",
        ),
        (lambda a: a.align([0.5], [0]), ArgumentTypeError, "student_ids is of dtype float64"),
        (lambda a: a.align(["a"], [0]), ArgumentTypeError, "student_ids is of dtype <U1"),
        (lambda a: a.align([2**63], [0]), ArgumentTypeError, "student_ids has 9223372036854775808"),
        (
            lambda a: a.align_batch([[2**63]], [[0]]),
            ArgumentTypeError,
            "ids has 9223372036854775808",
        ),
        (
            lambda a: a.align(np.array([0], np.int32), [0]),
            ArgumentTypeError,
            "student_ids is of dtype int32 where int64",
        ),
        (
            lambda a: a.align([0], np.arange(4)[::2]),
            xtoken.ShapeError,
            "teacher_ids has gaps",
        ),
        (lambda a: a.align([[0]], [0]), xtoken.ShapeError, "2 dimensions where 1"),
        (lambda a: a.align([[0], [0, 1]], [0]), xtoken.ShapeError, "different lengths"),
        (lambda a: a.align_batch([[0], [0]], [[0]]), xtoken.ShapeError, "1 where 2 was expected"),
        (
            lambda a: a.align_batch([[0, 0], [0]], [[0], [0]], student_mask=[[1, 1], [1, 0]]),
            xtoken.ShapeError,
            "different lengths",
        ),
        (
            lambda a: a.align_batch([[0, 0, 0]], [[0]], student_mask=[[1, 0, 1]]),
            xtoken.ShapeError,
            r"student_mask\[0, 1\] is a hole",
        ),
        (
            lambda a: a.align_batch([[0, 0]], [[0]], student_mask=[[1]]),
            xtoken.ShapeError,
            r"student_mask has shape \[1, 1\] where student_ids has \[1, 2\]",
        ),
        (
            lambda a: a.align_batch([[0, 0], [0, 0]], [[0], [0]], student_mask=[[1, 1], [1]]),
            xtoken.ShapeError,
            r"student_mask has rows of other lengths where student_ids has \[2, 2\]",
        ),
        (
            lambda a: a.align_batch([[0]], [[0]], student_mask=[["yes"]]),
            ArgumentTypeError,
            "student_mask is of dtype <U3, expected booleans or 0 and 1",
        ),
        (
            lambda a: a.align_batch([[0, 0]], [[0]], student_lengths=[3]),
            xtoken.ShapeError,
            r"student_lengths\[0\] = 3 is outside 0..2",
        ),
        (
            lambda a: a.align_batch([[0, 0]], [[0]], student_lengths=[1, 1]),
            xtoken.ShapeError,
            "student_lengths has 2 entries",
        ),
        (
            lambda a: a.align_batch([0, 0], [[0]], student_indptr=[0, 3]),
            xtoken.ShapeError,
            "student_indptr does not rise from 0 to the 2 ids",
        ),
        (
            lambda a: a.align_batch([0, 0], [[0]], student_indptr=[0, 2, 1, 2]),
            xtoken.ShapeError,
            "student_indptr",
        ),
        (
            lambda a: a.align_batch([[0]], [[0]], student_mask=[[1]], student_lengths=[1]),
            xtoken.OptionError,
            "exclude one another",
        ),
        (lambda a: a.align_batch([[0]], [[0]], threads=0), xtoken.OptionError, "threads = 0"),
        (
            lambda a: Aligner(a.student_vocab, a.student_vocab, role_pairs=[(0, 0)]),
            xtoken.OptionError,
            "role_pairs = student id 0",
        ),
        (
            lambda a: Aligner(a.student_vocab, a.student_vocab, role_pairs=[(9, 0)]),
            xtoken.TokenIdError,
            "token id 9 is outside",
        ),
        (lambda a: Aligner(3, a.student_vocab), TypeError, "int is not a tokenizer"),
    ],
)
def test_bad_input_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(small())


def test_whole_characters_can_be_asked_for(texts: dict[str, str]) -> None:
    student, teacher = tokenizer_zoo.byte_level_bpe(), tokenizer_zoo.deepseek()
    fine = aligner_of("byte_level", "deepseek")
    whole = Aligner(fine.student_vocab, fine.teacher_vocab, whole_characters=True)
    assert pickle.loads(pickle.dumps(whole)).whole_characters
    assert whole.fingerprint != fine.fingerprint
    joined = 0
    for text in texts.values():
        s, t = encode(student, text), encode(teacher, text)
        alignment = whole.align(s, t)
        bounds = alignment.student_bounds.tolist()
        chunks = [side_bytes(whole.student_vocab, s[start:end]) for start, end in pairwise(bounds)]
        assert "".join(chunk.decode() for chunk in chunks) == text
        assert alignment.coverage.exact_bytes == len(text.encode())
        assert set(bounds) <= set(fine.align(s, t).student_bounds.tolist())
        joined += len(fine.align(s, t)) - len(alignment)
    assert joined > 0


SMALL_IDS = st.lists(st.integers(0, 7), max_size=12)


@given(st.lists(st.tuples(SMALL_IDS, SMALL_IDS), max_size=6), st.booleans())
def test_padding_and_the_form_of_a_batch_change_nothing(
    pairs: list[tuple[list[int], list[int]]], left: bool
) -> None:
    vocab = Vocab.from_tokens(
        [b"", b"", b"a", b"b", b"ab", b"ba", b" ", b" a"], {0: "<s>", 1: "<pad>"}
    )
    aligner = Aligner(vocab, vocab)
    sides = [list(side) for side in zip(*pairs, strict=True)] if pairs else [[], []]
    expected = aligner.align_batch(*sides)
    forms: dict[str, Any] = {}
    arrays = []
    for name, rows in zip(("student", "teacher"), sides, strict=True):
        width = max(map(len, rows), default=0) + 2
        ids = np.full((len(rows), width), 10**9)
        mask = np.zeros((len(rows), width), np.bool_)
        for row, own in enumerate(rows):
            where = slice(width - len(own), width) if left else slice(0, len(own))
            ids[row, where], mask[row, where] = own, True
        arrays.append(ids)
        forms[f"{name}_mask"] = mask
    padded = aligner.align_batch(*arrays, **forms)
    assert list(padded) == list(expected)
    chunk_ids = padded.student_chunk_ids(width=arrays[0].shape[1])
    assert ((chunk_ids >= 0) == forms["student_mask"]).all()
    for alignment, (student, teacher) in zip(expected, pairs, strict=True):
        check_laws(alignment, aligner, student, teacher)


@given(st.text(max_size=60))
@example("")
@example("<|end_of_text|>")
@example("a <|end_of_text|> b <｜end▁of▁sentence｜>")
@example("x" * 3000)
def test_any_text_is_aligned_whole_where_both_tokenizers_keep_its_bytes(text: str) -> None:
    aligner = aligner_of("byte_level", "deepseek")
    s, t = encode(tokenizer_zoo.byte_level_bpe(), text), encode(tokenizer_zoo.deepseek(), text)
    alignment = aligner.align(s, t)
    check_laws(alignment, aligner, s, t)
    if aligner.student_vocab.decode_bytes(s) == aligner.teacher_vocab.decode_bytes(t):
        assert alignment.coverage.student_byte_share == 1.0
        back = aligner_of("deepseek", "byte_level").align(t, s)
        np.testing.assert_array_equal(back.student_bounds, alignment.teacher_bounds)


@given(st.text(alphabet="ab ▁é\n", max_size=40))
def test_a_dummy_prefix_is_never_a_difference(text: str) -> None:
    # A literal ▁ becomes a space on one side only: a difference of one character each.
    aligner = aligner_of("sentencepiece", "deepseek")
    s, t = encode(tokenizer_zoo.mistral(), text), encode(tokenizer_zoo.deepseek(), text)
    alignment = aligner.align(s, t)
    check_laws(alignment, aligner, s, t)
    if "▁" not in text:
        assert alignment.coverage.exact_bytes == len(text.encode())


@given(st.text(alphabet="abc é1", min_size=30, max_size=60), st.data())
def test_exact_bytes_come_close_to_the_optimum(text: str, data: st.DataObject) -> None:
    aligner = aligner_of("byte_level", "deepseek")
    at = data.draw(st.integers(0, len(text) - 1))
    changed = text[:at] + data.draw(st.text(alphabet="abxyz ", max_size=6)) + text[at + 3 :]
    s = encode(tokenizer_zoo.byte_level_bpe(), text)
    t = encode(tokenizer_zoo.deepseek(), changed)
    most = most_exact_bytes(
        [aligner.student_vocab.token_bytes(i) for i in s],
        [aligner.teacher_vocab.token_bytes(i) for i in t],
    )
    exact = aligner.align(s, t).coverage.exact_bytes
    # A side that ends within the difference ends the search: what follows is one-sided.
    assert most - 16 <= exact <= most


def test_a_special_string_in_plain_text_is_a_local_difference(texts: dict[str, str]) -> None:
    # The student reads the end-of-text marker as a token without text, the teacher spells it.
    marker = "<|end_of_text|>"
    text = texts["english"]
    tokenizer = tokenizer_zoo.byte_level_bpe()
    aligner = aligner_of("byte_level", "deepseek")
    s = encode(tokenizer, text[:1000] + marker + text[1000:2000])
    assert tokenizer.token_to_id(marker) in s
    t = encode(tokenizer_zoo.deepseek(), text[:1000] + marker + text[1000:2000])
    coverage = aligner.align(s, t).coverage
    assert coverage.exact_bytes >= len(text[:2000].encode()) - 24
    assert coverage.chunks - coverage.exact_chunks <= 16


def test_other_threads_run_while_a_batch_is_aligned() -> None:
    vocab = Vocab.from_tokens([b"a", b"b"])
    aligner = Aligner(vocab, vocab)
    ids = np.zeros((1, 3_000_000), np.int64)
    steps, spans = [0], []
    done = threading.Event()

    def count() -> None:
        while not done.is_set():
            steps[0] += 1

    counter = threading.Thread(target=count)
    counter.start()
    try:
        for _ in range(20):
            before = steps[0]
            aligner.align_batch(ids, ids, threads=1)
            spans.append(steps[0] - before)
    finally:
        done.set()
        counter.join()
    # With the GIL held, the counter could not move within a call.
    assert sum(spans) > 20


def _in_child(aligner: Aligner, threads: int) -> int:
    # Fewer tokens would stay on the calling thread.
    ids = np.tile(np.array([0, 1]), (8, 20_000))
    return int((aligner.align_batch(ids, ids, threads=threads).kind == ChunkKind.EXACT).sum())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forking is a thing of Unix")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_worker_goes_on_after_threads_were_used() -> None:
    vocab = Vocab.from_tokens([b"a", b"b"])
    aligner = Aligner(vocab, vocab)
    _in_child(aligner, 2)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        for threads in (1, 2):
            job = pool.apply_async(_in_child, (aligner, threads))
            assert job.get(timeout=60) == 8 * 40_000
