"""A document under both tokenizers, with its alignment: made once, used in every epoch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xtoken._core import Vocab
from xtoken.align import Aligner, Alignment
from xtoken.data.align_turns import align_by_turns
from xtoken.data.documents import Document, LeftOut
from xtoken.data.encode import Encoder, print_document
from xtoken.data.loss_mask import Encoded
from xtoken.errors import DataError, OptionError
from xtoken.vocab.source import LoadedTokenizer

BATCH = 256
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Example:
    """One document, or a conversation up to one of its answers.

    Args:
        student_ids, teacher_ids: [T_s] and [T_t] int64, without padding.
        student_loss_mask, teacher_loss_mask: [T_s] and [T_t] bool, the tokens a loss may predict.
        alignment: of these ids.
    """

    student_ids: Ids
    teacher_ids: Ids
    student_loss_mask: NDArray[np.bool_]
    teacher_loss_mask: NDArray[np.bool_]
    alignment: Alignment

    @classmethod
    def whole(
        cls,
        student_ids: Sequence[int] | Ids,
        teacher_ids: Sequence[int] | Ids,
        alignment: Alignment,
    ) -> Example:
        """An example all of whose tokens count in the loss."""
        student, teacher = (np.asarray(ids, dtype=np.int64) for ids in (student_ids, teacher_ids))
        masks = [np.ones(len(ids), dtype=np.bool_) for ids in (student, teacher)]
        return cls(student, teacher, masks[0], masks[1], alignment)

    def cut(self, student_end: int, teacher_end: int, aligner: Aligner) -> Example:
        """The first tokens of both sides, aligned anew; the ends are a chunk boundary."""
        student_ids, teacher_ids = self.student_ids[:student_end], self.teacher_ids[:teacher_end]
        return Example(
            student_ids,
            teacher_ids,
            self.student_loss_mask[:student_end],
            self.teacher_loss_mask[:teacher_end],
            aligner.align(student_ids, teacher_ids),
        )


@dataclass(frozen=True)
class ExampleSet:
    """Examples and what became of the documents.

    Args:
        examples: those with a student token in the loss, in the order of the documents.
        cut: number of examples that were longer than `max_tokens` and lost their tail.
        left_out: examples that no student token in the loss remained of, by document and reason.
    """

    examples: list[Example]
    cut: int
    left_out: tuple[LeftOut, ...] = ()

    @property
    def empty(self) -> int:
        """Number of examples left out."""
        return len(self.left_out)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def make_examples(
    documents: Sequence[Document],
    student_tokenizer: LoadedTokenizer,
    teacher_tokenizer: LoadedTokenizer,
    *,
    max_tokens: int | None,
    aligner: Aligner | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ExampleSet:
    """Tokenize documents on both sides and align; `Pair.examples` without the pair.

    Args:
        documents: texts, conversations, or both.
        student_tokenizer, teacher_tokenizer: `transformers` tokenizers.
        aligner: of these tokenizers; made here if absent.
        max_tokens, progress: see `encode_examples`, as for the rest.
    """
    if aligner is None:
        aligner = Aligner(
            Vocab.from_tokenizer(student_tokenizer), Vocab.from_tokenizer(teacher_tokenizer)
        )
    encoders = (
        Encoder(student_tokenizer, "student", vocab=aligner.student_vocab),
        Encoder(teacher_tokenizer, "teacher", vocab=aligner.teacher_vocab),
    )
    return encode_examples(documents, encoders, aligner, max_tokens=max_tokens, progress=progress)


def encode_examples(
    documents: Sequence[Document],
    encoders: tuple[Encoder, Encoder],
    aligner: Aligner,
    *,
    max_tokens: int | None,
    progress: Callable[[int, int], None] | None = None,
) -> ExampleSet:
    """Tokenize documents on both sides and align.

    A text gets the special tokens that each tokenizer adds, and counts whole. A `Conversation` is
    printed by each tokenizer's own chat template, aligned turn by turn, and only what the assistant
    says counts; it becomes one example, or one for each answer where a template renders
    earlier turns differently in longer conversations (Qwen3 drops earlier thinking).

    An example longer than `max_tokens` on either side is cut at the last chunk boundary where both
    sides fit, so that both still hold the same text.

    Args:
        documents: texts, conversations, or both.
        encoders: of student and teacher.
        aligner: of the two.
        max_tokens: longest example on either side, at least 2; None for no limit.
        progress: called with (documents done, documents to do).
    Raises:
        DataError: if `max_tokens` is below 2, a conversation cannot be printed, or no example is
            left.
    """
    if max_tokens is not None and max_tokens < 2:
        raise OptionError(
            f"max_tokens = {max_tokens}, expected at least 2; a first token has no loss"
        )
    examples: list[Example] = []
    sources: list[str] = []
    cut = 0
    for start in range(0, len(documents), BATCH):
        batch = documents[start : start + BATCH]
        rows = []
        for index, document in enumerate(batch, start):
            printed = print_document(document, encoders)
            rows += printed
            sources += [getattr(document, "source", f"documents[{index}]")] * len(printed)
        student = encoders[0].encode([row[0] for row in rows], max_tokens=max_tokens)
        teacher = encoders[1].encode([row[1] for row in rows], max_tokens=max_tokens)
        alignments = align_by_turns(aligner, student, teacher)
        for index, alignment in enumerate(alignments):
            if max_tokens is None:
                break
            ends = _fitting_ends(alignment, max_tokens)
            if ends != (len(student[index].ids), len(teacher[index].ids)):
                student[index] = student[index].cut(ends[0])
                teacher[index] = teacher[index].cut(ends[1])
                (alignments[index],) = align_by_turns(aligner, [student[index]], [teacher[index]])
                cut += 1
        examples += map(_example, student, teacher, alignments)
        if progress is not None:
            progress(min(start + BATCH, len(documents)), len(documents))
    # Nothing predicts a first token.
    taught = [bool(example.student_loss_mask[1:].any()) for example in examples]
    kept = list(itertools.compress(examples, taught))
    left_out = tuple(
        LeftOut(source, "no student token in the loss")
        for source, counts in zip(sources, taught, strict=True)
        if not counts
    )
    if not kept:
        raise DataError(
            f"none of {len(examples)} examples has a student token in the loss within max_tokens = "
            f"{max_tokens}; give longer texts or raise max_tokens"
        )
    return ExampleSet(kept, cut=cut, left_out=left_out)


def _fitting_ends(alignment: Alignment, max_tokens: int) -> tuple[int, int]:
    """Return the last chunk boundary at which neither side has more than `max_tokens` tokens."""
    student_bounds, teacher_bounds = alignment.student_bounds, alignment.teacher_bounds
    fits = (student_bounds <= max_tokens) & (teacher_bounds <= max_tokens)
    # Bounds rise, so the fitting ones come first; the bound (0, 0) always fits.
    last = int(np.count_nonzero(fits)) - 1
    return int(student_bounds[last]), int(teacher_bounds[last])


def _example(student: Encoded, teacher: Encoded, alignment: Alignment) -> Example:
    return Example(
        student_ids=student.ids,
        teacher_ids=teacher.ids,
        student_loss_mask=student.loss_mask,
        teacher_loss_mask=teacher.loss_mask,
        alignment=alignment,
    )


def cut_together(examples: Sequence[Example], aligners: Sequence[Aligner]) -> list[Example]:
    """Cut examples of one text under several teachers at one place, a boundary for all of them.

    Args:
        examples: one per teacher, of the same student tokens up to the shortest.
        aligners: of each pair.

    Raises:
        DataError: the student's tokens differ, or no place but the beginning suits all.
    """
    shortest = min(len(example.student_ids) for example in examples)
    heads = {example.student_ids[:shortest].tobytes() for example in examples}
    if len(heads) != 1:
        raise DataError(
            "the student's tokens of a text differ between the pairs; several teachers need one "
            "student tokenizer and chat template"
        )
    if all(len(example.student_ids) == shortest for example in examples):
        return list(examples)
    common: set[int] = set.intersection(
        *(set(example.alignment.student_bounds.tolist()) for example in examples)
    )
    end = max((bound for bound in common if bound <= shortest), default=0)
    if end < 2:
        raise DataError("no place but the beginning is a chunk boundary for all teachers")
    cut = []
    for example, aligner in zip(examples, aligners, strict=True):
        at = int(np.searchsorted(example.alignment.student_bounds, end, side="right")) - 1
        cut.append(example.cut(end, int(example.alignment.teacher_bounds[at]), aligner))
    return cut
