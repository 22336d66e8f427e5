"""Exact KL over a block of chunks: the target's groups against the student's softmax over them.

With q the target's mass of a group and p the student's, the sum of its tokens' probabilities, the
forward loss of a position is

    sum over groups g of c(g) q log(q / p) + sum over depths d >= 1 of u(d) A(d) log(A(d) / B(d)),

A(d) and B(d) the target's and the student's mass of all groups that share d tokens with the text or
more. With c = 1 and u = 0 it is the KL between the two distributions: by the chain rule each depth
weighs as much as its parent has mass. The plain sum weighs the KL at depth d, among the groups that
share d tokens and all deeper ones together, by w(d): c(g) = w(d) / A(d) at the group's depth d, and
u(d) = c(d - 1) - c(d).

The gradient by a logit k in group g is, with a(g) the weight that its log p has above,

    p(k) (sum of all a - a(g) / p(g)).

The reverse loss, the sum of p log(p / q), asks for a q wherever p is above 0. A target is made of
float32 log-probabilities, and what it has outside its groups is not known below one rounding of
theirs: so much a tail has at least there, as that of a stored top-k has in P-KL.

In an open position the tail's mass is only known to be at most so much. The target then has the
student's own mass u outside all groups there, or the most where u is above it, and the groups have
the rest: with s = 1 - min(u, most), a constant for the gradient, s q in the place of q. So nothing
is said of u up to the most, what is above is pushed down, and a student that may be right has no
loss.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xtoken.losses.engine.divergence import Direction
from xtoken.losses.engine.merge import ChunkRows
from xtoken.losses.engine.places import Places, of_any_length
from xtoken.losses.engine.row_blocks import Block, BlockLoss, Later
from xtoken.losses.engine.student_rows import StudentRows
from xtoken.losses.exact_kl.depth_weights import DepthWeights
from xtoken.losses.exact_kl.native import native_pass
from xtoken.losses.kernels.exact import exact_in_two, exact_pass
from xtoken.tensors.host import readable
from xtoken.tensors.target_batch import TargetBatch

# One rounding of the log-probabilities that targets are made of, whatever the student's dtype.
_LEAST_TAIL = torch.finfo(torch.float32).eps


@dataclass(eq=False, kw_only=True)
class ExactKLBlocks(BlockLoss):
    """The loss of a block of chunks; see the module.

    Attributes:
        targets: the batch's, on the student's device; its chunks are those of the engine.
        depth_weights: w(0), w(1), ...; the last holds for all deeper ones. None for the chain rule.
        least_mass: depths at which the target has less mass keep the weight of the chain rule.
        ready: the targets of a block, where they were laid out before.
    """

    targets: TargetBatch
    direction: Direction = "forward"
    beta: float = 0.5
    depth_weights: tuple[float, ...] | None = None
    least_mass: float = 1e-3
    ready: BlockTargets | None = None
    metric_names = ("kl", "target_tail", "groups", "deeper_kl")

    def __post_init__(self) -> None:
        targets = self.targets
        assert targets.host is not None
        self.student = ChunkRows.of_ptr(targets.rows, targets.host.chunk_ptr)
        self.by_depth = None
        if self.depth_weights is not None:
            self.by_depth = DepthWeights.of(
                targets.host, self.depth_weights, self.least_mass, targets.rows.device
            )

    @property
    def factor(self) -> float:
        """The weight of all groups, where `by_depth` has none for each."""
        if self.depth_weights is None or self.by_depth is not None:
            return 1.0
        return float(self.depth_weights[0])

    def block_targets(self, dtype: torch.dtype, block: Block) -> BlockTargets:
        """The targets of a block."""
        return BlockTargets.of(self, dtype, block) if self.ready is None else self.ready

    def narrowed(self, places: Places) -> ExactKLBlocks:
        """As `BlockLoss`; the block's targets are laid out before."""
        block = Block(places.start, places.stop, places.segments)
        if block.segments is not None:
            block.segments = block.segments[places.real_rows]
        loss = copy.copy(self)
        loss.student = places.student
        loss.ready = self.block_targets(places.dtype, block).narrowed(places)
        return loss

    def forward(
        self, rows: Tensor, block: Block, params: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        part = self.block_targets(rows.dtype, block)
        log_student = part.log_student(rows)
        if self.direction == "reverse":
            part = part.with_least_tails()
        part = part.against(torch.exp(log_student.detach()[-len(part.chunk) :]))
        if self.direction == "forward":
            losses = part.forward_kl(log_student)
        else:
            losses = part.other(log_student, self.direction, self.beta)
        chunks = part.per_chunk(losses)
        return chunks, part.metrics(block.sum(chunks.detach()), log_student.detach())

    def by_kernel(
        self,
        source: StudentRows,
        scale: float | Tensor,
        needed: tuple[bool, ...],
        grads: list[Tensor | None] | None,
    ) -> tuple[Tensor, Tensor, list[Tensor | None]] | None:
        """As `BlockLoss`: by a kernel on a GPU, by the core on the CPU."""
        given = (self, source, scale, needed, grads)
        found = exact_pass(*given)
        return native_pass(*given) if found is None else found

    def in_two(
        self, source: StudentRows, scale: float | Tensor
    ) -> tuple[Tensor, Tensor, Later] | None:
        """As `BlockLoss`."""
        return exact_in_two(self, source, scale)

    def value_and_grad(
        self,
        rows: Tensor,
        block: Block,
        params: Sequence[Tensor],
        needed: Sequence[bool],
        scale: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
        if self.direction != "forward" or not readable(rows):
            return super().value_and_grad(rows, block, params, needed, scale)
        with torch.no_grad():
            part = self.block_targets(rows.dtype, block)
            found = part.closed_form(rows, scale, self.weights)
        if found is None:  # a mass so small that it has lost its digits
            return super().value_and_grad(rows, block, params, needed, scale)
        losses, metrics, grad = found
        return losses, metrics, grad, []


@dataclass(frozen=True, eq=False)
class BlockTargets:
    """The targets of a block, its slots counted from 0: the groups of all positions, then a slot
    for each position's tail.

    Attributes:
        chunk: [n] the chunk of each position, counted from the block's first.
        chunks: number of chunks.
        first: index of the first chunk of the block.
        token_row, token_slot, tokens: [N] each token of a group with its position and slot.
        slot_row: [S] the position of each slot.
        probs: [S] the target's masses.
        weights: [S] c of the slot.
        open: [n] bool.
        deep_row: [D] position of each union of deeper groups.
        deep_mass, deep_weight: [D] A and u.
        member_slot, member_deep: [M] which slot is in which union.
        is_deep: [S] the slot is below depth 0.
        number: [1] the groups; of a float64 scalar the compiler reads the value, and traces twice.
    """

    chunk: Tensor
    chunks: int
    first: int
    token_row: Tensor
    token_slot: Tensor
    tokens: Tensor
    slot_row: Tensor
    probs: Tensor
    weights: Tensor
    open: Tensor
    deep_row: Tensor
    deep_mass: Tensor
    deep_weight: Tensor
    member_slot: Tensor
    member_deep: Tensor
    is_deep: Tensor
    number: Tensor

    @classmethod
    def of(cls, loss: ExactKLBlocks, dtype: torch.dtype, block: Block) -> BlockTargets:
        """The targets of chunks [start, stop), to rows of this dtype."""
        targets, host, device = loss.targets, loss.targets.host, loss.targets.rows.device
        assert host is not None
        assert targets.group_row is not None
        begin, end = int(host.chunk_ptr[block.start]), int(host.chunk_ptr[block.stop])
        first_group, last_group = int(host.group_ptr[begin]), int(host.group_ptr[end])
        first_token, last_token = int(host.token_ptr[first_group]), int(host.token_ptr[last_group])
        count, groups = end - begin, last_group - first_group
        positions = torch.arange(count, device=device)
        group_row = targets.group_row[first_group:last_group] - begin
        token_slot = targets.token_group[first_token:last_token] - first_group
        probs = torch.cat([targets.probs[first_group:last_group], targets.tails[begin:end]])
        depths = targets.depths[first_group:last_group]
        chunk = positions if block.segments is None else block.segments
        by_depth = loss.by_depth
        if by_depth is None:
            weights = torch.full((groups + count,), loss.factor, dtype=dtype, device=device)
            none, empty = group_row.new_zeros(0), weights.new_zeros(0)
            deep = none, empty, empty, none, none
        else:
            weights = torch.cat(
                [by_depth.weights[first_group:last_group], by_depth.tail_weights[begin:end]]
            ).to(dtype)
            deep = by_depth.between(begin, end, first_group, dtype)
        return cls(
            chunk, len(block), block.start, group_row[token_slot], token_slot,
            targets.tokens[first_token:last_token], torch.cat([group_row, positions]),
            probs.to(dtype), weights, targets.open[begin:end], *deep,
            torch.cat([depths > 0, torch.zeros_like(positions, dtype=torch.bool)]),
            torch.full((1,), groups, dtype=dtype, device=device),
        )  # fmt: skip

    def narrowed(self, places: Places) -> BlockTargets:
        """The same filled up, in positions and tails by places, and by two groups and two unions in
        the spare position."""
        count, size, spare = len(self.chunk), places.size, places.size - 1
        groups = len(self.slot_row) - count
        unions = len(self.deep_row)
        assert places.segments is not None
        device = self.chunk.device

        def slots(
            values: Tensor, filler: int | float | bool, tails: Tensor | None = None
        ) -> Tensor:
            own = places.fill(values[groups:]) if tails is None else tails
            if tails is None:
                own = torch.where(places.real_rows, own, filler).to(values.dtype)
            padded = torch.cat([values[:groups], values.new_full((2,), filler), own])
            return of_any_length(padded)

        def two(values: Tensor, following: int) -> Tensor:
            filled = places.item(values, following)
            filled[-1] += 1
            return filled

        # The tails' slots follow the groups', of which there are two more.
        member = torch.where(self.member_slot < groups, self.member_slot, self.member_slot + 2)
        return BlockTargets(
            places.segments, size, 0,
            places.item(self.token_row, spare), two(self.token_slot, groups),
            _two_tokens(places, self.tokens),
            slots(self.slot_row, spare, torch.arange(size, device=device)),
            slots(self.probs, 0), slots(self.weights, 0),
            torch.where(places.real_rows, places.fill(self.open), False),
            places.item(self.deep_row, spare), places.item(self.deep_mass, 1),
            places.item(self.deep_weight, 0), two(member, groups), two(self.member_deep, unions),
            slots(self.is_deep, False), self.number,
        )  # fmt: skip

    def with_least_tails(self) -> BlockTargets:
        """The same for the reverse loss; see the module."""
        groups = len(self.slot_row) - len(self.chunk)
        tails = self.probs[groups:].clamp(min=_LEAST_TAIL)
        return replace(self, probs=torch.cat([self.probs[:groups], tails]))

    def against(self, outside: Tensor) -> BlockTargets:
        """The same, with a tail in open positions for a student of mass `outside` [n] in none of
        the groups."""
        groups = len(self.slot_row) - len(self.chunk)
        tails = self.probs[groups:]
        own = torch.where(self.open, torch.minimum(outside.to(tails.dtype), tails), tails)
        rest = torch.where(self.open, 1 - own, 1.0)  # of the groups, which sum to 1 where open
        probs = torch.cat([self.probs[:groups] * rest[self.slot_row[:groups]], own])
        return replace(self, probs=probs, deep_mass=self.deep_mass * rest[self.deep_row])

    def log_student(self, rows: Tensor) -> Tensor:
        """[S] log of the student's mass of each slot."""
        count = len(self.chunk)
        groups = len(self.slot_row) - count
        picked = rows[self.token_row, self.tokens]
        in_groups = _segment_logsumexp(picked, self.token_slot, groups)
        masked = rows.index_put((self.token_row, self.tokens), rows.new_full((), -torch.inf))
        empty = torch.isneginf(masked).all(1)
        outside = torch.logsumexp(masked.masked_fill(empty[:, None], 0.0), 1)
        outside = outside.masked_fill(empty, -torch.inf)
        slots = torch.cat([in_groups, outside])
        return slots - torch.logsumexp(rows, 1)[self.slot_row]

    def forward_kl(self, log_student: Tensor) -> Tensor:
        """[n] the loss of each position."""
        nothing = self.probs <= 0
        log_target = torch.log(self.probs.masked_fill(nothing, 1.0))
        terms = self.probs * (log_target - log_student.masked_fill(nothing, 0.0))
        losses = log_student.new_zeros(len(self.chunk))
        losses = losses.index_add(0, self.slot_row, self.weights * terms)
        if len(self.deep_row):
            below = _segment_logsumexp(
                log_student[self.member_slot], self.member_deep, len(self.deep_row)
            )
            deep = self.deep_weight * self.deep_mass * (torch.log(self.deep_mass) - below)
            losses = losses.index_add(0, self.deep_row, deep)
        return losses

    def other(self, log_student: Tensor, direction: Direction, beta: float) -> Tensor:
        """[n] the reverse KL or the JSD of each position, by the chain rule."""
        student = torch.exp(log_student)
        silent = torch.isneginf(log_student)
        finite = log_student.masked_fill(silent, 0.0)
        losses = log_student.new_zeros(len(self.chunk))
        if direction == "reverse":
            # A group's mass may underflow.
            log_target = torch.log(self.probs.clamp(min=torch.finfo(self.probs.dtype).tiny))
            terms = torch.where(silent, 0.0, student * (finite - log_target))
            return losses.index_add(0, self.slot_row, terms)
        nothing = self.probs <= 0
        mean = beta * self.probs + (1 - beta) * student
        log_mean = torch.log(mean.masked_fill(mean <= 0, 1.0))
        on_target = self.probs * (torch.log(self.probs.masked_fill(nothing, 1.0)) - log_mean)
        on_student = torch.where(silent, 0.0, student * (finite - log_mean))
        return losses.index_add(0, self.slot_row, beta * on_target + (1 - beta) * on_student)

    def per_chunk(self, losses: Tensor) -> Tensor:
        """[n] positions to [chunks]."""
        return losses.new_zeros(self.chunks).index_add(0, self.chunk, losses)

    def metrics(self, total: Tensor, log_student: Tensor) -> Tensor:
        """Sums over the block: loss (as given), the target's tail, groups, the loss below depth
        0."""
        groups = len(self.slot_row) - len(self.chunk)
        deep = self.is_deep & (self.probs > 0)
        log_target = torch.log(torch.where(deep, self.probs, 1.0))
        below = torch.where(deep, self.probs * (log_target - log_student), 0.0)
        return torch.stack([total, self.probs[groups:].sum(), self.number[0], below.sum()])

    def closed_form(
        self, rows: Tensor, scale: float | Tensor, chunk_weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Loss sum, metric sums and gradient [n, V] of the forward loss; see the module."""
        count = len(self.chunk)
        groups = len(self.slot_row) - count
        shares = torch.softmax(rows, 1)
        flat, at = shares.view(-1), self.token_row * shares.shape[1] + self.tokens
        picked = flat[at]
        mass = shares.new_zeros(groups).index_add_(0, self.token_slot, picked)
        # Summed without the listed tokens, never 1 minus their sum: that would lose a small tail.
        flat[at] = 0.0
        outside = shares.sum(1)
        target = self.against(outside)
        student = torch.cat([mass, outside])
        counted = target.probs > 0
        tiny = torch.finfo(rows.dtype).tiny * 1e6
        if not bool((student.masked_fill(~counted, 1.0) >= tiny).all()):
            return None
        log_student = torch.log(student)
        losses = target.forward_kl(log_student)
        pull = self.weights * target.probs  # a of each slot
        if len(self.deep_row):
            below = student.new_zeros(len(self.deep_row)).index_add_(
                0, self.member_deep, student[self.member_slot]
            )
            each = target.deep_weight * target.deep_mass / below
            pull = pull.index_add(
                0, self.member_slot, each[self.member_deep] * student[self.member_slot]
            )
        row_scale = shares.new_ones(count) * scale
        if chunk_weights is not None:
            own = chunk_weights[self.first : self.first + self.chunks].to(shares.dtype)
            row_scale = row_scale * own[self.chunk]
            value = (losses * own[self.chunk]).sum()
        else:
            value = losses.sum()
        whole = shares.new_zeros(count).index_add_(0, self.slot_row, pull)
        # d log p(slot) / d logit is p(k) / p(slot) inside it, minus p(k) for all that is compared.
        ratio = torch.where(counted | (pull != 0), pull / student.clamp(min=tiny), 0.0)
        slope = (whole[self.slot_row] - ratio) * row_scale[self.slot_row]
        grad = shares.mul_(slope[groups:, None])
        flat[at] = picked.mul_(slope[self.token_slot])
        return value, target.metrics(losses.sum(), log_student), grad


def _two_tokens(places: Places, tokens: Tensor) -> Tensor:
    """With two tokens for the groups that fill up: no two groups of a position share one."""
    filled = places.item(tokens, 0)
    filled[-1] += 1
    return filled


def _segment_logsumexp(values: Tensor, segment: Tensor, count: int) -> Tensor:
    """[count] log of the sum of exp of each segment's values; -inf, without gradient, for none."""
    top = values.detach().new_full((count,), -torch.inf)
    top = top.scatter_reduce(0, segment, values.detach(), "amax")
    silent = torch.isneginf(top)
    top = top.masked_fill(silent, 0.0)
    sums = values.new_zeros(count).index_add(0, segment, torch.exp(values - top[segment]))
    return torch.log(sums.masked_fill(silent, 1.0)).masked_fill(silent, -torch.inf) + top
