"""Teacher targets and student masses of the compared prefixes, per block.

The teacher's side is made for many chunks at once, as it is many small operations; the student's
with each block of rows.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from xtoken.losses.engine.places import Places
from xtoken.losses.engine.row_blocks import Block
from xtoken.losses.prefix_kl.compared_prefixes import PrefixItems
from xtoken.losses.prefix_kl.slots import SlotLayout, SlotTargets, below_log_mass, next_log_mass
from xtoken.losses.prefix_kl.teacher_entries import TeacherEntries
from xtoken.tensors.trie import TrieSlots

# Tokens below the nodes that are laid out at a time: a few arrays of 16 MB.
_TOKENS_AT_ONCE = 2**21


@dataclass(frozen=True, eq=False)
class PrefixBlock:
    """Items with their slots and what the teacher says there.

    Attributes:
        mirrored: the teacher has the tokens below, the student says the next piece.
        chunk, depth: [N] int64; chunks are counted from the batch's first.
        known: [N] the teacher's known mass, 1 for full logits.
    """

    mirrored: bool
    layout: SlotLayout
    targets: SlotTargets
    chunk: Tensor
    depth: Tensor
    known: Tensor

    def part(self, start: int, stop: int) -> PrefixBlock:
        """Items [start, stop)."""
        if (start, stop) == (0, len(self.layout)):
            return self
        items = slice(start, stop)
        return PrefixBlock(
            self.mirrored,
            self.layout.part(start, stop),
            self.targets.part(self.layout, start, stop),
            self.chunk[items],
            self.depth[items],
            self.known[items],
        )

    def narrowed(self, places: Places) -> PrefixBlock:
        """The same in chunks counted from the block's first, with items that nobody compares: of
        lengths that are one symbol to the compiler."""
        return PrefixBlock(
            self.mirrored,
            self.layout.narrowed(places),
            self.targets.narrowed(places),
            places.item(self.chunk - places.start, places.size - 1),
            places.item(self.depth, 0),
            places.item(self.known, 0),
        )

    def pick(self, rows: Tensor, row: Tensor) -> Tensor:
        """What the items read of the student.

        Args:
            rows: [n, V_s] logits, or of the columns that `PrefixPart.places` has; the first row of
                an item's chunk is at `row` [N].

        Returns: [K] logits of the tokens below, or mirrored [N, V_s] the row of each depth.
        """
        if self.mirrored:
            return rows[row + self.depth]
        return rows.flatten()[self._entries(rows, row)]

    def put_back(self, grad: Tensor, row: Tensor, picked: Tensor) -> None:
        """Add the gradient of what was picked to that of the rows, which is contiguous."""
        if self.mirrored:
            grad.index_add_(0, row + self.depth, picked)
        else:
            grad.view(-1).index_add_(0, self._entries(grad, row), picked)

    def _entries(self, rows: Tensor, row: Tensor) -> Tensor:
        at = row[self.layout.token_item]
        return torch.add(self.layout.tokens, at, alpha=rows.shape[1])

    def student_log_mass(self, picked: Tensor) -> Tensor:
        """[S] log mass of each slot, up to a factor per item."""
        if not self.mirrored:
            return below_log_mass(self.layout, picked)
        layout = self.layout
        children = picked[layout.item, layout.piece.clamp(min=0)]
        # Summed without the children, never 1 minus their sum: that would lose a small END. What is
        # no child has a column of its own past the last.
        others = torch.nn.functional.pad(picked, (0, 1), value=-torch.inf)
        column = layout.piece.masked_fill(~layout.child, picked.shape[1])
        others = others.index_put(
            (layout.item, column), others.new_full((), -torch.inf), accumulate=False
        )
        return next_log_mass(layout, children, torch.logsumexp(others, 1))


class Part(Protocol):
    """One of the two constructions."""

    def block(self, block: Block) -> PrefixBlock | None:
        """The items of a block of chunks; None where it has none."""

    def narrowed(self, places: Places) -> Part:
        """The same of these chunks alone."""


@dataclass(frozen=True, eq=False)
class ReadyPart:
    """The one of a block whose items are made."""

    made: PrefixBlock

    def block(self, block: Block) -> PrefixBlock:
        """As `Part`."""
        return self.made

    def narrowed(self, places: Places) -> ReadyPart:
        """As `Part`."""
        return self


@dataclass(eq=False)
class PrefixPart:
    """One of the two constructions over a batch.

    Attributes:
        trie, items: of the side that has several tokens in a chunk.
        mirrored: see `PrefixBlock`.
        entries: what the teacher says.
        teacher_first: [C] int64, the flat position that predicts each chunk's first teacher token.
        min_mass, end: as in `prefix_kl`.
        places: [V_s + 1] int64, each token's column in the rows; None where it is its id.
    """

    trie: TrieSlots
    items: PrefixItems
    mirrored: bool
    entries: TeacherEntries
    teacher_first: Tensor
    min_mass: float
    end: bool
    places: Tensor | None = None
    _ready: tuple[int, PrefixBlock] | None = field(default=None, repr=False)
    _token_ends: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._token_ends = self.trie.ends(self.items.host_node)[1].tolist()

    def block(self, block: Block) -> PrefixBlock | None:
        """The items of a block of chunks; None where it has none. Cheap in rising order."""
        low, high = int(self.items.ptr[block.start]), int(self.items.ptr[block.stop])
        if low == high:
            return None
        if self._ready is None or not (
            self._ready[0] <= low and high <= self._ready[0] + len(self._ready[1].layout)
        ):
            most = bisect_right(self._token_ends, self._token_ends[low] + _TOKENS_AT_ONCE) - 1
            self._ready = (low, self._make(low, max(high, most)))
        start, ready = self._ready
        return ready.part(low - start, high - start)

    def narrowed(self, places: Places) -> ReadyPart:
        """As `Part`; where no chunk of the block has an item, all are fillers."""
        found = self.block(Block(places.start, places.stop, None))
        if found is None:
            none = self.items.chunk[:0]
            no, nothing = none.bool(), torch.zeros(0, dtype=self.entries.dtype, device=none.device)
            layout = SlotLayout(none, none, none, none, none, none, no, [], [])
            targets = SlotTargets(nothing, nothing, no, no, nothing)
            found = PrefixBlock(self.mirrored, layout, targets, none, none, nothing)
        return ReadyPart(found.narrowed(places))

    @torch.no_grad()
    def _make(self, low: int, high: int) -> PrefixBlock:
        chunk, depth = self.items.chunk[low:high], self.items.depth[low:high]
        layout = SlotLayout.build(
            self.trie, self.items.node[low:high], self.items.host_node[low:high]
        )
        make = self._below if self.mirrored else self._next
        layout, targets, known = make(layout, self.teacher_first[chunk], depth)
        if self.places is not None:
            layout = replace(layout, tokens=self.places[layout.tokens])
        return PrefixBlock(self.mirrored, layout, targets, chunk, depth, known)

    def _next(self, layout: SlotLayout, at: Tensor, depth: Tensor) -> _Made:
        """The teacher's next piece after each prefix."""
        children, rest, known = self.entries.read(
            at + depth, layout.slot_ends, layout.item, layout.piece
        )
        on_children = torch.zeros_like(rest).index_add(0, layout.item, torch.exp(children))
        # NaN counts: it is to be told.
        counted = layout.has_end & self.end | ~(on_children < self.min_mass)
        if self.entries.is_stored:
            # What is not stored is in `rest`, and so in END.
            layout = layout.without(torch.isneginf(children), self.end)
        log_mass = next_log_mass(layout, children, rest)
        return layout, SlotTargets.build(layout, log_mass, counted, self.end), known

    def _below(self, layout: SlotLayout, at: Tensor, depth: Tensor) -> _Made:
        """The teacher's tokens below each prefix."""
        entries, _, known = self.entries.read(
            at, layout.token_ends, layout.token_item, layout.tokens
        )
        log_mass = below_log_mass(layout, entries)
        counted = torch.ones_like(layout.has_end)
        if self.entries.is_stored:
            # Where what ends here is unknown, END cannot be told from the rest.
            unknown = torch.isneginf(log_mass)
            counted = ~layout.has_end | ~unknown[layout.first]
            layout = layout.without(unknown, self.end)
        return layout, SlotTargets.build(layout, log_mass, counted, self.end), known


_Made = tuple[SlotLayout, SlotTargets, Tensor]
