"""Exact KL's forward form: groups of tokens and a tail against the student's softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from xtoken.losses.engine.row_blocks import Later
from xtoken.losses.engine.student_rows import LogitRows, StudentRows
from xtoken.losses.kernels import launch, self_check
from xtoken.losses.kernels.choice import on_device_of, takes
from xtoken.losses.kernels.launch import (
    Compared,
    Found,
    GradientBuffer,
    Rows,
    cdiv,
    floats,
    padded,
    seeds,
    times,
)

if TYPE_CHECKING:
    from xtoken.losses.exact_kl.block import ExactKLBlocks
    from xtoken.losses.exact_kl.depth_weights import DepthWeights

# Groups that a program sums up at a time, and tokens of each.
_GROUPS, _WIDTH = 32, 16


def exact_pass(
    loss: ExactKLBlocks,
    source: StudentRows,
    scale: float | Tensor,
    needed: tuple[bool, ...],
    grads: list[Tensor | None] | None,
) -> Found | None:
    """The whole pass over a batch by kernels; None where torch computes it."""
    if not _takes(source, loss):
        return None
    with on_device_of(source.logits):
        return _compare(loss, source).at_once(scale, needed, grads)


def exact_in_two(
    loss: ExactKLBlocks, source: StudentRows, scale: float | Tensor
) -> tuple[Tensor, Tensor, Later] | None:
    """The value now and the gradient later, see `BlockLoss.in_two`."""
    if not _takes(source, loss):
        return None
    with on_device_of(source.logits):
        return _compare(loss, source).in_two(scale)


def _takes(source: StudentRows, loss: ExactKLBlocks) -> TypeGuard[LogitRows]:
    if loss.direction != "forward":
        return False
    if not isinstance(source, LogitRows) or not len(loss.targets.rows):
        return False
    return takes("exact-kl", self_check.exact, source.logits)


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of tokens in positions, in the student's vocabulary; ranges are of the whole arrays.

    Attributes:
        tokens: [N] int64, the tokens of each group; below 0 is none.
        token_group, group_row: [N] and [G] int64, the group of a token, the position of a group.
        token_ptr, group_ptr: [G + 1] and [P + 1] int64.
        probs, depths: [G] the target's masses, float, and depths, int64.
        tails: [P] float, the target's mass of all tokens in no group.
        opened: [P] int8, 1 where those are not compared, 2 where `tails` is the most that they
            have.
        positions, groups, listed: the ranges that count.
        by_depth: other weights than the chain rule's; None for those.
    """

    tokens: Tensor
    token_group: Tensor
    group_row: Tensor
    token_ptr: Tensor
    group_ptr: Tensor
    probs: Tensor
    depths: Tensor
    tails: Tensor
    opened: Tensor
    positions: tuple[int, int]
    groups: tuple[int, int]
    listed: tuple[int, int]
    by_depth: DepthWeights | None = None


def _compare(loss: ExactKLBlocks, source: LogitRows) -> Compared:
    targets, host = loss.targets, loss.targets.host
    assert host is not None
    assert targets.group_row is not None
    begin, end = int(host.chunk_ptr[0]), int(host.chunk_ptr[-1])
    first, last = int(host.group_ptr[begin]), int(host.group_ptr[end])
    groups = Groups(
        targets.tokens, targets.token_group, targets.group_row, targets.token_ptr,
        targets.group_ptr, targets.probs, targets.depths, targets.tails,
        2 * targets.open.to(torch.int8), (begin, end), (first, last),
        (int(host.token_ptr[first]), int(host.token_ptr[last])), loss.by_depth,
    )  # fmt: skip
    index = targets.rows[begin:end]
    weights = loss.weights
    if weights is not None and loss.student.owner is not None:
        weights = weights[loss.student.owner[begin:end]]
    own, _ = seeds(end - begin, weights, 1.0, index.device)
    z = Rows.of(source.logits, index)
    kl = GroupedKL.of(z, groups, source.vocab_size, factor=loss.factor)
    stats = kl.stats
    losses = stats[:, 2]
    tails = stats[:, 7].sum()
    sums = [losses.sum(), tails, torch.full_like(tails, float(last - first)), stats[:, 3].sum()]

    def write(scale: float | Tensor, gradient: GradientBuffer) -> Tensor:
        return kl.write(times(own, scale), gradient)

    return Compared(source, index, (losses * own).sum(), sums, write)


