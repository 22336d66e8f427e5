"""Alignment of conversations turn by turn.

Where each answer lies is known on both sides, so answers are aligned with answers and prompts with
prompts. Of whole sequences the search for the fewest edits may take other matches: it found 34 % of
the bytes of one-word answers under SmolLM2's and DeepSeek's templates, 3 to 10 % where one template
was Llama-2's, and 95 to 100 % of long ones. Turn by turn all that both sides say is found.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xtoken.align import Aligner, Alignment, AlignmentBatch
from xtoken.data.loss_mask import Encoded, Ranges


def align_by_turns(
    aligner: Aligner, student: Sequence[Encoded], teacher: Sequence[Encoded]
) -> list[Alignment]:
    """Align sequences piece by piece: each turn of the assistant, and what stands between them.

    Plain texts are one piece, and so are sequences whose sides differ in the number of turns.

    Args:
        aligner: of both sides' tokenizers.
        student, teacher: as many sequences each.
    """
    student_cuts, teacher_cuts = [], []
    for left, right in zip(student, teacher, strict=True):
        paired = len(left.turns) == len(right.turns)
        student_cuts.append(_cuts(left, paired))
        teacher_cuts.append(_cuts(right, paired))
    pieces = aligner.align_batch(_pieces(student, student_cuts), _pieces(teacher, teacher_cuts))
    alignments = []
    start = 0
    for cuts in student_cuts:
        alignments.append(_joined(pieces, start, start + len(cuts) - 1))
        start += len(cuts) - 1
    return alignments


def _cuts(side: Encoded, paired: bool) -> Ranges:
    """Return where pieces begin, and the end of the last, [N + 1]."""
    inner = side.turns.ravel() if paired else side.turns[:0].ravel()
    return np.concatenate(([0], inner, [len(side.ids)])).astype(np.int64)


def _pieces(sequences: Sequence[Encoded], cuts: Sequence[Ranges]) -> list[Ranges]:
    return [
        side.ids[start:end]
        for side, bounds in zip(sequences, cuts, strict=True)
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    ]


def _joined(pieces: AlignmentBatch, start: int, end: int) -> Alignment:
    if end == start + 1:
        return pieces[start]
    parts = [pieces[at] for at in range(start, end)]
    return Alignment(
        _chained([part.student_bounds for part in parts]),
        _chained([part.teacher_bounds for part in parts]),
        np.concatenate([part.kind for part in parts]),
        np.sum([part.byte_counts for part in parts], axis=0, dtype=np.int64),
    )


def _chained(bounds: Sequence[Ranges]) -> Ranges:
    """Return bounds of pieces as those of the sequence that they make up."""
    starts = np.concatenate(([0], np.cumsum([part[-1] for part in bounds]))).astype(np.int64)
    inner = [part[1:] + start for part, start in zip(bounds, starts[:-1], strict=True)]
    return np.concatenate([starts[:1], *inner])
