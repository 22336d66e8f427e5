"""The targets of a batch as tensors, by row of the flattened student positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.errors import ShapeError
from xtoken.targets import Targets


@dataclass(frozen=True, eq=False)
class TargetBatch:
    """The targets of a batch, in order of chunks, and within a chunk of positions.

    Attributes:
        rows: [P] int64, the predictor of each position in the flattened [B * T_s].
        chunk_ptr: [C + 1] int64, each chunk's positions in `rows`; C the chunks with a target.
        chunk_index: [C] int64, which chunk of the batch each is.
        tails: [P] float, the target's mass of all tokens in no group.
        open: [P] bool, the groups are compared with one another only.
        group_ptr: [P + 1] int64, offsets into the next three.
        probs: [G] float, the target's mass of each group.
        depths: [G] int64, the depth at which a group parts from the text.
        token_ptr: [G + 1] int64, offsets into `tokens`.
        tokens: [N] int64, the student tokens of each group.
    """

    rows: Tensor
    chunk_ptr: Tensor
    chunk_index: Tensor
    tails: Tensor
    open: Tensor
    group_ptr: Tensor
    probs: Tensor
    depths: Tensor
    token_ptr: Tensor
    tokens: Tensor

    @classmethod
    def from_targets(
        cls,
        targets: Targets,
        tokens: NDArray[np.int64],
        length: int,
        *,
        chunk_starts: Sequence[int] | None = None,
        offsets: Sequence[int] | None = None,
        used: NDArray[np.bool_] | None = None,
    ) -> TargetBatch:
        """Lay the targets of a batch's examples out as tensors.

        Args:
            targets: of the examples of the batch, in its order.
            tokens: of the builder.
            length: T_s, the padded length.
            chunk_starts: the batch's number of each example's first chunk; None counts the chunks
                that have a target.
            offsets: [B] the padding before each example.
            used: [P] bool, the positions that count, such as those inside the loss mask; None for
                all.

        Raises:
            ShapeError: a target lies outside `length`, or lists that do not fit.
        """
        examples = len(targets.position_indptr) - 1
        sample = np.repeat(np.arange(examples), np.diff(targets.position_indptr))
        shift = np.zeros(examples, np.int64) if offsets is None else np.asarray(offsets)
        first = np.zeros(examples, np.int64) if chunk_starts is None else np.asarray(chunk_starts)
        if len(shift) != examples or len(first) != examples:
            raise ShapeError(
                f"the targets are of {examples} examples; pass as many offsets and chunk_starts"
            )
        if used is not None and used.shape != targets.positions.shape:
            raise ShapeError(
                f"used has shape {used.shape}, expected {targets.positions.shape}: one per target"
            )
        position = targets.positions + shift[sample]
        if len(position) and int(position.max()) >= length:
            raise ShapeError(
                f"a target is at position {int(position.max())}, but the batch has {length}; "
                "pass the padded length of the student's ids"
            )
        kept = np.arange(len(sample)) if used is None else np.flatnonzero(used)
        groups, group_counts = _members(targets.group_indptr, kept)
        ranges, range_counts = _members(targets.range_indptr, groups)
        starts, ends = targets.starts[ranges], targets.ends[ranges]
        sizes = np.bincount(
            np.repeat(np.arange(len(groups)), range_counts),
            weights=ends - starts,
            minlength=len(groups),
        ).astype(np.int64)
        chunk = targets.chunks[kept] + first[sample[kept]]
        key = chunk if chunk_starts is not None else chunk + sample[kept] * (2**40)
        new = np.flatnonzero(np.diff(key, prepend=-1))
        return cls(
            torch.from_numpy(sample[kept] * length + position[kept] - 1),
            torch.from_numpy(np.append(new, len(kept))),
            torch.from_numpy(chunk[new] if chunk_starts is not None else np.arange(len(new))),
            torch.from_numpy(targets.tails[kept]),
            torch.from_numpy(targets.open[kept]),
            torch.from_numpy(_ptr(group_counts)),
            torch.from_numpy(targets.probs[groups]),
            torch.from_numpy(targets.depths[groups].astype(np.int64)),
            torch.from_numpy(_ptr(sizes)),
            torch.from_numpy(tokens[_ranges(starts, ends)]),
        )

    def __len__(self) -> int:
        """Number of chunks with a target."""
        return len(self.chunk_index)

    def to(self, device: torch.device | str) -> TargetBatch:
        """The same targets on another device."""
        return TargetBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


def _ptr(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _members(
    indptr: NDArray[np.int64], kept: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What the kept rows of a ragged array hold, and how much each."""
    counts = indptr[kept + 1] - indptr[kept]
    return _ranges(indptr[kept], indptr[kept + 1]), counts


def _ranges(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """All numbers of all ranges, one range after the other."""
    sizes = ends - starts
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()))
