"""Piece tries: a dictionary of prefixes as the twin, on whole real vocabularies."""

from __future__ import annotations

import functools
import itertools
import pickle
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizer_zoo import byte_level_bpe, deepseek, sentencepiece_bpe, vocab

from xtoken import Vocab
from xtoken.errors import OptionError, ShapeError, TokenIdError, UnsupportedTokenizerError
from xtoken.projection import Projection
from xtoken.trie import PairTries, PieceTrie

Sequences = list[list[int]]


def prefixes(sequences: Sequences) -> dict[tuple[int, ...], list[int]]:
    """The twin: each prefix with the tokens that start with it."""
    found: dict[tuple[int, ...], list[int]] = {}
    for token, sequence in enumerate(sequences):
        for length in range(bool(sequence), len(sequence) + 1):
            found.setdefault(tuple(sequence[:length]), []).append(token)
    return found


def slot_count(prefix: tuple[int, ...], tokens: list[int], sequences: Sequences) -> int:
    nexts = {tuple(sequences[token][: len(prefix) + 1]) for token in tokens}
    return len(nexts)


def lookup_twin(sequences: Sequences, ids, starts, ends, max_depth=None):
    """(chunk, depth, prefix) of every prefix with something to decide."""
    known = prefixes(sequences)

    @functools.cache
    def decides(prefix: tuple[int, ...]) -> bool:
        return prefix in known and slot_count(prefix, known[prefix], sequences) > 1

    found = []
    for chunk, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for depth in range(1, min(end - start, max_depth or end) + 1):
            prefix = tuple(int(i) for i in ids[start : start + depth])
            if decides(prefix):
                found.append((chunk, depth, prefix))
    return found


def as_arrays(*values) -> list[NDArray[np.int64]]:
    return [np.asarray(value, dtype=np.int64) for value in values]


@pytest.fixture(scope="module")
def pair() -> tuple[Vocab, Vocab]:
    """Up to three digits in a student token, one in a teacher token."""
    return vocab(deepseek()), vocab(byte_level_bpe(digits=1))


@pytest.fixture(scope="module")
def real(pair) -> tuple[PieceTrie, Sequences]:
    trie = PieceTrie.build(*pair)
    indptr, ids = trie._core.pieces()
    flat = ids.tolist()
    bounds = indptr.tolist()
    return trie, [flat[a:b] for a, b in itertools.pairwise(bounds)]


def test_every_prefix_of_a_real_vocabulary_is_a_node_with_exactly_its_tokens(real) -> None:
    trie, sequences = real
    twin = prefixes(sequences)
    twin.pop((), None)
    assert len(trie) == len(twin) + 1
    for prefix, tokens in list(twin.items())[::97]:
        node = trie.find(prefix)
        assert node is not None
        assert sorted(trie.below(node).tolist()) == tokens
    slots = trie.slots
    assert sorted(slots.tokens.tolist()) == [t for t, s in enumerate(sequences) if s]
    assert trie.below(0).tolist() == slots.tokens.tolist()


def test_the_pieces_are_those_of_the_teachers_own_model(real, pair) -> None:
    trie, _ = real
    student, teacher = pair
    for text in (b" 2024", b"201", b" Hundreds", "学习".encode(), b"\xe6"):
        token = student.id_of(text)
        if token is not None:
            exact = teacher.id_of(text)
            expected = [exact] if exact is not None else teacher.segment(text)
            assert trie.pieces(token).tolist() == expected
    numeral = student.id_of(b"201")
    assert [teacher.token_bytes(i) for i in trie.pieces(numeral)] == [b"2", b"0", b"1"]
    two = trie.find(trie.pieces(numeral)[:1].tolist())
    below = {student.token_bytes(i) for i in trie.below(two)}
    assert {b"2", b"20", b"27", b"299"} <= below
    assert b"3" not in below


def test_special_and_unused_tokens_are_in_no_node(real, pair) -> None:
    trie, _ = real
    student = pair[0]
    inside = set(trie.slots.tokens.tolist())
    assert student.special_tokens
    assert not inside & set(student.special_tokens)
    assert all(student.token_bytes(i) for i in inside)


def test_slots_cut_the_tokens_below_a_node_by_what_comes_next(real) -> None:
    trie, sequences = real
    slots = trie.slots
    for node in range(0, len(trie), 53):
        low, high = slots.slot_ptr[node : node + 2]
        at = int(slots.node_starts[node])
        depths = []
        for piece, size in zip(
            slots.slot_pieces[low:high], slots.slot_sizes[low:high], strict=True
        ):
            part = slots.tokens[at : at + size].tolist()
            at += int(size)
            depths.append((int(piece), part))
        assert [piece for piece, _ in depths] == sorted(piece for piece, _ in depths)
        shortest = min(len(sequences[t]) for _, part in depths for t in part)
        for piece, part in depths:
            if piece < 0:
                assert {len(sequences[t]) for t in part} == {shortest}


