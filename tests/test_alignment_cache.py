"""The alignment cache: what it keeps, what it proves, and what it refuses to believe."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizer_zoo

import xtoken
from xtoken import Aligner, AlignmentBatch, Vocab
from xtoken.data import AlignmentCache, CacheCounts

Sequences = list[list[int]]


@pytest.fixture(scope="module")
def aligner() -> Aligner:
    return Aligner(tokenizer_zoo.byte_level_bpe(), tokenizer_zoo.sentencepiece_bpe(), threads=1)


@pytest.fixture(scope="module")
def sequences() -> tuple[Sequences, Sequences]:
    texts = tokenizer_zoo.TEXT[:20]
    sides = tokenizer_zoo.byte_level_bpe(), tokenizer_zoo.sentencepiece_bpe()
    student, teacher = ([side.encode(text).ids for text in texts] for side in sides)
    return student, teacher


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.alignments"))


def test_a_second_epoch_computes_nothing(
    aligner: Aligner, sequences: tuple[Sequences, Sequences]
) -> None:
    cache = AlignmentCache()
    expected = aligner.align_batch(*sequences)
    for _ in range(2):
        assert cache.align_batch(aligner, *sequences) == expected
    assert cache.counts == CacheCounts(memory_hits=20, computed=20)
    assert cache.align(aligner, sequences[0][3], sequences[1][3]) == expected[3]
    assert cache.counts.memory_hits == 21


def test_what_is_on_disk_outlives_the_process(
    tmp_path: Path, aligner: Aligner, sequences: tuple[Sequences, Sequences]
) -> None:
    first = AlignmentCache(tmp_path / "new" / "cache").align_batch(aligner, *sequences)
    cache = AlignmentCache(tmp_path / "new" / "cache")
    assert cache.align_batch(aligner, *sequences) == first == aligner.align_batch(*sequences)
    assert cache.counts == CacheCounts(disk_hits=20)


def test_memory_is_bounded_and_the_disk_serves_the_rest(
    tmp_path: Path, aligner: Aligner, sequences: tuple[Sequences, Sequences]
) -> None:
    cache = AlignmentCache(tmp_path, max_memory=0)
    cache.align_batch(aligner, *sequences)
    assert cache.align_batch(aligner, *sequences) == aligner.align_batch(*sequences)
    assert cache.counts == CacheCounts(disk_hits=20, computed=20)
    with pytest.raises(xtoken.OptionError, match="max_memory = -1"):
        AlignmentCache(max_memory=-1)


def test_equal_sequences_are_made_and_stored_once(tmp_path: Path, aligner: Aligner) -> None:
    cache = AlignmentCache(tmp_path)
    batch = cache.align_batch(aligner, [[5, 6]] * 3, [[7]] * 3)
    assert batch == aligner.align_batch([[5, 6]] * 3, [[7]] * 3)
    assert files(tmp_path)[0].stat().st_size < 200


def test_other_ids_options_and_vocabularies_are_other_entries(aligner: Aligner) -> None:
    cache = AlignmentCache()
    s, t = aligner.student_vocab, aligner.teacher_vocab
    swapped = Aligner(t, s)
    others = [
        (aligner, [5, 6], [7]),
        (aligner, [5], [6, 7]),
        (aligner, [5, 6, 7], []),
        (swapped, [5, 6], [7]),
        (Aligner(s, t, role_pairs=[]), [5, 6], [7]),
        (Aligner(s, t, whole_characters=True), [5, 6], [7]),
        (Aligner(s, Vocab.from_tokens([b"a"] * 8)), [5, 6], [7]),
        # The unknown token stands within text, other specials between texts.
        (Aligner(s, t.with_roles({"unk": None})), [5, 6], [7]),
    ]
    for made, student, teacher in others:
        cache.align(made, student, teacher)
    assert cache.counts == CacheCounts(computed=len(others))
    cache.align(Aligner(s, t, threads=2), [5, 6], [7])
    assert cache.counts.memory_hits == 1


@pytest.mark.parametrize("cut", [1, 5, 23, 24, 25, 60])
def test_a_truncated_file_is_used_up_to_its_damage(
    tmp_path: Path, aligner: Aligner, sequences: tuple[Sequences, Sequences], cut: int
) -> None:
    expected = AlignmentCache(tmp_path).align_batch(aligner, *sequences)
    (file,) = files(tmp_path)
    file.write_bytes(file.read_bytes()[:-cut])
    cache = AlignmentCache(tmp_path)
    assert cache.align_batch(aligner, *sequences) == expected
    assert cache.counts == CacheCounts(disk_hits=19, computed=1)
    again = AlignmentCache(tmp_path)
    assert again.align_batch(aligner, *sequences) == expected
    assert again.counts == CacheCounts(disk_hits=20)


def test_an_altered_record_is_made_anew(
    tmp_path: Path, aligner: Aligner, sequences: tuple[Sequences, Sequences]
) -> None:
    expected = AlignmentCache(tmp_path).align_batch(aligner, *sequences)
    (file,) = files(tmp_path)
    content = bytearray(file.read_bytes())
    content[200] ^= 1
    file.write_bytes(bytes(content))
    cache = AlignmentCache(tmp_path)
    assert cache.align_batch(aligner, *sequences) == expected
    assert cache.counts == CacheCounts(disk_hits=19, computed=1, damaged=1)


def test_a_foreign_file_is_left_alone(tmp_path: Path, aligner: Aligner) -> None:
    foreign = tmp_path / "other.alignments"
    foreign.write_bytes(b"something else" * 100)
    (tmp_path / "empty.alignments").touch()
    cache = AlignmentCache(tmp_path)
    assert cache.align(aligner, [5], [6]) == aligner.align([5], [6])
    assert cache.counts == CacheCounts(computed=1)
    assert foreign.read_bytes() == b"something else" * 100


def test_a_file_that_vanishes_is_made_anew(tmp_path: Path, aligner: Aligner) -> None:
    cache = AlignmentCache(tmp_path, max_memory=0)
    for _ in range(2):
        cache.align(aligner, [5], [6])
        for file in files(tmp_path):
            file.unlink()
    assert cache.counts == CacheCounts(computed=2, damaged=1)


def _work(
    cache: AlignmentCache, aligner: Aligner, sequences: tuple[Sequences, Sequences]
) -> tuple[AlignmentBatch, CacheCounts]:
    return cache.align_batch(aligner, *sequences), cache.counts


def test_processes_share_a_directory(
    tmp_path: Path, aligner: Aligner, sequences: tuple[Sequences, Sequences]
) -> None:
    expected = aligner.align_batch(*sequences)
    cache = AlignmentCache(tmp_path)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        jobs = [pool.apply_async(_work, (cache, aligner, sequences)) for _ in range(3)]
        answers = [job.get(timeout=120) for job in jobs]
    assert all(batch == expected for batch, _ in answers)
    assert all(counts.damaged == 0 for _, counts in answers)
    # Made after the others began, this cache still sees what they wrote.
    assert cache.align_batch(aligner, *sequences) == expected
    assert cache.counts == CacheCounts(disk_hits=20)


def test_a_cache_can_be_sent_to_another_process(tmp_path: Path, aligner: Aligner) -> None:
    cache = AlignmentCache(tmp_path, max_memory=7)
    cache.align(aligner, [5], [6])
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.directory, copy.max_memory) == (cache.directory, 7)
    assert copy.align(aligner, [5], [6]) == aligner.align([5], [6])
    assert copy.counts == CacheCounts(disk_hits=1)


def test_long_steps_and_empty_alignments_are_stored_whole(tmp_path: Path) -> None:
    vocab = Vocab.from_tokens([b"a" * 300, b"a"])
    aligner = Aligner(vocab, vocab)
    for student, teacher in (([0], [1] * 300), ([], []), ([1] * 70_000, [])):
        expected = aligner.align(student, teacher)
        AlignmentCache(tmp_path).align(aligner, student, teacher)
        cache = AlignmentCache(tmp_path)
        stored = cache.align(aligner, student, teacher)
        assert stored == expected
        assert stored.student_bounds.dtype == np.int64
        assert cache.counts.disk_hits == 1


def test_bad_input_is_named(tmp_path: Path, aligner: Aligner) -> None:
    cache = AlignmentCache(tmp_path)
    with pytest.raises(xtoken.ShapeError, match="1 teacher sequences where 2 are expected"):
        cache.align_batch(aligner, [[1], [2]], [[1]])
    with pytest.raises(TypeError, match=r"student_ids\[1\] is of dtype float64"):
        cache.align_batch(aligner, [[1], [0.5]], [[1], [1]])
    with pytest.raises(xtoken.TokenIdError, match="= -1 is outside"):
        cache.align(aligner, [-1], [0])
    cache.align(aligner, [1], [1])
    with pytest.raises(xtoken.TokenIdError, match=r"teacher_ids\[1, 0\] = -1"):
        cache.align_batch(aligner, [[1], [2]], [[1], [-1]])
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        AlignmentCache(tmp_path / "file")
