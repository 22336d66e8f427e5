"""Targets as flat arrays: what a store keeps, a batch pads and a loss reads."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Int64: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Targets:
    """The targets of some examples: for each student position a distribution over disjoint groups.

    Position `n` has the groups `group_indptr[n]:group_indptr[n + 1]`; group `g` is the student
    tokens `tokens[starts[r]:ends[r]]` for the ranges `r` in `range_indptr[g]:range_indptr[g + 1]`,
    with the `tokens` of the builder.

    Attributes:
        position_indptr: [examples + 1] each example's positions in the next four.
        positions: [P] index of the student token that is predicted, from 1; rising per example.
        chunks: [P] the chunk of the alignment that it is in.
        tails: [P] float64, the mass of all student tokens that are in no group.
        open: [P] bool: the groups are compared with one another only, whatever the others have.
        group_indptr: [P + 1] offsets into the next three.
        probs: [G] float32 mass of each group; with the tail they sum to 1.
        depths: [G] uint8: how many of the text's own teacher tokens the group shares.
        range_indptr: [G + 1] int32 offsets into the next two.
        starts, ends: [R] int32 ranges of the builder's `tokens`.
    """

    position_indptr: Int64
    positions: Int64
    chunks: Int64
    tails: NDArray[np.float64]
    open: NDArray[np.bool_]
    group_indptr: Int64
    probs: NDArray[np.float32]
    depths: NDArray[np.uint8]
    range_indptr: NDArray[np.int32]
    starts: NDArray[np.int32]
    ends: NDArray[np.int32]

    def __len__(self) -> int:
        """Number of positions with a target."""
        return len(self.positions)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Targets):
            return NotImplemented
        return all(
            np.array_equal(getattr(self, field.name), getattr(other, field.name))
            for field in fields(self)
        )

    __hash__ = None  # type: ignore[assignment]

    def groups_at(self, position: int, tokens: Int64) -> list[tuple[float, int, set[int]]]:
        """The groups of the `position`-th target, as (mass, depth, student ids); for looking."""
        found = []
        for group in range(self.group_indptr[position], self.group_indptr[position + 1]):
            ids: set[int] = set()
            for at in range(self.range_indptr[group], self.range_indptr[group + 1]):
                ids.update(tokens[self.starts[at] : self.ends[at]].tolist())
            found.append((float(self.probs[group]), int(self.depths[group]), ids))
        return found
