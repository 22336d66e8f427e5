"""Alignments in the forms that a chunk batch is made of, as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from xtoken._checks import expect
from xtoken.align.alignment import Alignment, AlignmentBatch
from xtoken.errors import OptionError, ShapeError


def batch_of(
    alignments: AlignmentBatch | Sequence[Alignment],
    student_offsets: Sequence[int] | None,
    teacher_offsets: Sequence[int] | None,
) -> AlignmentBatch:
    """The batch itself, or one of a sequence of alignments at these columns; checked."""
    if isinstance(alignments, AlignmentBatch):
        if student_offsets is not None or teacher_offsets is not None:
            raise OptionError(
                "student_offsets and teacher_offsets are for a sequence of alignments; an "
                "AlignmentBatch has its own columns: pass it alone"
            )
        return alignments
    hint = "pass what Aligner.align_batch gives, or one Aligner.align(...) for each sample"
    expect(alignments, (AlignmentBatch, list, tuple), "alignments", hint)
    for index, one in enumerate(alignments):
        expect(one, Alignment, f"alignments[{index}]", hint)
        for side, bounds in (("student", one.student_bounds), ("teacher", one.teacher_bounds)):
            if len(bounds) != len(one.kind) + 1:
                raise ShapeError(
                    f"alignments[{index}].{side}_bounds has {len(bounds)} entries, "
                    f"expected {len(one.kind) + 1}: one more than kind"
                )
    return replace(
        AlignmentBatch.stack(alignments),
        student_columns=_offsets(student_offsets, len(alignments), "student_offsets"),
        teacher_columns=_offsets(teacher_offsets, len(alignments), "teacher_offsets"),
    )


def _offsets(offsets: Sequence[int] | None, count: int, name: str) -> NDArray[np.int64]:
    if offsets is None:
        return np.zeros(count, np.int64)
    if len(offsets) != count:
        raise ShapeError(f"{name} has {len(offsets)} entries, expected {count}: one per sample")
    return np.asarray(offsets, dtype=np.int64)
