"""Where the teacher's mass goes under exact targets, by shape of chunk and by class of text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xtoken.projection import Projection
from xtoken.targets import TargetBuilder, TargetExample, TargetOptions
from xtoken.vocab.classes import class_of, order

SHAPES = ("1:1", "1:n", "m:1", "m:n")
"""Student tokens to teacher tokens."""


@dataclass(frozen=True)
class MassPlacement:
    """What becomes of the teacher's mass at the boundaries of some chunks, as mean shares.

    Attributes:
        name: a shape of chunk, student tokens to teacher tokens; or a class of the text that the
            chunk spells, see `xtoken.vocab.classes`.
        boundaries: how many.
        unreached: on teacher tokens that no student token begins with; P-KL and prefix KL drop it.
        dropped: on special tokens without a partner; exact targets drop it.
        left_out: on tokens after which the student would not have its boundary.
        carried: brought from longer teacher tokens of earlier positions, beside the row's own mass.
        unlisted: on teacher tokens that the predictions do not list, of which nothing is known; in
            none of the others.
    """

    name: str
    boundaries: int
    unreached: float
    dropped: float
    left_out: float
    carried: float
    unlisted: float

    @property
    def placed(self) -> float:
        """The share that exact targets place, tokens that the student would not say here aside;
        what is not listed is one group there, the tail."""
        return 1.0 - self.dropped


def mass_placement(
    projection: Projection, example: TargetExample
) -> tuple[tuple[MassPlacement, ...], tuple[MassPlacement, ...]]:
    """The placement in one text by shape of chunk, and by class of text.

    Args:
        projection: built, or loaded with its tokenizers.
        example: a text with the teacher's predictions.

    Raises:
        OptionError: the projection was loaded without its tokenizers.
        UnsupportedTokenizerError: a tokenizer has no model that can segment.
    """
    student, _ = projection.vocabularies()
    # Every column that is listed counts, small ones too.
    builder, options = TargetBuilder.from_projection(projection), TargetOptions(min_prob=0.0)
    targets, accounts = builder.accounts([example], options)
    listed = _listed(example)
    bounds = example.alignment.student_bounds, example.alignment.teacher_bounds
    rows: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    classes: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for position, chunk, account in zip(targets.positions, targets.chunks, accounts, strict=True):
        (start, end), (first, last) = (side[chunk : chunk + 2].tolist() for side in bounds)
        text = b"".join(student.token_bytes(int(s)) for s in example.student_ids[start:end])
        if position != start or not text:
            continue
        many = "1" if end - start == 1 else "m", "1" if last - first == 1 else "n"
        shares = np.append(account, max(0.0, 1.0 - listed[first - 1]))
        rows[":".join(many)].append(shares)
        classes[class_of(text)].append(shares)
    return (
        _means(rows, [shape for shape in SHAPES if shape in rows]),
        _means(classes, order(set(classes))),
    )


def _listed(example: TargetExample) -> NDArray[np.float64]:
    """[T_t], the mass of the columns that each row names."""
    probabilities = np.exp(example.log_probs, dtype=np.float64)
    if example.column_ids is not None:
        probabilities[example.column_ids < 0] = 0
    total: NDArray[np.float64] = probabilities.sum(axis=1)
    return total


def _means(
    found: dict[str, list[NDArray[np.float64]]], names: Sequence[str]
) -> tuple[MassPlacement, ...]:
    made = []
    for name in names:
        means = np.mean(found[name], axis=0).tolist()
        dropped, left_out, carried, unreached, unlisted = means
        made.append(
            MassPlacement(
                name, len(found[name]), unreached + dropped, dropped, left_out, carried, unlisted
            )
        )
    return tuple(made)