def test_lookup_agrees_with_the_dictionary_on_real_text(real, pair, texts) -> None:
    trie, sequences = real
    teacher = byte_level_bpe(digits=1)
    ids = np.asarray(teacher.encode(texts["maths"] + texts["english"][:5000]).ids, dtype=np.int64)
    starts = np.arange(0, len(ids) - 3, 2)
    ends = starts + 1 + starts // 2 % 3
    expected = lookup_twin(sequences, ids, starts, ends)
    assert {depth for _, depth, _ in expected} >= {1, 2}
    for threads in (None, 1, 2):
        found = trie.lookup(ids, starts, ends, threads=threads)
        nodes = [trie.find(prefix) for _, _, prefix in expected]
        assert found.node.tolist() == nodes
        assert found.chunk.tolist() == [chunk for chunk, _, _ in expected]
        assert found.depth.tolist() == [depth for _, depth, _ in expected]
    short = trie.lookup(ids, starts, ends, max_depth=1)
    assert set(short.depth.tolist()) == {1}


def test_thread_count_changes_nothing_where_there_are_many_chunks(real) -> None:
    trie, sequences = real
    rng = np.random.default_rng(0)
    flat = [piece for sequence in rng.permutation(len(sequences)) for piece in sequences[sequence]]
    (ids,) = as_arrays(flat[:60_000])
    starts = np.arange(len(ids) - 4)
    one, two, all_ = (trie.lookup(ids, starts, starts + 4, threads=t) for t in (1, 2, None))
    for other in (two, all_):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@given(
    sequences=st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=12),
    ids=st.lists(st.integers(0, 3), min_size=1, max_size=20),
    cuts=st.lists(st.integers(0, 20), max_size=6),
)
def test_any_trie_agrees_with_the_dictionary(sequences, ids, cuts) -> None:
    trie = PieceTrie.from_pieces(sequences, 4)
    twin = prefixes(sequences)
    assert len(trie) == len(set(twin) | {()})
    for prefix, tokens in twin.items():
        if prefix:
            assert sorted(trie.below(trie.find(prefix)).tolist()) == tokens
    bounds = sorted({0, *(cut for cut in cuts if cut <= len(ids)), len(ids)})
    arrays = as_arrays(ids, bounds[:-1], bounds[1:])
    expected = lookup_twin(sequences, *arrays)
    found = trie.lookup(*arrays)
    assert found.chunk.tolist() == [chunk for chunk, _, _ in expected]
    assert found.node.tolist() == [trie.find(prefix) for _, _, prefix in expected]


def test_the_projection_carries_both_tries_through_its_file(pair, tmp_path) -> None:
    projection = Projection.build(*pair, cache_dir=False)
    built = PairTries.build(*pair)
    assert PairTries.from_projection(projection) == built
    path = tmp_path / "w.safetensors"
    projection.save(path)
    loaded = PairTries.from_projection(Projection.load(path, *pair))
    assert loaded == built
    assert loaded.student == PieceTrie.build(*pair)
    assert loaded.teacher == PieceTrie.build(*reversed(pair), side="student")


def test_a_student_that_cannot_segment_has_no_mirror(pair) -> None:
    explicit = Vocab.from_tokens([b"2", b"0", b"1", b"201", b"<s>"], {4: "<s>"})
    projection = Projection.build(explicit, pair[1], cache_dir=False)
    with pytest.raises(OptionError, match="no student pieces of the teacher's tokens"):
        PairTries.from_projection(projection)
    with pytest.raises(UnsupportedTokenizerError, match="student vocabulary has no tokenization"):
        PairTries.build(explicit, pair[1])
    assert len(PieceTrie.build(explicit, pair[1])) == 6  # root, 2, 20, 201, 0, 1
    with pytest.raises(ShapeError, match="indptr has 2 entries"):
        replace(projection, teacher_pieces_indptr=np.array([0, 1]), teacher_pieces=np.array([9]))


def test_sentencepiece_pieces_keep_their_spaces() -> None:
    student, teacher = (vocab(t) for t in (deepseek(), sentencepiece_bpe()))
    trie = PieceTrie.build(student, teacher)
    token = student.id_of(b" following")
    assert b"".join(teacher.token_bytes(i) for i in trie.pieces(token)) == b" following"


def test_tries_pickle_and_compare(real) -> None:
    trie, _ = real
    again = pickle.loads(pickle.dumps(trie))
    assert again == trie
    assert hash(again) == hash(trie)
    assert again != PieceTrie.from_pieces([[0]], 1)
    assert trie != "trie"
    assert "128000 of" in repr(trie) or "tokens in" in repr(trie)
    with pytest.raises(ValueError, match="read-only"):
        trie.slots.tokens[0] = 1