@dataclass(frozen=True, eq=False)
class GroupedKL:
    """The KL of each position, from which its gradient can be written.

    Attributes:
        z: the student's row of each position.
        size: V_s.
        tau: the temperature.
        stats: [P, 8] float32, the third column the loss, the fourth its part below depth 0, the
            last the tail's mass.
        logs: [G] log of the sum of exp of each group's logits.
        unions: [D, 2] the same of each union of deeper groups, and its weight in the gradient.
        bits: [P, words] int32, 1 for each token in a group.
    """

    z: Rows
    groups: Groups
    size: int
    tau: float
    stats: Tensor
    logs: Tensor
    unions: Tensor
    bits: Tensor

    @classmethod
    def of(
        cls, z: Rows, groups: Groups, size: int, *, factor: float = 1.0, tau: float = 1.0
    ) -> GroupedKL:
        """Computed; `factor` is that of the target's masses."""
        return cls(z, groups, size, tau, *_grouped(z, groups, size, factor, tau))

    def write(self, seed: Tensor, gradient: GradientBuffer) -> Tensor:
        """Write or add `seed` [P] times the gradient, and a cross-entropy's; what is finite where
        all of it is."""
        from xtoken.losses.kernels.device import exact as device

        z, groups, count, block = self.z, self.groups, len(self.z), launch.BLOCK
        (begin, _), (first, last) = groups.positions, groups.listed
        student = (z.tensor, z.offsets, z.step)
        width, tiles = gradient.flat.shape[1], cdiv(last - first, block)
        blocks = cdiv(width, block)
        checks = floats(seed, count * blocks + tiles)
        joins = {"JOINS": gradient.joined is not None, "ADDS": gradient.adds, "BLOCK": block}
        device.tail_gradient[(count, blocks)](
            *student, self.bits, groups.opened, self.stats, seed, *gradient.cross_entropy,
            gradient.flat, gradient.rows, checks, self.size, width, self.bits.shape[1], begin,
            1 / self.tau, **joins,
        )  # fmt: skip
        if tiles:
            device.group_gradient[(tiles,)](
                *student, groups.tokens, groups.token_group, groups.group_row, self.logs,
                groups.probs, groups.depths, *_weighed(groups)[:3], self.unions, self.stats, seed,
                *gradient.cross_entropy, gradient.flat, gradient.rows, checks[count * blocks :],
                first, last, begin, 1 / self.tau, DEEP=groups.by_depth is not None, **joins,
            )  # fmt: skip
        return checks


def _weighed(groups: Groups) -> tuple[Tensor, ...]:
    """Weights of the groups, where the unions of each position are and their levels; weights of
    the tails, masses and weights of the unions. Of the chain rule, which has none, anything."""
    by_depth = groups.by_depth
    if by_depth is None:
        some = groups.group_ptr
        return groups.probs, some, some, groups.tails, groups.probs, groups.probs
    return (
        by_depth.weights, by_depth.ptr, by_depth.level,
        by_depth.tail_weights, by_depth.mass, by_depth.weight,
    )  # fmt: skip


def _grouped(
    z: Rows, groups: Groups, size: int, factor: float, tau: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of the positions, logs of the groups and of their unions, bits of their tokens:
    see `GroupedKL`."""
    from xtoken.losses.kernels.device import exact as device

    (begin, _), (first_group, last_group), (first, last) = (
        groups.positions, groups.groups, groups.listed,
    )  # fmt: skip
    count, block, words, parts = len(z), launch.BLOCK, cdiv(size, 32), cdiv(size, launch.SPAN)
    student = (z.tensor, z.offsets, z.step)
    bits = torch.zeros((count, words), dtype=torch.int32, device=z.tensor.device)
    logs = floats(z.tensor, len(groups.probs))
    lists = (groups.tokens, groups.token_group, groups.group_row)
    tiles = cdiv(last - first, block)
    if tiles:
        device.mark[(tiles,)](*lists, bits, first, last, begin, words, BLOCK=block)
    if last_group > first_group:
        device.group_logs[(cdiv(last_group - first_group, _GROUPS),)](
            *student, groups.tokens, groups.token_ptr, groups.group_row, logs, first_group,
            last_group, begin, 1 / tau, GROUPS=_GROUPS, WIDTH=_WIDTH,
        )  # fmt: skip
    partial, stats = floats(z.tensor, count, parts, 2), floats(z.tensor, count, 8)
    by_depth = groups.by_depth
    unions = floats(z.tensor, 0 if by_depth is None else len(by_depth.row), 2)
    device.tail_parts[(count, parts)](
        *student, bits, groups.opened, partial, size, words, begin, 1 / tau,
        PARTS=parts, SPAN=launch.SPAN, BLOCK=block,
    )  # fmt: skip
    device.positions[(count,)](
        logs, groups.probs, groups.depths, groups.tails, groups.opened, groups.group_ptr, partial,
        *_weighed(groups), unions, stats, begin, factor, DEEP=by_depth is not None, PARTS=parts,
        PADDED=padded(parts), BLOCK=64,
    )  # fmt: skip
    return stats, logs, unions, bits
