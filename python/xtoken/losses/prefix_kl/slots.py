"""The slots of trie nodes as ragged rows: masses below them, and divergences over them.

An item is one (chunk, depth) with its node; its slots are the ways to go on from there. One model
has the tokens below the node and sums them up by slot, the other predicts the next piece and has
all that is no child in END. Everything is in log space, flat, and a segment operation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.losses.engine.divergence import Direction, divergence
from xtoken.losses.engine.places import Places
from xtoken.tensors.segments import owners, ragged_arange, segment_logsumexp
from xtoken.tensors.trie import TrieSlots

# What a slot has in place of a piece.
END, NOWHERE = -1, -2


@dataclass(frozen=True, eq=False)
class SlotLayout:
    """The slots of N items: S slots, K tokens below them.

    Attributes:
        item: [S] int64, rising, the item of each slot.
        first: [N] int64, each item's first slot, which is END where `has_end`.
        piece: [S] int64, the piece that leads to the slot; END, or NOWHERE for no slot at all.
        tokens: [K] int64, ids below the items' nodes, by slot.
        token_slot: [K] int64, the slot that each token counts in.
        token_item: [K] int64, rising, its item.
        has_end: [N] bool, some token ends at the node.
        slot_ends, token_ends: N + 1 ints, the range of each item's slots and tokens.
    """

    item: Tensor
    first: Tensor
    piece: Tensor
    tokens: Tensor
    token_slot: Tensor
    token_item: Tensor
    has_end: Tensor
    slot_ends: list[int]
    token_ends: list[int]

    @classmethod
    def build(cls, trie: TrieSlots, node: Tensor, host_node: NDArray[np.int64]) -> SlotLayout:
        """The slots of `node` [N] int64, one item each; `host_node` has the same on the host."""
        slot_ends, token_ends = trie.ends(host_node)
        slots, tokens = int(slot_ends[-1]), int(token_ends[-1])
        start = trie.slot_ptr[node]
        counts = trie.slot_ptr[node + 1] - start
        slot = ragged_arange(start, counts, slots)  # [S]
        item = owners(counts, slots)
        sizes = trie.slot_sizes[slot]
        below = trie.node_sizes[node]
        piece = trie.slot_pieces[slot]
        ends = counts.cumsum(0)
        return cls(
            item,
            ends - counts,
            piece,
            trie.below(node, tokens),
            owners(sizes, tokens),
            owners(below, tokens),
            piece[ends - counts] < 0,
            slot_ends.tolist(),
            token_ends.tolist(),
        )

    def __len__(self) -> int:
        return self.first.shape[0]

    @property
    def child(self) -> Tensor:
        """[S] bool, the slots of next pieces."""
        return self.piece >= 0

    def without(self, unknown: Tensor, end: bool) -> SlotLayout:
        """The same with no slot for the children of `unknown` [S] bool, which a stored top-k does
        not hold: they count in END, or nowhere where there is none."""
        unknown = unknown & self.child
        to_end = unknown & (self.has_end[self.item] & end)
        own = torch.arange(len(self.item), device=self.item.device)
        slot = torch.where(to_end, self.first[self.item], own)
        piece = self.piece.masked_fill(unknown, NOWHERE)
        return replace(self, piece=piece, token_slot=slot[self.token_slot])

    def narrowed(self, places: Places) -> SlotLayout:
        """With two items that nobody compares, of one slot and one token each."""
        items, slots = len(self), len(self.item)
        return SlotLayout(
            _and_two(places, self.item, items),
            _and_two(places, self.first, slots),
            places.item(self.piece, NOWHERE),
            places.item(self.tokens, 0),
            _and_two(places, self.token_slot, slots),
            _and_two(places, self.token_item, items),
            places.item(self.has_end, False),
            [],
            [],
        )

    def part(self, start: int, stop: int) -> SlotLayout:
        """Items [start, stop), counted from 0."""
        slots = slice(self.slot_ends[start], self.slot_ends[stop])
        tokens = slice(self.token_ends[start], self.token_ends[stop])
        return SlotLayout(
            self.item[slots] - start,
            self.first[start:stop] - slots.start,
            self.piece[slots],
            self.tokens[tokens],
            self.token_slot[tokens] - slots.start,
            self.token_item[tokens] - start,
            self.has_end[start:stop],
            [end - slots.start for end in self.slot_ends[start : stop + 1]],
            [end - tokens.start for end in self.token_ends[start : stop + 1]],
        )


def _and_two(places: Places, values: Tensor, following: int) -> Tensor:
    """The values, `following` and the next."""
    filled = places.item(values, following)
    filled[-1] += 1
    return filled


def below_log_mass(layout: SlotLayout, values: Tensor) -> Tensor:
    """[S] log mass of each slot, up to a factor per item, from the tokens' logits [K]."""
    return segment_logsumexp(values, layout.token_slot, len(layout.item))


