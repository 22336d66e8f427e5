"""Exact KL by the chain rule: groups of tokens and a tail against the student's softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xtoken.losses.engine.student_rows import LogitRows, StudentRows
from xtoken.losses.kernels import launch, self_check
from xtoken.losses.kernels.choice import takes
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
    return _launch(loss, source, scale, needed, grads)


def _launch(
    loss: ExactKLBlocks,
    source: LogitRows,
    scale: float | Tensor,
    needed: tuple[bool, ...],
    grads: list[Tensor | None] | None,
) -> Found:
    from xtoken.losses.kernels.device import exact as device

    targets, host, size = loss.targets, loss.targets.host, source.vocab_size
    assert host is not None
    begin, end = int(host.chunk_ptr[0]), int(host.chunk_ptr[-1])
    first_group, last_group = int(host.group_ptr[begin]), int(host.group_ptr[end])
    first, last = int(host.token_ptr[first_group]), int(host.token_ptr[last_group])
    index = targets.rows[begin:end]
    count, block, words = end - begin, launch.BLOCK, cdiv(size, 32)
    z = Rows.of(source.logits, index)
    student = (z.tensor, z.offsets, z.step)
    bits = torch.zeros((count, words), dtype=torch.int32, device=index.device)
    logs = floats(index, len(targets.probs))
    lists = (targets.tokens, targets.token_group, targets.group_row)
    tiles = cdiv(last - first, block)
    if tiles:
        device.mark[(tiles,)](*lists, bits, first, last, begin, words, BLOCK=block)
    if last_group > first_group:
        device.group_logs[(cdiv(last_group - first_group, _GROUPS),)](
            *student, targets.tokens, targets.token_ptr, targets.group_row, logs,
            first_group, last_group, begin, GROUPS=_GROUPS, WIDTH=_WIDTH,
        )  # fmt: skip
    opened = targets.open.to(torch.int8)
    parts = cdiv(size, launch.SPAN)
    partial = floats(index, count, parts, 2)
    device.tail_parts[(count, parts)](
        *student, bits, opened, partial, size, words, begin,
        PARTS=parts, SPAN=launch.SPAN, BLOCK=block,
    )  # fmt: skip
    factor = 1.0 if loss.depth_weights is None else float(loss.depth_weights[0])
    stats = floats(index, count, 5)
    device.positions[(count,)](
        logs, targets.probs, targets.depths, targets.tails, targets.group_ptr, partial, stats,
        begin, factor, PARTS=parts, PADDED=padded(parts), BLOCK=64,
    )  # fmt: skip
    weights = loss.weights
    if weights is not None and loss.student.owner is not None:
        weights = weights[loss.student.owner[begin:end]]
    own, seed = seeds(count, weights, scale, index.device)
    gradient, checks = None, None
    if any(needed):
        gradient = GradientBuffer.of(source, index, grads)
        width = gradient.flat.shape[1]
        blocks = cdiv(width, block)
        checks = floats(index, count * blocks + tiles)
        device.tail_gradient[(count, blocks)](
            *student, bits, opened, targets.tails, stats, seed, gradient.flat, gradient.rows,
            checks, size, width, words, begin, factor, ADDS=gradient.adds, BLOCK=block,
        )  # fmt: skip
        if tiles:
            device.group_gradient[(tiles,)](
                *student, *lists, logs, targets.probs, stats, seed, gradient.flat, gradient.rows,
                checks[count * blocks :], first, last, begin, factor,
                ADDS=gradient.adds, BLOCK=block,
            )  # fmt: skip
    losses = stats[:, 2]
    tails = targets.tails[begin:end].to(torch.float32).sum()
    number = torch.full_like(tails, float(last_group - first_group))
    sums = [losses.sum(), tails, number, stats[:, 3].sum()]
    return found(source, (losses * own).sum(), scale, sums, gradient, checks)
