"""Where prefix KL compares in a text: chunks and prefixes by class of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xtoken.align.alignment import Alignment, ChunkKind
from xtoken.projection import Projection
from xtoken.trie import PairTries
from xtoken.vocab.classes import class_of, order


@dataclass(frozen=True)
class ClassSupervision:
    """The chunks of one class that a loss over chunks can use.

    Attributes:
        name: class of the chunk's bytes, see `xtoken.vocab.classes`.
        chunks: those that spell the same bytes on both sides and have a predictor on both.
        compared: those that prefix KL compares beyond the first piece.
        mirrored: of these, those of several student tokens and one of the teacher.
        prefixes: at how many prefixes, all of them together.
    """

    name: str
    chunks: int
    compared: int
    mirrored: int
    prefixes: int


def supervision(
    projection: Projection,
    alignment: Alignment,
    student_ids: Sequence[int],
    teacher_ids: Sequence[int],
) -> tuple[ClassSupervision, ...]:
    """Count the chunks of one text, in the reading order of the classes.

    Args:
        projection: built, or loaded with its tokenizers.
        alignment: of these ids.

    Raises:
        OptionError: the projection was loaded without its tokenizers, or has no pieces.
    """
    student, _ = projection.vocabularies()
    tries = PairTries.from_projection(projection)
    bounds = alignment.student_bounds, alignment.teacher_bounds
    sizes = [np.diff(side) for side in bounds]
    # The first token of a side has no position before it that predicts it.
    usable = (alignment.kind == ChunkKind.EXACT) & (bounds[0][:-1] > 0) & (bounds[1][:-1] > 0)
    one = usable & (sizes[0] == 1)
    mirrored = usable & (sizes[0] > 1) & (sizes[1] == 1)
    prefixes = np.zeros(len(usable), dtype=np.int64)
    for chosen, trie, ids, side in (
        (one, tries.student, teacher_ids, bounds[1]),
        (mirrored, tries.teacher, student_ids, bounds[0]),
    ):
        at = chosen.nonzero()[0]
        starts, ends = side[:-1][at].copy(), side[1:][at].copy()
        found = trie.lookup(np.asarray(ids, dtype=np.int64), starts, ends)
        np.add.at(prefixes, at[found.chunk], 1)
    counts: dict[str, Counter[str]] = {}
    for chunk in usable.nonzero()[0].tolist():
        start, end = bounds[0][chunk : chunk + 2].tolist()
        name = class_of(b"".join(student.token_bytes(token) for token in student_ids[start:end]))
        count = counts.setdefault(name, Counter())
        count["chunks"] += 1
        count["compared"] += bool(prefixes[chunk])
        count["mirrored"] += bool(prefixes[chunk] and mirrored[chunk])
        count["prefixes"] += int(prefixes[chunk])
    fields = ("chunks", "compared", "mirrored", "prefixes")
    return tuple(
        ClassSupervision(name, **{field: counts[name][field] for field in fields})
        for name in order(set(counts))
    )
