"""Prefix KL by kernels: P-KL's for the root, then the slots of each prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
import torch
from torch import Tensor

from xtoken.losses.engine.row_blocks import Block, Later
from xtoken.losses.engine.student_rows import LogitRows, StudentRows
from xtoken.losses.kernels import launch, self_check
from xtoken.losses.kernels.choice import on_device_of, takes
from xtoken.losses.kernels.exact import GroupedKL, Groups
from xtoken.losses.kernels.launch import Compared, Found, GradientBuffer, Rows, cdiv, floats, times
from xtoken.losses.kernels.p_kl import p_kl_compared, p_kl_pass
from xtoken.losses.prefix_kl.slots import END
from xtoken.losses.prefix_kl.targets import PrefixBlock, PrefixPart
from xtoken.tensors.host import on_device
from xtoken.tensors.segments import owners

if TYPE_CHECKING:
    from xtoken.losses.prefix_kl.block import PrefixKLBlocks

# Chunks whose prefixes are compared at a time, and slots and tokens of each that a program sums up.
_CHUNKS, _SLOTS, _WIDTH = 1024, 32, 16


def prefix_pass(
    loss: PrefixKLBlocks,
    source: StudentRows,
    scale: float | Tensor,
    needed: tuple[bool, ...],
    grads: list[Tensor | None] | None,
) -> Found | None:
    """The whole pass over a batch by kernels; None where torch computes it."""
    if not _takes(source, loss):
        return None
    root = p_kl_pass(loss.root, source, scale * loss.depth_weights[0], needed, grads)
    if root is None:
        return None
    total, sums, made = root
    slope, later = sums[-1], sums.new_zeros(3)
    with on_device_of(source.logits):
        for items, compared in _Items(loss, source).compared():
            total = total + compared.total * scale
            later = later + _counted(items, compared.losses)
            if made[0] is not None:
                slope = slope + compared.write(scale, made[0]).sum()
    return total, torch.cat([sums[:-1], later, slope[None]]), made


def prefix_in_two(
    loss: PrefixKLBlocks, source: StudentRows, scale: float | Tensor
) -> tuple[Tensor, Tensor, Later] | None:
    """The value now and the gradient later, see `BlockLoss.in_two`."""
    if not _takes(source, loss):
        return None
    root, depth_zero = p_kl_compared(loss.root, source), loss.depth_weights[0]
    if root is None:
        return None
    total, later = root.total * depth_zero, root.total.new_zeros(3)
    writes: list[_Write] = []
    with on_device_of(source.logits):
        for items, compared in _Items(loss, source).compared():
            total = total + compared.total
            later = later + _counted(items, compared.losses)
            writes.append(compared.write)

    def write(scale: float | Tensor, gradient: GradientBuffer) -> Tensor:
        checks = [root.write(scale * depth_zero, gradient)]
        grad = gradient.flat.view(source.logits.shape)
        checks += [each(scale, grad) for each in writes]
        return torch.stack([each.sum() for each in checks])

    sums = [*root.sums, *later]
    return Compared(source, root.index, total, sums, write, root.params).in_two(scale)


def _takes(source: StudentRows, loss: PrefixKLBlocks) -> TypeGuard[LogitRows]:
    if not isinstance(source, LogitRows):
        return False
    if not all(isinstance(part, PrefixPart) for part in loss.parts):
        return False
    loss.root.weights = loss.weights
    return takes("prefix-kl", self_check.prefix_kl, source.logits)


def _counted(items: PrefixBlock, losses: Tensor) -> Tensor:
    """[3] sums of divergence, items and known mass."""
    counted = items.targets.counted.to(losses.dtype)
    return torch.stack(
        [losses.sum(), counted.sum(), (items.known.to(losses.dtype) * counted).sum()]
    )


# Adds a scale times the gradient to that of the logits, which the root has written; what is finite
# where all of it is.
_Write = Callable[["float | Tensor", Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class _Compared:
    """Some items once compared.

    Attributes:
        losses: [N] of each.
        own: [N] float32, its factor.
        write: the gradient of `total`.
    """

    losses: Tensor
    own: Tensor
    write: _Write

    @property
    def total(self) -> Tensor:
        return (self.losses * self.own).sum()


@dataclass(frozen=True, eq=False)
class _Items:
    """All items of a batch."""

    loss: PrefixKLBlocks
    source: LogitRows

    def compared(self) -> Iterator[tuple[PrefixBlock, _Compared]]:
        """Each block of them."""
        for part in self.loss.parts:
            assert isinstance(part, PrefixPart)
            for start in range(0, self.loss.student.count, _CHUNKS):
                block = Block(start, min(start + _CHUNKS, self.loss.student.count), None)
                items = part.block(block)
                if items is not None:
                    compare = self.next_pieces if items.mirrored else self.tokens_below
                    yield items, compare(part, block, items)

    def weights(self, items: PrefixBlock) -> Tensor:
        """[N] float32, the factor of each item's loss."""
        loss = self.loss
        own = loss.depth_factors(items.depth, items.targets.negentropy).to(torch.float32)
        if loss.weights is not None:
            own = own * loss.weights[items.chunk].to(torch.float32)
        return own

    def tokens_below(self, part: PrefixPart, block: Block, items: PrefixBlock) -> _Compared:
        """By the student's tokens below."""
        from xtoken.losses.kernels.device import exact, prefix

        loss, layout, targets, trie = self.loss, items.layout, items.targets, part.trie
        low, high = int(part.items.ptr[block.start]), int(part.items.ptr[block.stop])
        node, count, tau = part.items.node[low:high], high - low, loss.root.temperature
        slots, listed = len(layout.item), len(layout.tokens)
        slot = trie.slot_ptr[node][layout.item]
        place = torch.arange(slots, device=node.device)
        sizes = trie.slot_sizes[slot + place - layout.first[layout.item]]
        token_ptr = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        token_slot = owners(sizes, listed)
        tokens = layout.tokens if loss.columns is None else loss.columns[layout.tokens]
        index = loss.root.student.index[block.start : block.stop]
        z = Rows.of(self.source.logits, index)
        rows = z.offsets[items.chunk - block.start]
        logs, slot_stats = floats(z.tensor, slots), floats(z.tensor, slots, 3)
        losses = floats(z.tensor, count)
        exact.group_logs[(cdiv(slots, _SLOTS),)](
            z.tensor, rows, z.step, tokens, token_ptr, layout.item, logs, 0, slots, 0, 1 / tau,
            GROUPS=_SLOTS, WIDTH=_WIDTH,
        )  # fmt: skip
        last = torch.cat([layout.first[1:], layout.first.new_full((1,), slots)])
        prefix.items[(count,)](
            logs, layout.piece, targets.probs, targets.valid.to(torch.int8), layout.first, last,
            targets.negentropy, targets.counted.to(torch.int8), slot_stats, losses, BLOCK=64,
        )  # fmt: skip
        own, chunks = self.weights(items), len(block)
        item_ptr = np.asarray(part.items.ptr[block.start : block.stop + 1]) - low
        starts = on_device(item_ptr, index.device)
        below, ends = trie.node_sizes[node], token_ptr[last]

        def write(scale: float | Tensor, grad: Tensor) -> Tensor:
            gradient, checks = GradientBuffer.made(grad, index), floats(own, chunks)
            prefix.gradient[(chunks,)](
                z.tensor, z.offsets, z.step, starts, trie.node_starts[node], below, ends - below,
                token_slot, tokens, slot_stats, times(own, scale) / tau, gradient.flat,
                gradient.rows, checks, 1 / tau, BLOCK=launch.BLOCK,
            )  # fmt: skip
            return checks

        return _Compared(losses, own, write)

    def next_pieces(self, part: PrefixPart, block: Block, items: PrefixBlock) -> _Compared:
        """The same where the student says the next piece: each slot a token, END all the rest."""
        loss, layout, targets = self.loss, items.layout, items.targets
        slots, count = len(layout.item), len(layout)
        ends = (layout.piece[layout.first] == END) & targets.valid[layout.first]
        tails = torch.where(ends, targets.probs[layout.first], 0.0)
        place = torch.arange(slots + 1, device=layout.item.device)
        groups = Groups(
            torch.where(layout.child, layout.piece, -1), place[:-1], layout.item, place,
            torch.cat([layout.first, place[-1:]]), torch.where(layout.child, targets.probs, 0.0),
            torch.zeros_like(layout.piece), tails, (~ends).to(torch.int8),
            (0, count), (0, slots), (0, slots),
        )  # fmt: skip
        index = loss.root.student.index[items.chunk] + items.depth
        own, tau = self.weights(items), loss.root.temperature
        z = Rows.of(self.source.logits, index)
        kl = GroupedKL.of(z, groups, self.source.vocab_size, tau=tau)

        def write(scale: float | Tensor, grad: Tensor) -> Tensor:
            return kl.write(times(own, scale) / tau, GradientBuffer.made(grad, index))

        return _Compared(kl.stats[:, 2], own, write)
