"""The targets of a batch as tensors, by chunk and by row of the flattened student positions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.errors import ShapeError
from xtoken.targets import Targets
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.group_tokens import GroupTokens
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
        starts, ends, order: of the `GroupTokens`.
        most_row: the largest of `rows`, -1 for none.
        chunks: those that the targets were laid out for, where known.
        made: what a loss made of all this before, by what it was made for.
    """

    chunk_ptr: _Int64
    group_ptr: _Int64
    token_ptr: _Int64
    depths: _Int64
    probs: NDArray[np.float64]
    starts: _Int64
    ends: _Int64
    order: _Int64
    most_row: int
    chunks: HostChunks | None = None
    made: dict[Hashable, object] = field(default_factory=dict, repr=False)

    def most_token(self) -> int:
        """The largest token of a group, -1 for none."""
        if "most token" not in self.made:
            # Looked for among all that are in order, as those of the groups are many more.
            change = np.bincount(self.starts, minlength=len(self.order) + 1)
            change = change - np.bincount(self.ends, minlength=len(self.order) + 1)
            held = self.order[change.cumsum()[:-1] > 0]
            self.made["most token"] = int(held.max()) if len(held) else -1
        return cast(int, self.made["most token"])

    def fits(self, size: int) -> bool:
        """Whether all tokens are below `size`."""
        if "most of order" not in self.made:
            self.made["most of order"] = int(self.order.max()) if len(self.order) else -1
        return cast(int, self.made["most of order"]) < size or self.most_token() < size


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
        members: the student tokens of each group.
        group_row: [G] int64, the position of each group, its place in `rows`.
        host: copies on the host, so that no loss waits for a device to know them.
    """

    rows: Tensor
    chunk_ptr: Tensor
    tails: Tensor
    open: Tensor
    group_ptr: Tensor
    probs: Tensor
    depths: Tensor
    members: GroupTokens
    group_row: Tensor | None = None
    host: HostTargets | None = None

    def __post_init__(self) -> None:
        if self.host is not None and not readable(self.chunk_ptr):
            return
        starts, ends = self.members.starts.cpu().numpy(), self.members.ends.cpu().numpy()
        host = HostTargets(
            self.chunk_ptr.cpu().numpy(),
            self.group_ptr.cpu().numpy(),
            _ptr(ends - starts)[self.members.range_ptr.cpu().numpy()],
            self.depths.cpu().numpy(),
            self.probs.cpu().double().numpy(),
            starts,
            ends,
            self.members.order.cpu().numpy(),
            int(self.rows.max()) if len(self.rows) else -1,
            None if self.host is None else self.host.chunks,
        )
        object.__setattr__(self, "host", host)
        owner = torch.from_numpy(owner_of(host.group_ptr))
        object.__setattr__(self, "group_row", owner.to(self.rows.device))

    @property
    def token_ptr(self) -> Tensor:
        """[G + 1] int64, offsets into `tokens`."""
        return self.members.listed().ptr

    @property
    def tokens(self) -> Tensor:
        """[N] int64, the student tokens of each group."""
        return self.members.listed().tokens

    @property
    def token_group(self) -> Tensor:
        """[N] int64, the group of each token."""
        return self.members.listed().group

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
        groups, group_ptr = _picked(targets.group_indptr, kept)
        ranges, range_ptr = _picked(targets.range_indptr, groups)
        starts = targets.starts[ranges].astype(np.int64)
        ends = targets.ends[ranges].astype(np.int64)
        members = GroupTokens(
            torch.from_numpy(range_ptr), torch.from_numpy(starts), torch.from_numpy(ends),
            torch.from_numpy(np.array(tokens)), int((ends - starts).sum()),
        )  # fmt: skip
        made = cls(
            torch.from_numpy(sample[kept] * length + position[kept] - 1),
            torch.from_numpy(_ptr(np.bincount(chunk[kept], minlength=len(own_sample)))),
            torch.from_numpy(targets.tails[kept]),
            torch.from_numpy(targets.open[kept]),
            torch.from_numpy(group_ptr),
            torch.from_numpy(targets.probs[groups]),
            torch.from_numpy(targets.depths[groups].astype(np.int64)),
            members,
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
        if self.host.fits(size):
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
            GroupTokens.of_lists(offsets_of(in_group[kept]), self.tokens[said]),
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
        moved = copy(self)  # what the host knows of them is the same
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Tensor):
                object.__setattr__(moved, each.name, move(value))
        object.__setattr__(moved, "members", self.members.mapped(move))
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
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def _picked(ptr: NDArray[Any], kept: _Int64 | slice) -> tuple[_Int64 | slice, _Int64]:
    """What lies in the kept ranges of `ptr`, and offsets of each range in it."""
    if isinstance(kept, slice) or _in_one_piece(kept):
        first = kept.start if isinstance(kept, slice) else int(kept[0])
        last = kept.stop if isinstance(kept, slice) else int(kept[-1]) + 1
        own = ptr[first : last + 1].astype(np.int64)
        return slice(int(own[0]), int(own[-1])), own - own[0]
    starts, ends = ptr[kept].astype(np.int64), ptr[kept + 1].astype(np.int64)
    sizes = ends - starts
    offsets = _ptr(sizes)
    return np.repeat(starts - offsets[:-1], sizes) + np.arange(int(offsets[-1])), offsets


def _in_one_piece(numbers: _Int64) -> bool:
    return len(numbers) > 0 and bool((np.diff(numbers) == 1).all())
