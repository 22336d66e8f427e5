"""The slots of trie nodes as ragged rows: masses below them, and divergences over them.

An item is one (chunk, depth) with its node; its slots are the ways to go on from there. One model
has the tokens below the node and sums them up by slot, the other predicts the next piece and has
all that is no child in END. Everything is in log space, flat, and a segment operation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..sparse import ragged_arange
from .divergence import Direction, divergence
from .prefix_nodes import TrieSlots


@dataclass(frozen=True, eq=False)
class SlotLayout:
    """The slots of a block of items, N items with S slots and K tokens below them.

    Attributes:
        item: [S] int64, rising, the item of each slot.
        first: [N] int64, each item's first slot, which is END where `has_end`.
        piece: [S] int64, the piece that leads to the slot; -1 for END.
        tokens: [K] int64, ids below the items' nodes, by slot.
        token_slot: [K] int64, rising, the slot of each token.
        has_end: [N] bool, some token ends at the node.
    """

    item: Tensor
    first: Tensor
    piece: Tensor
    tokens: Tensor
    token_slot: Tensor
    has_end: Tensor

    @classmethod
    def of(cls, trie: TrieSlots, node: Tensor) -> SlotLayout:
        """The slots of `node` [N] int64, one item each."""
        start = trie.slot_ptr[node]
        counts = trie.slot_ptr[node + 1] - start
        slot = ragged_arange(start, counts)  # [S]
        item = torch.repeat_interleave(torch.arange(len(node), device=node.device), counts)
        sizes = trie.slot_sizes[slot]
        below = sizes.new_zeros(len(node)).index_add(0, item, sizes)
        piece = trie.slot_pieces[slot]
        first = counts.cumsum(0) - counts
        return cls(
            item,
            first,
            piece,
            trie.tokens[ragged_arange(trie.node_starts[node], below)],
            torch.repeat_interleave(torch.arange(len(slot), device=node.device), sizes),
            piece[first] < 0,
        )

    def __len__(self) -> int:
        return self.first.shape[0]

    @property
    def child(self) -> Tensor:
        """[S] bool, the slots that are no END."""
        return self.piece >= 0


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, segment: Tensor, count: int) -> Tensor:
        top = values.new_full((count,), -torch.inf).scatter_reduce_(0, segment, values, "amax")
        shift = torch.where(torch.isneginf(top), torch.zeros_like(top), top)
        exps = torch.exp(values - shift[segment])
        sums = torch.zeros_like(top).index_add_(0, segment, exps)
        ctx.save_for_backward(exps, sums, segment)
        return torch.log(sums).add_(shift)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        exps, sums, segment = ctx.saved_tensors
        # An empty segment passes nothing on: 0 / 0 there is no gradient.
        share = torch.where(sums > 0, grad / sums, torch.zeros_like(sums))
        return exps * share[segment], None, None


def segment_logsumexp(values: Tensor, segment: Tensor, count: int) -> Tensor:
    """[count] log of the sum of exp(values [K]) by segment [K] int64; -inf for none."""
    result: Tensor = _LogSumExp.apply(values, segment, count)
    return result


def below_log_mass(layout: SlotLayout, values: Tensor) -> Tensor:
    """[S] log mass of each slot, up to a factor an item, from the tokens' logits [K]."""
    return segment_logsumexp(values, layout.token_slot, len(layout.item))


def next_log_mass(layout: SlotLayout, children: Tensor, rest: Tensor) -> Tensor:
    """[S] log mass of each slot, from those of the next pieces.

    Args:
        children: [S], the log mass of each slot's piece; what stands at END is not read.
        rest: [N], the log mass of all that is no child, which END gets; same scale.
    """
    return torch.where(layout.child, children, rest[layout.item])


def slot_divergence(
    layout: SlotLayout,
    log_teacher: Tensor,
    log_student: Tensor,
    *,
    stored: Tensor | None,
    end: bool,
    direction: Direction,
    beta: float,
) -> Tensor:
    """[N] divergence of the two models over each item's slots, both normalized there.

    Args:
        log_teacher, log_student: [S] log masses, up to a factor an item.
        stored: [S] bool or None; slots of which the teacher's stored top-k says nothing count in
            END on both sides, or for neither where there is no END.
        end: whether END is a slot.
    """
    count = len(layout)
    valid = layout.child | end
    if stored is not None:
        has_end = layout.has_end[layout.item] & end
        outside = layout.child & ~stored
        own = torch.arange(len(layout.item), device=layout.item.device)
        target = torch.where(outside & has_end, layout.first[layout.item], own)
        # The teacher's share is in its END already, by the meaning of `rest`.
        log_student = segment_logsumexp(log_student, target, len(own))
        valid = valid & ~outside
    log_teacher, told = _normalized(layout, log_teacher, valid)
    log_student, known = _normalized(layout, log_student, valid)
    terms = divergence(log_teacher[:, None], log_student[:, None], direction, beta)  # [S]
    terms = torch.where(valid & (told & known)[layout.item], terms, torch.zeros_like(terms))
    return terms.new_zeros(count).index_add(0, layout.item, terms)


def _normalized(layout: SlotLayout, log_mass: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """[S] log-probabilities over each item's valid slots (0 elsewhere); [N] whether it has mass."""
    log_mass = log_mass.masked_fill(~valid, -torch.inf)
    total = segment_logsumexp(log_mass, layout.item, len(layout))
    some = ~torch.isneginf(total)
    keep = valid & some[layout.item]
    # Both branches finite, so that no NaN reaches the gradient of what is left out.
    total = torch.where(some, total, torch.zeros_like(total))
    return torch.where(keep, log_mass, torch.zeros_like(log_mass)) - torch.where(
        keep, total[layout.item], torch.zeros_like(log_mass)
    ), some
