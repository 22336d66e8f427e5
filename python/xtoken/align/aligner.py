"""From the ids of two tokenizers to their alignment."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Collection

import numpy.typing as npt

from xtoken import _core
from xtoken._checks import check_flag, thread_count
from xtoken._core import Vocab
from xtoken.align.alignment import Alignment, AlignmentBatch
from xtoken.align.ids import Batch, Ids, as_ids, as_ragged
from xtoken.errors import ArgumentTypeError
from xtoken.vocab.fingerprints import PairFingerprint

# Changes whenever the same ids may get another alignment: stored ones are then made anew.
_ALGORITHM_VERSION = 3


class Aligner:
    """Aligns token sequences of a student and a teacher.

    Picklable, immutable, safe to share between threads. Exchanging student and teacher exchanges
    the sides of each answer and nothing else; of tokens that stand alone at the same place, the
    student's are always listed first.

    Args:
        student_vocab: a `Vocab`, or anything that `Vocab.from_tokenizer` reads.
        teacher_vocab: the same for the teacher.
        role_pairs: pairs (student id, teacher id) of special tokens that become SPECIAL chunks
            where they meet; None pairs those that play the same role (bos, eos, pad, end of turn)
            in both vocabularies, an empty list pairs none.
        whole_characters: join chunks whose boundary would cut a UTF-8 character, so that each chunk
            can be shown as text.
        threads: the most threads that `align_batch` uses; None for one per core. One thread starts
            none, so that a forked process (a DataLoader worker) can use it safely; neither does a
            batch of less than 2^18 tokens, which is done before another thread has woken.

    Raises:
        TokenIdError: a role pair is outside the vocabularies.
        OptionError: a role pair is not of special tokens, or threads < 1.
    """

    def __init__(
        self,
        student_vocab: object,
        teacher_vocab: object,
        *,
        role_pairs: Collection[tuple[int, int]] | None = None,
        whole_characters: bool = False,
        threads: int | None = None,
    ) -> None:
        self.student_vocab = Vocab.from_tokenizer(student_vocab)
        self.teacher_vocab = Vocab.from_tokenizer(teacher_vocab)
        self.threads = threads
        self._threads = thread_count(threads)
        self._pair = PairFingerprint(self.student_vocab.fingerprint, self.teacher_vocab.fingerprint)
        check_flag("whole_characters", whole_characters)
        pairs = None if role_pairs is None else _pairs(role_pairs)
        self.whole_characters = whole_characters
        self._core = _core.Aligner(self.student_vocab, self.teacher_vocab, pairs, whole_characters)

    @property
    def role_pairs(self) -> list[tuple[int, int]]:
        """The pairs of special tokens that correspond."""
        return self._core.role_pairs

    @property
    def fingerprint(self) -> str:
        """Stable hash of all that an answer depends on but the ids: 32 hexadecimal digits."""
        depends_on = (
            _ALGORITHM_VERSION,
            self.student_vocab.fingerprint,
            self.teacher_vocab.fingerprint,
            self.student_vocab.dummy_prefix,
            self.teacher_vocab.dummy_prefix,
            self.student_vocab.roles.get("unk"),
            self.teacher_vocab.roles.get("unk"),
            self.role_pairs,
            self.whole_characters,
        )
        return hashlib.sha256(repr(depends_on).encode()).hexdigest()[:32]

    def __repr__(self) -> str:
        return f"Aligner({self.student_vocab!r}, {self.teacher_vocab!r}, threads={self.threads})"

    def __reduce__(self) -> tuple[object, ...]:
        options = (self.role_pairs, self.whole_characters, self.threads)
        return _rebuild, (self.student_vocab, self.teacher_vocab, *options)

    def align(self, student_ids: Ids, teacher_ids: Ids) -> Alignment:
        """The alignment of one pair of sequences.

        Args:
            student_ids: ids of the student's tokens, [T_s]: a list of ints or an int64 array.
            teacher_ids: ids of the teacher's tokens, [T_t].

        Raises:
            TokenIdError: an id is outside its vocabulary.
            ArgumentTypeError: an array is not of int64.
            ShapeError: an array is not one-dimensional and contiguous.
        """
        arrays = self._core.align(student_ids, teacher_ids)
        if arrays is None:  # in another form, or refused here
            student = as_ids("student_ids", student_ids)
            arrays = self._core.align(student, as_ids("teacher_ids", teacher_ids))
            assert arrays is not None
        bounds_s, bounds_t, kind, _, counts = arrays
        return Alignment(bounds_s, bounds_t, kind, counts[0], self._pair)

    def align_batch(
        self,
        student: Batch,
        teacher: Batch,
        *,
        student_mask: npt.ArrayLike | None = None,
        teacher_mask: npt.ArrayLike | None = None,
        student_lengths: npt.ArrayLike | None = None,
        teacher_lengths: npt.ArrayLike | None = None,
        student_indptr: npt.ArrayLike | None = None,
        teacher_indptr: npt.ArrayLike | None = None,
        threads: int | None = None,
    ) -> AlignmentBatch:
        """The alignments of many pairs of sequences; the same for any number of threads.

        Each side comes in one of four forms: a list of sequences; a 2-D array of rows of equal
        length; a 2-D array with a mask or with lengths; a flat array with an indptr.

        Args:
            student: ids of the student's tokens.
            teacher: ids of the teacher's tokens, as many sequences.
            student_mask: [B, T_s], true on tokens and false on padding, which may be on either
                side but not between tokens.
            teacher_mask: the same for the teacher.
            student_lengths: [B], tokens of each row; padding is on the right.
            teacher_lengths: the same for the teacher.
            student_indptr: [B + 1], where each sequence of a flat array begins and the last ends.
            teacher_indptr: the same for the teacher.
            threads: in place of the aligner's own.

        Raises:
            TokenIdError: an id is outside its vocabulary.
            ArgumentTypeError: an array is not of int64.
            ShapeError: the arrays do not fit together, or a mask has a hole.
        """
        count = self._threads if threads is None else thread_count(threads)
        if student_lengths is None and teacher_lengths is None:
            given = self._core.align_given(
                *(student, student_mask, student_indptr),
                *(teacher, teacher_mask, teacher_indptr),
                count,
            )
            if given is not None:
                return AlignmentBatch(*given, self._pair)
        # In another form, or refused here.
        left = as_ragged("student", student, student_mask, student_lengths, student_indptr)
        right = as_ragged("teacher", teacher, teacher_mask, teacher_lengths, teacher_indptr)
        arrays = self._core.align_flat(
            left.ids, left.starts, left.ends, right.ids, right.starts, right.ends, count
        )
        return AlignmentBatch(*arrays, left.columns, right.columns, self._pair)


def _pairs(role_pairs: Collection[tuple[int, int]]) -> list[tuple[int, int]]:
    try:
        return [(operator.index(s), operator.index(t)) for s, t in role_pairs]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(
            f"role_pairs = {role_pairs!r}; pass pairs (student id, teacher id)"
        ) from error


def _rebuild(
    student: Vocab,
    teacher: Vocab,
    role_pairs: list[tuple[int, int]],
    whole_characters: bool,
    threads: int | None,
) -> Aligner:
    return Aligner(
        student,
        teacher,
        role_pairs=role_pairs,
        whole_characters=whole_characters,
        threads=threads,
    )
