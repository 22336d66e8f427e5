"""The targets of a batch as tensors, by chunk and by row of the flattened student positions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.errors import ShapeError
from xtoken.targets import Targets
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.host import on_device, readable
from xtoken.tensors.host_chunks import HostChunks
from xtoken.tensors.segments import offsets_of

_Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class HostTargets:
    """What a loss has to know of targets before it computes: offsets, and what it can refuse.

    Attributes:
        chunk_ptr, group_ptr, token_ptr, depths: as those of `TargetBatch`.
        probs: [G] float64.
        most_row, most_token: the largest of `rows` and of `tokens`, -1 for none.
        chunks: those that the targets were laid out for, where known.
        made: what a loss made of all this before, by what it was made for.
    """

    chunk_ptr: _Int64
    group_ptr: _Int64
    token_ptr: _Int64
    depths: _Int64
    probs: NDArray[np.float64]
    most_row: int
    most_token: int
    chunks: HostChunks | None = None
    made: dict[Hashable, object] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, eq=False)
class TargetBatch:
    """The targets of a batch's chunks, in their order, and within a chunk by position.

    Attributes:
        rows: [P] int64, the predictor of each position in the flattened [B * T_s].
        chunk_ptr: [C + 1] int64, each chunk's range in `rows`; empty where it has no target.
        tails: [P] float, the target's mass of all tokens in no group.
        open: [P] bool, the tail is the most that may be in no group, and the groups sum to 1.
        group_ptr: [P + 1] int64, offsets into the next three.
        probs: [G] float, the target's mass of each group.
        depths: [G] int64, the depth at which a group parts from the text.
        token_ptr: [G + 1] int64, offsets into `tokens`.
        tokens: [N] int64, the student tokens of each group.
        group_row: [G] int64, the position of each group, its place in `rows`.
        token_group: [N] int64, the group of each token.
        host: copies on the host, so that no loss waits for a device to know them.
    """

    rows: Tensor
    chunk_ptr: Tensor
    tails: Tensor
    open: Tensor
    group_ptr: Tensor
    probs: Tensor
    depths: Tensor
    token_ptr: Tensor
    tokens: Tensor
    group_row: Tensor | None = None
    token_group: Tensor | None = None
    host: HostTargets | None = None

    def __post_init__(self) -> None:
        if self.host is not None and not readable(self.chunk_ptr):
            return
        host = HostTargets(
            self.chunk_ptr.cpu().numpy(),
            self.group_ptr.cpu().numpy(),
            self.token_ptr.cpu().numpy(),
            self.depths.cpu().numpy(),
            self.probs.cpu().double().numpy(),
            int(self.rows.max()) if len(self.rows) else -1,
            int(self.tokens.max()) if len(self.tokens) else -1,
            None if self.host is None else self.host.chunks,
        )
        object.__setattr__(self, "host", host)
        for name, ptr in (("group_row", host.group_ptr), ("token_group", host.token_ptr)):
            owner = torch.from_numpy(owner_of(ptr))
            object.__setattr__(self, name, owner.to(self.rows.device))

    @classmethod
    def from_targets(
        cls,
        targets: Targets,
        tokens: _Int64,
        chunks: ChunkBatch,
        length: int,
        columns: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> TargetBatch:
        """Lay out the targets of those positions that are in a chunk, on the CPU.

        Args:
            targets: of the samples of the batch, in its order.
            tokens: of the builder.
            chunks: those that the loss counts, from `ChunkBatch.usable`.
            length: T_s, the padded length.
            columns: the column of each sample's first token (left padding); None means 0.
            rows: the row of the batch that each sample of the targets is in, where it is not the
                one of its number, as documents of a packed row are.

        Raises:
            ShapeError: chunks of more samples than targets, or columns of another number.
        """
        samples = len(targets.position_indptr) - 1
        if columns is not None and len(columns) != samples:
            raise ShapeError(
                f"columns has {len(columns)} entries, expected {samples}: one per sample"
            )
        own_sample = chunks.sample.cpu().numpy()
        start, end = chunks.student_start.cpu().numpy(), chunks.student_end.cpu().numpy()
        if rows is None and len(own_sample) and int(own_sample.max()) >= samples:
            raise ShapeError(
                f"a chunk is of sample {int(own_sample.max())}, the targets are of {samples} "
                "examples; pass the targets of this batch"
            )
        sample = np.repeat(np.arange(samples), np.diff(targets.position_indptr))
        shift = np.zeros(samples, np.int64) if columns is None else np.asarray(columns)
        position = targets.positions + shift[sample]
        if rows is not None:
            sample = np.asarray(rows, np.int64)[sample]
        chunk = _chunk_of(own_sample, start, end, sample, position)
        kept = np.flatnonzero(chunk >= 0)
        kept = kept[np.argsort(chunk[kept], kind="stable")]
        groups = _ranges(targets.group_indptr[kept], targets.group_indptr[kept + 1])
        range_indptr = targets.range_indptr.astype(np.int64)
        first, last = range_indptr[groups], range_indptr[groups + 1]
        ranges = _ranges(first, last)
        starts = targets.starts[ranges].astype(np.int64)
        ends = targets.ends[ranges].astype(np.int64)
        in_ranges = _ptr(ends - starts)
        token_ptr = np.append(in_ranges[_ptr(last - first)[:-1]], in_ranges[-1])
        made = cls(
            torch.from_numpy(sample[kept] * length + position[kept] - 1),
            torch.from_numpy(_ptr(np.bincount(chunk[kept], minlength=len(own_sample)))),
            torch.from_numpy(targets.tails[kept]),
            torch.from_numpy(targets.open[kept]),
            torch.from_numpy(_ptr(targets.group_indptr[kept + 1] - targets.group_indptr[kept])),
            torch.from_numpy(targets.probs[groups]),
            torch.from_numpy(targets.depths[groups].astype(np.int64)),
            torch.from_numpy(token_ptr),
            torch.from_numpy(tokens[_ranges(starts, ends)]),
        )
        assert made.host is not None
        object.__setattr__(made, "host", replace(made.host, chunks=chunks.host))
        return made

    def without_empty_tails(self, size: int) -> TargetBatch:
        """The same, without a tail where the groups of a position have all tokens, and there the
        groups scaled to 1.

        What a target keeps for tokens in no group is there the rounding of the teacher's
        probabilities, or columns that belong to one of the groups: no student could say it.

        Args:
            size: V_s.
        """
        host = self.host
        assert host is not None
        in_groups = host.token_ptr[host.group_ptr]
        whole = np.diff(in_groups) >= size
        if not whole.any():
            return self
        key = ("without empty tails", size)
        if key not in host.made:
            row, groups = owner_of(host.group_ptr), slice(0, int(host.group_ptr[-1]))
            sums = np.bincount(row, host.probs[groups], minlength=len(whole))
            whole &= sums > 0
            factor = np.ones(len(host.probs))
            factor[groups] = np.where(whole, 1 / np.where(whole, sums, 1.0), 1.0)[row]
            host.made[key] = whole, factor, replace(host, probs=host.probs * factor, made={})
        whole, factor, scaled = cast(
            "tuple[NDArray[np.bool_], NDArray[np.float64], HostTargets]", host.made[key]
        )
        device = self.rows.device
        made = replace(
            self,
            tails=self.tails.masked_fill(on_device(whole, device), 0.0),
            probs=(self.probs * on_device(factor, device)).to(self.probs.dtype),
        )
        # Made once, so that what a loss keeps there is kept too.
        object.__setattr__(made, "host", scaled)
        return made

    def limited(self, size: int) -> TargetBatch:
        """The targets of a head with `size` columns, that lacks the tokens from there on: they have
        no mass in it.

        A group keeps its mass as long as one of its tokens is left. Those of which none is are
        dropped, as the mass of what a student cannot say is, and the others are shares of the rest;
        a position without a group left has no target.
        """
        assert self.host is not None
        assert self.group_row is not None
        assert self.token_group is not None
        if self.host.most_token < size:
            return self
        said = self.tokens < size
        in_group = torch.zeros_like(self.depths).index_add(0, self.token_group, said.long())
        kept = in_group > 0
        probs = self.probs.double()
        none = torch.zeros_like(self.tails, dtype=torch.float64)
        lost = none.index_add(0, self.group_row, probs.masked_fill(kept, 0.0))
        rest = none.index_add(0, self.group_row, probs.masked_fill(~kept, 0.0))
        tails = self.tails.double()
        # An open tail is a share of all, and the groups are shares of what it leaves.
        total = torch.where(self.open, rest * (1 - tails) + tails, rest + tails)
        shared = torch.where(self.open, rest, total)
        untouched = lost == 0
        total = total.masked_fill(untouched, 1.0)
        shared = shared.masked_fill(untouched, 1.0)
        groups = torch.zeros_like(self.rows).index_add(0, self.group_row, kept.long())
        has_target = untouched | (groups > 0)
        made = TargetBatch(
            self.rows[has_target],
            offsets_of(has_target)[self.chunk_ptr],
            (tails / total)[has_target].to(self.tails.dtype),
            self.open[has_target],
            offsets_of(groups[has_target]),
            (probs / shared[self.group_row])[kept].to(self.probs.dtype),
            self.depths[kept],
            offsets_of(in_group[kept]),
            self.tokens[said],
        )
        assert made.host is not None
        object.__setattr__(made, "host", replace(made.host, chunks=self.host.chunks))
        return made

    def belong_to(self, chunks: ChunkBatch) -> bool:
        """Whether the targets were laid out for these chunks, on whatever device."""
        return self.host is not None and self.host.chunks is chunks.host

    def __len__(self) -> int:
        """Number of chunks."""
        return len(self.chunk_ptr) - 1

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TargetBatch:
        """The same targets on another device."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TargetBatch:
        """The same targets in page-locked memory, from which copies to a GPU do not wait."""
        return self.mapped(Tensor.pin_memory)

    def mapped(self, move: Callable[[Tensor], Tensor]) -> TargetBatch:
        """The same targets with moved tensors."""
        assert self.group_row is not None
        assert self.token_group is not None
        moved = TargetBatch(
            move(self.rows), move(self.chunk_ptr), move(self.tails), move(self.open),
            move(self.group_ptr), move(self.probs), move(self.depths), move(self.token_ptr),
            move(self.tokens), move(self.group_row), move(self.token_group), self.host,
        )  # fmt: skip
        if self.host is not None and moved.host is not None:
            object.__setattr__(moved, "host", replace(moved.host, made=self.host.made))
        return moved


def owner_of(ptr: _Int64) -> _Int64:
    """The place in `ptr` of each number below its last one; 0 for those below its first."""
    unowned = np.zeros(int(ptr[0]), np.int64)
    return np.concatenate([unowned, np.repeat(np.arange(len(ptr) - 1), np.diff(ptr))])


def _chunk_of(
    own_sample: _Int64, start: _Int64, end: _Int64, sample: _Int64, position: _Int64
) -> _Int64:
    """The chunk that each position of a sample is in, -1 for none."""
    if not len(start):
        return np.full(len(position), -1)
    key = own_sample * 2**32 + start
    order = np.argsort(key, kind="stable")
    at = np.searchsorted(key[order], sample * 2**32 + position, side="right") - 1
    chunk = order[at.clip(0)]
    inside = (at >= 0) & (own_sample[chunk] == sample) & (position < end[chunk])
    return np.where(inside, chunk, -1)


def _ptr(counts: _Int64) -> _Int64:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _ranges(starts: _Int64, ends: _Int64) -> _Int64:
    """All numbers of all ranges, one range after the other."""
    sizes = ends - starts
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()))