def next_log_mass(layout: SlotLayout, children: Tensor, rest: Tensor) -> Tensor:
    """[S] log mass of each slot, from those of the next pieces.

    Args:
        children: [S], the log mass of each slot's piece; what stands at END is not read.
        rest: [N], the log mass of all that is no child, which END gets; same scale.
    """
    return torch.where(layout.child, children, rest[layout.item])


@dataclass(frozen=True, eq=False)
class SlotTargets:
    """What the teacher says over the slots of N items, ready to be compared.

    Attributes:
        log_probs: [S], over each item's valid slots; 0 on the others.
        probs: [S] their exponentials, 0 on the others.
        valid: [S] bool, the slots that are compared.
        counted: [N] bool, the items that are compared.
        negentropy: [N] the sum of probs * log_probs.
    """

    log_probs: Tensor
    probs: Tensor
    valid: Tensor
    counted: Tensor
    negentropy: Tensor

    @classmethod
    def build(cls, layout: SlotLayout, log_mass: Tensor, counted: Tensor, end: bool) -> SlotTargets:
        """
        Args:
            log_mass: [S] the teacher's, up to a factor per item.
            counted: [N] bool.
            end: whether END is a slot.
        """
        valid = layout.child | (end & (layout.piece == END))
        log_probs, some = _normalized(layout, log_mass, valid)
        counted = counted & some
        valid = valid & counted[layout.item]
        probs = torch.where(valid, torch.exp(log_probs), 0.0)
        terms = torch.where(probs > 0, probs * log_probs, 0.0)
        negentropy = terms.new_zeros(len(layout)).index_add(0, layout.item, terms)
        return cls(log_probs, probs, valid, counted, negentropy)

    def part(self, layout: SlotLayout, start: int, stop: int) -> SlotTargets:
        """Those of items [start, stop) of `layout`."""
        slots = slice(layout.slot_ends[start], layout.slot_ends[stop])
        return SlotTargets(
            self.log_probs[slots],
            self.probs[slots],
            self.valid[slots],
            self.counted[start:stop],
            self.negentropy[start:stop],
        )

    def narrowed(self, places: Places) -> SlotTargets:
        """Beside `SlotLayout.narrowed`."""
        return SlotTargets(
            places.item(self.log_probs, 0),
            places.item(self.probs, 0),
            places.item(self.valid, False),
            places.item(self.counted, False),
            places.item(self.negentropy, 0),
        )

    def divergence(
        self, layout: SlotLayout, log_mass: Tensor, direction: Direction, beta: float
    ) -> Tensor:
        """[N] divergence of the two models over each item's valid slots.

        Args:
            log_mass: [S] the student's, up to a factor per item.
        """
        log_student, some = _normalized(layout, log_mass, self.valid)
        terms = divergence(self.log_probs[:, None], log_student[:, None], direction, beta)  # [S]
        kept = self.valid & some[layout.item]
        terms = torch.where(kept, terms, torch.zeros_like(terms))
        return terms.new_zeros(len(layout)).index_add(0, layout.item, terms)


def _normalized(layout: SlotLayout, log_mass: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """[S] log-probabilities over each item's valid slots (0 elsewhere); [N] whether it has mass."""
    log_mass = log_mass.masked_fill(~valid, -torch.inf)
    total = segment_logsumexp(log_mass, layout.item, len(layout))
    some = ~torch.isneginf(total)
    keep = valid & some[layout.item]
    # Masked before the difference, so that no NaN reaches the gradient of what is left out.
    total = total.masked_fill(~some, 0.0)[layout.item]
    return torch.where(keep, log_mass, total) - total, some
