"""Targets as flat arrays: what a store keeps, a batch pads and a loss reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from xtoken._checks import expect_list

Int64: TypeAlias = NDArray[np.int64]

_DTYPES: dict[str, Any] = {
    "position_indptr": np.int64,
    "positions": np.int64,
    "chunks": np.int64,
    "tails": np.float64,
    "open": np.bool_,
    "group_indptr": np.int64,
    "probs": np.float32,
    "depths": np.uint8,
    "range_indptr": np.int32,
    "starts": np.int32,
    "ends": np.int32,
}


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
        tails: [P] float64, the mass of all student tokens that are in no group; where `open`, the
            most that it may be.
        open: [P] bool: how much is in no group is not known, but for its most. The groups are
            shares of the rest.
        group_indptr: [P + 1] offsets into the next three.
        probs: [G] float32 mass of each group; with the tail, or alone where `open`, they sum to 1.
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

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self.position_indptr) - 1

    def example(self, index: int) -> Targets:
        """The targets of one example alone."""
        first, last = self.position_indptr[index : index + 2].tolist()
        groups = slice(*self.group_indptr[[first, last]].tolist())
        ranges = slice(*self.range_indptr[[groups.start, groups.stop]].tolist())
        return Targets(
            np.array([0, last - first], np.int64),
            self.positions[first:last],
            self.chunks[first:last],
            self.tails[first:last],
            self.open[first:last],
            self.group_indptr[first : last + 1] - groups.start,
            self.probs[groups],
            self.depths[groups],
            self.range_indptr[groups.start : groups.stop + 1] - np.int32(ranges.start),
            self.starts[ranges],
            self.ends[ranges],
        )

    @staticmethod
    def joined(parts: Sequence[Targets]) -> Targets:
        """The examples of several targets of one pair, in order."""
        expect_list("parts", parts, Targets, "Targets")
        arrays = {}
        for name, dtype in _DTYPES.items():
            values = [getattr(part, name) for part in parts]
            if name.endswith("_indptr"):
                ends = np.cumsum([0, *(int(value[-1]) for value in values)])
                values = [value[1:] + end for value, end in zip(values, ends, strict=False)]
                values.insert(0, np.zeros(1, np.int64))
            arrays[name] = np.concatenate([np.empty(0, dtype), *values]).astype(dtype)
        return Targets(**arrays)

    def chained(self, sizes: Sequence[tuple[int, int]]) -> Targets:
        """The examples one behind another as one, as packed documents are.

        Args:
            sizes: student tokens and chunks of each example.
        """
        starts = np.cumsum([(0, 0), *sizes], axis=0)[:-1]
        of_position = np.repeat(starts, np.diff(self.position_indptr), axis=0)
        return replace(
            self,
            position_indptr=np.array([0, len(self)], np.int64),
            positions=self.positions + of_position[:, 0],
            chunks=self.chunks + of_position[:, 1],
        )

    def groups_at(self, position: int, tokens: Int64) -> list[tuple[float, int, set[int]]]:
        """The groups of the `position`-th target, as (mass, depth, student ids); for looking."""
        found = []
        for group in range(self.group_indptr[position], self.group_indptr[position + 1]):
            ids: set[int] = set()
            for at in range(self.range_indptr[group], self.range_indptr[group + 1]):
                ids.update(tokens[self.starts[at] : self.ends[at]].tolist())
            found.append((float(self.probs[group]), int(self.depths[group]), ids))
        return found
