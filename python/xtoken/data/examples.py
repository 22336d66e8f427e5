"""A text under both tokenizers, with its alignment: made once, used in every epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtoken import Aligner, Alignment, Vocab
from xtoken.data.errors import DataError

BATCH = 256
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Example:
    """One document.

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


@dataclass(frozen=True)
class ExampleSet:
    """Examples and what became of the texts.

    Args:
        examples: those with at least two student tokens, in the order of the texts.
        cut: number of texts that were longer than `max_tokens` and lost their tail.
        empty: number of texts left out because fewer than two student tokens remained.
    """

    examples: list[Example]
    cut: int
    empty: int

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def make_examples(
    texts: Sequence[str],
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    max_tokens: int,
    aligner: Aligner | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ExampleSet:
    """Tokenize texts on both sides, with the special tokens that each tokenizer adds, and align.

    A text longer than `max_tokens` on either side is cut at the last chunk boundary where both
    sides fit, so that both still hold the same text.

    Args:
        texts: the documents.
        student_tokenizer, teacher_tokenizer: `transformers` tokenizers.
        max_tokens: longest example on either side, at least 2.
        aligner: of these tokenizers; made here if absent.
        progress: called with (texts done, texts to do).
    Raises:
        DataError: if `max_tokens` is below 2, or no example is left.
    """
    if max_tokens < 2:
        raise DataError(
            f"max_tokens = {max_tokens}, expected at least 2; a first token has no loss"
        )
    if aligner is None:
        aligner = Aligner(
            Vocab.from_tokenizer(student_tokenizer), Vocab.from_tokenizer(teacher_tokenizer)
        )
    examples: list[Example] = []
    cut = 0
    for start in range(0, len(texts), BATCH):
        batch = list(texts[start : start + BATCH])
        student = _encode(student_tokenizer, batch)
        teacher = _encode(teacher_tokenizer, batch)
        alignments = list(aligner.align_batch(student, teacher))
        for index, alignment in enumerate(alignments):
            ends = _fitting_ends(alignment, max_tokens)
            if ends != (len(student[index]), len(teacher[index])):
                student[index], teacher[index] = (
                    student[index][: ends[0]],
                    teacher[index][: ends[1]],
                )
                alignments[index] = aligner.align(student[index], teacher[index])
                cut += 1
        examples += map(_example, student, teacher, alignments)
        if progress is not None:
            progress(min(start + BATCH, len(texts)), len(texts))
    kept = [example for example in examples if len(example.student_ids) >= 2]
    if not kept:
        raise DataError(
            f"none of {len(texts)} texts has two student tokens within max_tokens = {max_tokens}; "
            "give longer texts or raise max_tokens"
        )
    return ExampleSet(kept, cut=cut, empty=len(examples) - len(kept))


def _encode(tokenizer: Any, texts: list[str]) -> list[Ids]:
    # verbose=False: a text beyond the model's length is cut here, so no warning is due.
    encoded = tokenizer(texts, verbose=False)["input_ids"]
    return [np.asarray(ids, dtype=np.int64) for ids in encoded]


def _fitting_ends(alignment: Alignment, max_tokens: int) -> tuple[int, int]:
    """Return the last chunk boundary at which neither side has more than `max_tokens` tokens."""
    student_bounds, teacher_bounds = alignment.student_bounds, alignment.teacher_bounds
    fits = (student_bounds <= max_tokens) & (teacher_bounds <= max_tokens)
    # Bounds rise, so the fitting ones come first; the bound (0, 0) always fits.
    last = int(np.count_nonzero(fits)) - 1
    return int(student_bounds[last]), int(teacher_bounds[last])


def _example(student: Ids, teacher: Ids, alignment: Alignment) -> Example:
    return Example(
        student_ids=student,
        teacher_ids=teacher,
        student_loss_mask=np.ones(len(student), dtype=np.bool_),
        teacher_loss_mask=np.ones(len(teacher), dtype=np.bool_),
        alignment=alignment,
    )
