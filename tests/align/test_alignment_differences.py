"""Laws of alignments of texts that differ: on any ids, and on edited text of real tokenizers."""

from __future__ import annotations

import pickle
from itertools import combinations, groupby
from operator import itemgetter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_alignment import check_laws
from test_alignment_families import FAMILIES, aligner_of

from xtoken import Aligner, Alignment, ChunkKind, Vocab

from reference_alignment import most_exact_bytes

BY_KIND = itemgetter(0)
ONE_SIDED = (ChunkKind.STUDENT_ONLY, ChunkKind.TEACHER_ONLY)
MIRRORED = {ChunkKind.STUDENT_ONLY: ChunkKind.TEACHER_ONLY} | {
    ChunkKind.TEACHER_ONLY: ChunkKind.STUDENT_ONLY
}


def chunks(alignment: Alignment) -> list[tuple[int, int, int]]:
    """Kind, student tokens and teacher tokens of each chunk."""
    sizes = np.diff(alignment.student_bounds), np.diff(alignment.teacher_bounds)
    return list(zip(alignment.kind.tolist(), *(size.tolist() for size in sizes), strict=True))


def mirrored(alignment: Alignment) -> list[tuple[int, int, int]]:
    """The chunks with their sides exchanged; of tokens alone at one place, the student's first."""
    swapped = [(MIRRORED.get(kind, kind), t, s) for kind, s, t in chunks(alignment)]
    runs = groupby(swapped, key=lambda chunk: chunk[0] in ONE_SIDED)
    return [each for alone, run in runs for each in (sorted(run, key=BY_KIND) if alone else run)]


def check_swap(aligner: Aligner, swapped: Aligner, s: list[int], t: list[int]) -> Alignment:
    alignment, other = aligner.align(s, t), swapped.align(t, s)
    assert mirrored(alignment) == chunks(other)
    assert alignment.coverage.exact_bytes == other.coverage.exact_bytes
    assert alignment.coverage.student_bytes == other.coverage.teacher_bytes
    assert alignment.coverage.coarse_chunks == other.coverage.coarse_chunks
    return alignment


