"""Exact KL by the chain rule: groups of tokens and a tail against the student's softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xtoken.losses.engine.student_rows import LogitRows, StudentRows
from xtoken.losses.kernels import launch, self_check
from xtoken.losses.kernels.choice import on_device_of, takes
from xtoken.losses.kernels.launch import (
    Found,
    GradientBuffer,
    Rows,
    cdiv,
    floats,
    found,
    padded,
    seeds,
)

if TYPE_CHECKING:
    from xtoken.losses.exact_kl.block import ExactKLBlocks

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
    if loss.direction != "forward" or loss.by_depth is not None:
        return None
    if not isinstance(source, LogitRows) or not len(loss.targets.rows):
        return None
    if not takes("exact-kl", self_check.exact, source.logits):
        return None
    with on_device_of(source.logits):
        return _launch(loss, source, scale, needed, grads)


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


def _launch(
    loss: ExactKLBlocks,
    source: LogitRows,
    scale: float | Tensor,
    needed: tuple[bool, ...],
    grads: list[Tensor | None] | None,
) -> Found:
    targets, host = loss.targets, loss.targets.host
    assert host is not None
    assert targets.token_group is not None
    assert targets.group_row is not None
    begin, end = int(host.chunk_ptr[0]), int(host.chunk_ptr[-1])
    first, last = int(host.group_ptr[begin]), int(host.group_ptr[end])
    groups = Groups(
        targets.tokens, targets.token_group, targets.group_row, targets.token_ptr,
        targets.group_ptr, targets.probs, targets.depths, targets.tails,
        2 * targets.open.to(torch.int8), (begin, end), (first, last),
        (int(host.token_ptr[first]), int(host.token_ptr[last])),
    )  # fmt: skip
    index = targets.rows[begin:end]
    weights = loss.weights
    if weights is not None and loss.student.owner is not None:
        weights = weights[loss.student.owner[begin:end]]
    own, seed = seeds(end - begin, weights, scale, index.device)
    gradient = GradientBuffer.of(source, index, grads) if any(needed) else None
    factor = 1.0 if loss.depth_weights is None else float(loss.depth_weights[0])
    z = Rows.of(source.logits, index)
    stats, checks = grouped_kl(z, groups, source.vocab_size, seed, gradient, factor=factor)
    losses = stats[:, 2]
    tails = stats[:, 5].sum() / factor
    sums = [losses.sum(), tails, torch.full_like(tails, float(last - first)), stats[:, 3].sum()]
    return found(source, (losses * own).sum(), scale, sums, gradient, checks)


def grouped_kl(
    z: Rows,
    groups: Groups,
    size: int,
    seed: Tensor,
    gradient: GradientBuffer | None,
    *,
    factor: float = 1.0,
    tau: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """The KL of each position, and `seed` [P] times its gradient.

    Args:
        z: the student's row of each position.
        size: V_s.
        factor: of the target's masses.

    Returns: [P, 7] float32, the third column the loss, the fourth its part below depth 0, the sixth
        `factor` times the tail's mass; and what
        is finite where all of the gradient is.
    """
    from xtoken.losses.kernels.device import exact as device

    (begin, _), (first_group, last_group), (first, last) = (
        groups.positions, groups.groups, groups.listed,
    )  # fmt: skip
    count, block, words, parts = len(z), launch.BLOCK, cdiv(size, 32), cdiv(size, launch.SPAN)
    student = (z.tensor, z.offsets, z.step)
    bits = torch.zeros((count, words), dtype=torch.int32, device=seed.device)
    logs = floats(seed, len(groups.probs))
    lists = (groups.tokens, groups.token_group, groups.group_row)
    tiles = cdiv(last - first, block)
    if tiles:
        device.mark[(tiles,)](*lists, bits, first, last, begin, words, BLOCK=block)
    if last_group > first_group:
        device.group_logs[(cdiv(last_group - first_group, _GROUPS),)](
            *student, groups.tokens, groups.token_ptr, groups.group_row, logs, first_group,
            last_group, begin, tau, GROUPS=_GROUPS, WIDTH=_WIDTH,
        )  # fmt: skip
    partial, stats = floats(seed, count, parts, 2), floats(seed, count, 7)
    device.tail_parts[(count, parts)](
        *student, bits, groups.opened, partial, size, words, begin, tau,
        PARTS=parts, SPAN=launch.SPAN, BLOCK=block,
    )  # fmt: skip
    device.positions[(count,)](
        logs, groups.probs, groups.depths, groups.tails, groups.opened, groups.group_ptr, partial,
        stats, begin, factor, PARTS=parts, PADDED=padded(parts), BLOCK=64,
    )  # fmt: skip
    if gradient is None:
        return stats, None
    width = gradient.flat.shape[1]
    blocks = cdiv(width, block)
    checks = floats(seed, count * blocks + tiles)
    device.tail_gradient[(count, blocks)](
        *student, bits, groups.opened, stats, seed, gradient.flat, gradient.rows, checks, size,
        width, words, begin, tau, ADDS=gradient.adds, BLOCK=block,
    )  # fmt: skip
    if tiles:
        device.group_gradient[(tiles,)](
            *student, *lists, logs, groups.probs, stats, seed, gradient.flat, gradient.rows,
            checks[count * blocks :], first, last, begin, tau,
            ADDS=gradient.adds, BLOCK=block,
        )  # fmt: skip
    return stats, checks
