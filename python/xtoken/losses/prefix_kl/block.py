"""Prefix KL of a block of chunks, as the row-block engine runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from xtoken.losses.engine.merge import ChunkRows
from xtoken.losses.engine.places import Places
from xtoken.losses.engine.row_blocks import Block, BlockLoss, Later, seed_like
from xtoken.losses.engine.run import LossCall
from xtoken.losses.engine.student_rows import StudentRows
from xtoken.losses.kernels.prefix import prefix_in_two, prefix_pass
from xtoken.losses.p_kl.block import PKLBlocks
from xtoken.losses.prefix_kl.closed_form import forward_kl_below, forward_kl_next
from xtoken.losses.prefix_kl.native import native_prefix_pass
from xtoken.losses.prefix_kl.targets import Part, PrefixBlock, PrefixPart
from xtoken.tensors.host import on_device, readable
from xtoken.tensors.projection import places_of


@dataclass(eq=False, kw_only=True)
class PrefixKLBlocks(BlockLoss):
    """Prefix KL of a block of chunks.

    A chunk's first row is the predictor of its first token. The mirrored construction also reads
    the rows after it, one per depth. `make_narrow` makes of it the same loss over the columns that
    torch reads; None where it is this one.
    """

    student: ChunkRows
    columns: Tensor | None
    params: tuple[Tensor, ...]
    root: PKLBlocks
    parts: Sequence[Part]
    depth_weights: tuple[float, ...]
    make_narrow: Callable[[PrefixKLBlocks], PrefixKLBlocks] | None = None
    _narrow: PrefixKLBlocks | None = field(default=None, init=False, repr=False)
    has_items = True
    _heads_apart = False

    def __post_init__(self) -> None:
        later = ("prefix_kl", "prefixes", "prefix_teacher_mass")
        self.metric_names = (*self.root.metric_names, *later)
        self.params_of_any_length = self.root.params_of_any_length
        device = self.student.index.device
        ends, count = self.student.ends, self.student.count
        self._firsts = on_device(np.arange(count) if ends is None else ends[:count], device)
        self._depth_weights = on_device(np.asarray(self.depth_weights, dtype=np.float64), device)

    def forward(
        self, rows: Tensor, block: Block, params: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        first = self._first_rows(block)
        losses, sums = self.root.forward(self._heads(rows, first), block.alone(), params)
        losses = losses * self.depth_weights[0]
        later = sums.new_zeros(3)
        for part in self.parts:
            found = part.block(block)
            if found is not None:
                items, row = found, first[found.chunk - block.start]
                terms = self._compare(items, items.pick(rows, row))
                weighted = terms * self.depth_factors(items.depth, terms)
                losses = losses.index_add(0, items.chunk - block.start, weighted)
                later = later + self._counted(items, terms)
        return losses, torch.cat([sums, later])

    def by_kernel(
        self,
        source: StudentRows,
        scale: float | Tensor,
        needed: tuple[bool, ...],
        grads: list[Tensor | None] | None,
    ) -> tuple[Tensor, Tensor, list[Tensor | None]] | None:
        """As `BlockLoss`."""
        given = (self, source, scale, needed, grads)
        found = prefix_pass(*given)
        return native_prefix_pass(*given) if found is None else found

    def in_two(
        self, source: StudentRows, scale: float | Tensor
    ) -> tuple[Tensor, Tensor, Later] | None:
        """As `BlockLoss`."""
        return prefix_in_two(self, source, scale)

    def in_torch(self) -> PrefixKLBlocks:
        """As `BlockLoss`."""
        if self.make_narrow is None:
            return self
        if self._narrow is None:
            self._narrow = self.make_narrow(self)
        self._narrow.weights = self.weights
        return self._narrow

    def value_and_grad(
        self,
        rows: Tensor,
        block: Block,
        params: Sequence[Tensor],
        needed: Sequence[bool],
        scale: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
        # The root's gradient is dense in a row, that of the rest is not: autograd would make a
        # dense one of it too, and add the two.
        first = self._first_rows(block)
        self.root.weights = self.weights
        total, sums, grad, grad_params = self.root.value_and_grad(
            self._heads(rows, first), block.alone(), params, needed, scale * self.depth_weights[0]
        )
        total = total * self.depth_weights[0]
        grad = _spread(grad, first, rows)
        later = sums.new_zeros(3)
        for part in self.parts:
            items = part.block(block)
            if items is None:
                continue
            row = first[items.chunk - block.start]
            value, found, counted = self.with_grad(items, items.pick(rows.detach(), row), scale)
            items.put_back(grad, row, found)
            total = total + value
            later = later + counted
        return total, torch.cat([sums, later]), grad, grad_params

    def narrowed(self, places: Places) -> PrefixKLBlocks:
        """As `BlockLoss`; what the teacher says below the roots is made before."""
        first = self._first_rows(Block(places.start, places.stop, None))
        # A place without a chunk has a row of its own, as far as there are any.
        spare = torch.arange(places.size, device=first.device)
        first = torch.where(places.real, places.fill(first), spare)
        loss = replace(
            self,
            student=places.student,
            root=self.root.narrowed(places),
            parts=[part.narrowed(places) for part in self.parts],
        )
        loss._firsts, loss._heads_apart = first, True
        return loss

    def _first_rows(self, block: Block) -> Tensor:
        """[len(block)] each chunk's first row among those of the block."""
        ends = self.student.ends
        before = block.start if ends is None else int(ends[block.start])
        return self._firsts[block.start : block.stop] - before

    def _heads(self, rows: Tensor, first: Tensor) -> Tensor:
        """What the root reads of the rows: each chunk's first."""
        return rows[first] if self._heads_apart or len(first) != len(rows) else rows

    def with_grad(
        self, items: PrefixBlock, picked: Tensor, scale: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted sum of the divergences, `scale` times its gradient, and the sums to count."""
        weight = self.depth_factors(items.depth, picked)
        if self.weights is not None:
            weight = weight * self.weights[items.chunk].to(weight.dtype)
        tau = self.root.temperature
        if self.root.direction == "forward" and readable(picked):
            logits = picked if tau == 1.0 else picked / tau
            forward_kl = forward_kl_next if items.mirrored else forward_kl_below
            made = forward_kl(items.layout, items.targets, logits, weight * (scale / tau))
            if made is not None:
                terms, grad = made
                return (terms * weight).sum(), grad, self._counted(items, terms)
        with torch.enable_grad():
            picked = picked.requires_grad_()
            terms = self._compare(items, picked)
            value = (terms * weight).sum()
            seed = seed_like(value, scale)
            (grad,) = torch.autograd.grad(value, picked, seed)
        return value.detach(), grad, self._counted(items, terms)

    def _compare(self, items: PrefixBlock, picked: Tensor) -> Tensor:
        """[N] divergence of each item."""
        tau = self.root.temperature
        log_mass = items.student_log_mass(picked if tau == 1.0 else picked / tau)
        return items.targets.divergence(items.layout, log_mass, self.root.direction, self.root.beta)

    def depth_factors(self, depth: Tensor, like: Tensor) -> Tensor:
        """[N] factor in its chunk's loss of a divergence at each of `depth` [N]."""
        depth = depth.clamp(max=len(self.depth_weights) - 1)
        return self._depth_weights[depth].to(like.dtype) * self.root.temperature**2

    def _counted(self, items: PrefixBlock, terms: Tensor) -> Tensor:
        """[3] sums of divergence, items and known mass."""
        counted = items.targets.counted.to(terms.dtype)
        known = items.known.to(terms.dtype) * counted
        return torch.stack([terms.detach().sum(), counted.sum(), known.sum()])


def _spread(grad: Tensor, first: Tensor, rows: Tensor) -> Tensor:
    """The gradient of `PrefixKLBlocks._heads` as one of the rows; contiguous."""
    if len(first) == len(rows):
        return grad.contiguous()
    if not readable(rows):
        return grad.new_zeros(rows.shape).index_copy_(0, first, grad)
    later = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    later[first] = False
    spread = grad.new_empty(rows.shape).index_copy_(0, first, grad)
    return spread.index_fill_(0, later.nonzero().flatten(), 0.0)


def columns_of_all(
    of_root: Tensor | None, parts: Sequence[PrefixPart], *, whatever_the_batch: bool
) -> Tensor | None:
    """The student columns that are read: the root's and those of the tokens below the nodes.

    None for whole rows, which the root may need and the mirrored construction always does;
    `whatever_the_batch` takes them where a batch could have mirrored chunks. Tells the parts where
    their tokens are among the columns.
    """
    compared = [part for part in parts if len(part.items)]
    mirrored = any(part.mirrored for part in (parts if whatever_the_batch else compared))
    if of_root is None or mirrored or not readable(of_root):
        return None
    if not compared:
        return of_root
    read = torch.zeros(compared[0].trie.token_count, dtype=torch.bool, device=of_root.device)
    read[of_root] = True
    for part in compared:
        read[part.trie.below(torch.from_numpy(np.unique(part.items.host_node)))] = True
    places = places_of(read)
    for part in compared:
        part.places = places
    return read.nonzero().flatten()


def with_later_rows(call: LossCall, first: ChunkRows, parts: Sequence[PrefixPart]) -> ChunkRows:
    """The predictor of each chunk, and the rows after it that the mirrored construction reads."""
    mirrored = [part.items for part in parts if part.mirrored and len(part.items)]
    if not mirrored:
        return first
    host = call.chunks.host
    rows = host.sample * call.source.positions[1] + host.student_start - 1
    return ChunkRows.ragged(rows, mirrored[0].deepest + 1, first.index.device)