@st.composite
def vocabularies(draw: st.DrawFn) -> Vocab:
    """Any bytes: none, the same twice, parts of characters, long ones; special and unused ids."""
    token = st.one_of(
        st.text("ab é", max_size=4).map(str.encode),
        st.binary(max_size=3),
        st.just(b"a" * 300),
    )
    tokens = [b"a", b"b", b" ", *draw(st.lists(token, max_size=10))]
    special = draw(st.sets(st.integers(3, len(tokens) + 2), max_size=3))
    named = zip(sorted(special), ("<s>", "</s>", "<x>"), strict=False)
    tokens += [b""] * 3
    texts = {index: name for index, name in named}
    return Vocab.from_tokens(
        [b"" if index in texts else token for index, token in enumerate(tokens)], texts
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[Vocab, Vocab, list[int], list[int]]:
    """Two vocabularies and ids of each, those of no tokenizer."""
    student = draw(vocabularies())
    teacher = draw(st.one_of(st.just(student), vocabularies()))
    sides = (st.lists(st.integers(0, len(vocab) - 1), max_size=80) for vocab in (student, teacher))
    s, t = map(draw, sides)
    return student, teacher, s, t


# Halves of a character on one side, joined, beside a token that stands alone there too.
HALVES = Vocab.from_tokens([b"a", b"\xc3", b"\xa9"])


@given(problems(), st.booleans())
@example((HALVES, HALVES, [], [1, 2, 0]), True)
def test_swapping_the_sides_swaps_the_answer_for_any_ids(
    problem: tuple[Vocab, Vocab, list[int], list[int]], whole: bool
) -> None:
    student, teacher, s, t = problem
    aligner = Aligner(student, teacher, whole_characters=whole)
    alignment = check_swap(aligner, Aligner(teacher, student, whole_characters=whole), s, t)
    if not whole:
        check_laws(alignment, aligner, s, t)


@given(st.lists(problems(), min_size=1, max_size=4), st.integers(2, 4))
def test_threads_company_copies_and_the_cache_change_nothing(
    parts: list[tuple[Vocab, Vocab, list[int], list[int]]], threads: int
) -> None:
    student, teacher = parts[0][:2]
    # The ids of the other problems, as far as these vocabularies have them.
    sides: list[list[list[int]]] = [
        [[i for i in part[side] if i < len(vocab)] for part in parts]
        for side, vocab in ((2, student), (3, teacher))
    ]
    aligner = Aligner(student, teacher, threads=1)
    expected = [aligner.align(s, t) for s, t in zip(*sides, strict=True)]
    assert list(aligner.align_batch(*sides)) == expected
    assert list(Aligner(student, teacher, threads=threads).align_batch(*sides)) == expected
    assert list(pickle.loads(pickle.dumps(aligner)).align_batch(*sides)) == expected


def edit(text: str, at: int, dropped: int, put: str) -> str:
    return text[:at] + put + text[at + dropped :]


@pytest.mark.parametrize(("student", "teacher"), list(combinations(FAMILIES, 2)))
def test_swapping_the_sides_swaps_the_answer_for_edited_text(
    student: str, teacher: str, texts: dict[str, str]
) -> None:
    aligner, swapped = aligner_of(student, teacher), aligner_of(teacher, student)
    for text in texts.values():
        text = text[:2000]
        half = len(text) // 2
        edits = [
            edit(text, half, 0, "inserted "),
            edit(text, half, 7, ""),
            edit(edit(text, half, 3, "ab"), half // 2, 9, "CAPITALS \t"),
            "A header of some length, seen by one side. " * 30 + text,
            text[: half + 1],
            text[::-1],
        ]
        s = FAMILIES[student]().encode(text)
        for edited in edits:
            t = FAMILIES[teacher]().encode(edited)
            check_laws(check_swap(aligner, swapped, s, t), aligner, s, t)


@given(st.integers(0, 3000), st.integers(0, 40), st.text(max_size=12))
@example(100, 3, "<｜end▁of▁sentence｜>")
@example(0, 40, "<|end_of_text|>")
@example(3000, 0, "\u0301")
@example(50, 0, "")
def test_one_edit_leaves_the_chunks_around_it(at: int, dropped: int, put: str) -> None:
    text = LONG
    aligner = aligner_of("llama3", "deepseek")
    encode = FAMILIES["deepseek"]().encode
    s, t = FAMILIES["llama3"]().encode(text), encode(text)
    edited = encode(edit(text, at, dropped, put))
    clean, alignment = aligner.align(s, t), aligner.align(s, edited)
    check_swap(aligner, aligner_of("deepseek", "llama3"), s, edited)
    # Before: each chunk whose teacher tokens are still the same.
    same = next((i for i, (x, y) in enumerate(zip(t, edited, strict=False)) if x != y), len(t))
    before = int(np.searchsorted(clean.teacher_bounds, same, "right")) - 1
    assert chunks(alignment)[:before] == chunks(clean)[:before]
    # After: all but what the edit touched, and the words that it cut.
    lost = clean.coverage.exact_bytes - alignment.coverage.exact_bytes
    assert lost <= len(text[at : at + dropped].encode()) + 40


LONG = (
    "Alignment compares bytes, never lengths: where two tokenizers cut a text at the same place, a "
    "chunk ends. In 1969 a computer with 4,096 words of memory flew 384,400 km to the moon. "
    "Die Straße war naß, el niño comió, 机器学习 is fun, and so on until the end of all things.\n"
) * 12


@given(st.text("ab cé", min_size=20, max_size=80), st.data())
def test_exact_bytes_never_exceed_the_optimum_and_come_close(
    text: str, data: st.DataObject
) -> None:
    aligner = aligner_of("llama3", "deepseek")
    edited = text
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        edited = edit(
            edited, at, data.draw(st.integers(0, 4)), data.draw(st.text("abX ", max_size=4))
        )
    s, t = FAMILIES["llama3"]().encode(text), FAMILIES["deepseek"]().encode(edited)
    alignment = check_swap(aligner, aligner_of("deepseek", "llama3"), s, t)
    most = most_exact_bytes(
        [aligner.student_vocab.token_bytes(i) for i in s],
        [aligner.teacher_vocab.token_bytes(i) for i in t],
    )
    assert most - 24 <= alignment.coverage.exact_bytes <= most


@given(st.binary(min_size=1, max_size=200), st.binary(min_size=1, max_size=200))
def test_unrelated_bytes_are_tiled_within_a_bounded_time(left: bytes, right: bytes) -> None:
    aligner = aligner_of("tekken", "llama3")
    s = aligner.student_vocab.segment(left * 20)
    t = aligner.teacher_vocab.segment(right * 20)
    assert s is not None
    assert t is not None
    check_laws(check_swap(aligner, aligner_of("llama3", "tekken"), s, t), aligner, s, t)
