"""Prefix KL by kernels: P-KL's for the root, then the slots of each prefix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from xtoken.losses.engine.row_blocks import Block
from xtoken.losses.engine.student_rows import LogitRows, StudentRows
from xtoken.losses.kernels import launch, self_check
from xtoken.losses.kernels.choice import on_device_of, takes
from xtoken.losses.kernels.exact import Groups, grouped_kl
from xtoken.losses.kernels.launch import Found, GradientBuffer, Rows, cdiv, floats
from xtoken.losses.kernels.p_kl import p_kl_pass
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
    if not isinstance(source, LogitRows):
        return None
    if not all(isinstance(part, PrefixPart) for part in loss.parts):
        return None
    if not takes("prefix-kl", self_check.prefix_kl, source.logits):
        return None
    loss.root.weights = loss.weights
    depth_zero = loss.depth_weights[0]
    root = p_kl_pass(loss.root, source, scale * depth_zero, needed, grads)
    if root is None:
        return None
    with on_device_of(source.logits):
        return _with_items(loss, source, scale, root)


def _with_items(
    loss: PrefixKLBlocks, source: LogitRows, scale: float | Tensor, root: Found
) -> Found:
    """The root's pass with what is beyond it."""
    total, sums, made = root
    slope, later = sums[-1], sums.new_zeros(3)
    run = _Items(loss, source, scale, made[0])
    for part in loss.parts:
        assert isinstance(part, PrefixPart)
        for start in range(0, loss.student.count, _CHUNKS):
            block = Block(start, min(start + _CHUNKS, loss.student.count), None)
            items = part.block(block)
            if items is not None:
                compare = run.next_pieces if items.mirrored else run.tokens_below
                losses, weights, checks = compare(part, block, items)
                total = total + (losses * weights).sum() * scale
                later = later + _counted(items, losses)
                slope = slope if checks is None else slope + checks.sum()
    return total, torch.cat([sums[:-1], later, slope[None]]), made


def _counted(items: PrefixBlock, losses: Tensor) -> Tensor:
    """[3] sums of divergence, items and known mass."""
    counted = items.targets.counted.to(losses.dtype)
    return torch.stack(
        [losses.sum(), counted.sum(), (items.known.to(losses.dtype) * counted).sum()]
    )


@dataclass(frozen=True, eq=False)
class _Items:
    """What is the same for all items of a batch.

    Attributes:
        grad: like the logits, what the root has written; None without one.
    """

    loss: PrefixKLBlocks
    source: LogitRows
    scale: float | Tensor
    grad: Tensor | None

    def weights(self, items: PrefixBlock) -> tuple[Tensor, Tensor]:
        """[N] float32, the factor of each item's loss, and that of its gradient."""
        loss = self.loss
        own = loss.depth_factors(items.depth, items.targets.negentropy).to(torch.float32)
        if loss.weights is not None:
            own = own * loss.weights[items.chunk].to(torch.float32)
        return own, own * (self.scale / loss.root.temperature)

    def tokens_below(
        self, part: PrefixPart, block: Block, items: PrefixBlock
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Each item's loss and weight, and the gradient's check: the student's tokens below."""
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
            z.tensor, rows, z.step, tokens, token_ptr, layout.item, logs, 0, slots, 0, tau,
            GROUPS=_SLOTS, WIDTH=_WIDTH,
        )  # fmt: skip
        last = torch.cat([layout.first[1:], layout.first.new_full((1,), slots)])
        prefix.items[(count,)](
            logs, layout.piece, targets.probs, targets.valid.to(torch.int8), layout.first, last,
            targets.negentropy, targets.counted.to(torch.int8), slot_stats, losses, BLOCK=64,
        )  # fmt: skip
        own, seed = self.weights(items)
        if self.grad is None:
            return losses, own, None
        chunks = len(block)
        gradient = GradientBuffer.made(self.grad, index)
        item_ptr = np.asarray(part.items.ptr[block.start : block.stop + 1]) - low
        below, ends = trie.node_sizes[node], token_ptr[last]
        checks = floats(z.tensor, chunks)
        prefix.gradient[(chunks,)](
            z.tensor, z.offsets, z.step, on_device(item_ptr, index.device), trie.node_starts[node],
            below, ends - below, token_slot, tokens, slot_stats, seed, gradient.flat, gradient.rows,
            checks, tau, BLOCK=launch.BLOCK,
        )  # fmt: skip
        return losses, own, checks

    def next_pieces(
        self, part: PrefixPart, block: Block, items: PrefixBlock
    ) -> tuple[Tensor, Tensor, Tensor | None]:
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
        own, seed = self.weights(items)
        gradient = None if self.grad is None else GradientBuffer.made(self.grad, index)
        stats, checks = grouped_kl(
            Rows.of(self.source.logits, index), groups, self.source.vocab_size, seed, gradient,
            tau=loss.root.temperature,
        )  # fmt: skip
        return stats[:, 2], own, checks