def test_a_text_may_have_a_piece_by_any_id_with_its_bytes() -> None:
    texts = [b"2", b"0", b"1"]
    student = Vocab.from_tokens([*texts, b"20", b"201", b"0"], ranked=True)
    teacher = Vocab.from_tokens([b"", *texts, b"1", b"0"], ranked=True)
    built = PairTries.build(student, teacher)
    made = PairTries.from_projection(Projection.build(student, teacher, cache_dir=False))
    assert made == built
    assert built.student != PieceTrie.from_pieces([[1], [2], [3], [1, 2], [1, 2, 3], [2]], 6)
    for trie in (built.student, made.student, pickle.loads(pickle.dumps(built.student))):
        assert trie == built.student
        wanted = trie.lookup(*as_arrays([1, 2, 3], [0], [3]))
        assert wanted.depth.tolist() == [1, 2]
        for ids in ([1, 5, 3], [1, 2, 4], [1, 5, 4]):
            found = trie.lookup(*as_arrays(ids, [0], [3]))
            assert [each.tolist() for each in found] == [each.tolist() for each in wanted]
            assert trie.find(ids) == trie.find([1, 2, 3])
        assert trie.find([5]) == trie.find([2])
        # What has the bytes of no other is itself.
        assert trie.find([0]) is None


def test_lookup_releases_the_gil(real) -> None:
    trie, _ = real
    ids = np.zeros(3_000_000, dtype=np.int64)
    starts = np.arange(len(ids))
    windows = []

    def work() -> None:
        begin = time.perf_counter()
        trie.lookup(ids, starts, starts + 1, threads=1)
        windows.append((begin, time.perf_counter()))

    threads = [threading.Thread(target=work) for _ in range(2)]
    ticks = 0
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        ticks += 1
        time.sleep(0)
    for thread in threads:
        thread.join()
    (a, b), (c, d) = windows
    assert max(a, c) < min(b, d)
    assert ticks > 2


def test_bad_input_is_refused_with_the_place() -> None:
    trie = PieceTrie.from_pieces([[0], [0, 1]], 2)
    ids, starts, ends = as_arrays([0, 7], [0], [2])
    with pytest.raises(TokenIdError, match=r"teacher_ids\[1\] = 7 .* \(V = 2\)"):
        trie.lookup(ids, starts, ends)
    mirror = PieceTrie.from_pieces([[0]], 1, side="student")
    with pytest.raises(TokenIdError, match=r"student_ids\[1\] = 7"):
        mirror.lookup(*as_arrays([0, 7], [1], [2]))
    with pytest.raises(ShapeError, match=r"chunk 0 is tokens \[0, 3\)"):
        trie.lookup(*as_arrays([0, 1], [0], [3]))
    with pytest.raises(ShapeError, match="chunk ends: 2 where 1"):
        trie.lookup(*as_arrays([0, 1], [0], [1, 2]))
    with pytest.raises(OptionError, match="max_depth = -1"):
        trie.lookup(ids, starts, ends, max_depth=-1)
    for count in (-1, 0):
        with pytest.raises(OptionError, match=f"threads = {count} is out of range; expected 1"):
            trie.lookup(ids, starts, ends, threads=count)
    with pytest.raises(TypeError):
        trie.lookup(ids.astype(np.int32), starts, ends)
    with pytest.raises(ShapeError, match="ids has gaps between its elements"):
        trie.lookup(np.zeros(4, dtype=np.int64)[::2], *as_arrays([0], [1]))
    with pytest.raises(TokenIdError, match="token id 2 is outside"):
        PieceTrie.from_pieces([[2]], 2)
    with pytest.raises(TokenIdError, match="token id -1 is outside"):
        PieceTrie.from_pieces([[-1]], 2)
    with pytest.raises(TokenIdError, match="token id 1 is outside"):
        PieceTrie.from_pieces([[0]], 2, spelled=[[0], [1]])
    with pytest.raises(TokenIdError, match="token id 2 is outside"):
        trie.pieces(2)
    with pytest.raises(OptionError, match="node = 9"):
        trie.below(9)


def test_prefix_counts_are_the_choices_in_each_tokens_own_spelling() -> None:
    trie = PieceTrie.from_pieces([[2], [2, 0], [2, 0, 1], [], [9], [2, 0]], 10)
    assert trie.prefix_counts().tolist() == [1, 2, 2, 0, 0, 2]


def test_an_empty_trie_finds_nothing() -> None:
    trie = PieceTrie.from_pieces([[], []], 3)
    assert (len(trie), trie.find([]), trie.find([0])) == (1, 0, None)
    assert trie.lookup(*as_arrays([0, 1], [0], [2])).node.tolist() == []
