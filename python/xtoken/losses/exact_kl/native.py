"""Exact KL's forward form by the core on the CPU: a position in one pass.

`block.py`'s closed form is the same in torch and what it is held to. A position that needs log
space is left to torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from xtoken import _core
from xtoken.losses.engine.native_rows import flat, gradient_of, suits, zero_others
from xtoken.losses.engine.row_blocks import run_rows
from xtoken.losses.engine.student_rows import LogitRows, StudentRows

if TYPE_CHECKING:
    from xtoken.losses.exact_kl.block import ExactKLBlocks


def native_pass(
    loss: ExactKLBlocks,
    source: StudentRows,
    scale: float | Tensor,
    needed: tuple[bool, ...],
    grads: list[Tensor | None] | None,
) -> tuple[Tensor, Tensor, list[Tensor | None]] | None:
    """`run_blocks` of all chunks; None where they are not for the core."""
    if not isinstance(source, LogitRows) or loss.direction != "forward":
        return None
    logits, targets, host = source.logits.detach(), loss.targets, loss.targets.host
    assert host is not None
    if not suits(logits):
        return None
    begin, end = int(host.chunk_ptr[0]), int(host.chunk_ptr[-1])
    rows = targets.rows[begin:end].numpy()
    if begin == end or len(np.unique(rows)) < len(rows):
        return None
    weights = np.ones(len(rows))
    owner = np.repeat(np.arange(len(host.chunk_ptr) - 1), np.diff(host.chunk_ptr))
    if loss.weights is not None:
        weights = loss.weights.double().numpy()[owner]
    grad = gradient_of(logits, needed, grads)
    by_depth, depths = loss.by_depth, None
    if by_depth is not None:
        depths = (
            by_depth.weights.numpy(),
            by_depth.tail_weights[begin:end].numpy(),
            by_depth.union_ptr[begin : end + 1],
            by_depth.mass.double().numpy(),
            by_depth.weight.double().numpy(),
            by_depth.member_ptr[begin : end + 1],
            by_depth.member_group.numpy(),
            by_depth.member_union.numpy(),
        )
    good, losses, tails, deeper, slopes = _core.exact_kl(
        flat(logits),
        rows,
        (
            targets.tails[begin:end].to(logits.dtype).numpy(),
            targets.open[begin:end].numpy(),
            host.group_ptr[begin : end + 1],
            targets.probs.to(logits.dtype).numpy(),
            host.depths,
            targets.members.range_ptr.numpy(),
            host.starts,
            host.ends,
            host.order,
        ),
        weights * float(scale),
        size=source.vocab_size,
        factor=loss.factor,
        depths=depths,
        gradient=None if grad is None else flat(grad),
        adds=grads is not None,
        threads=torch.get_num_threads(),
    )
    if grads is None and grad is not None:
        zero_others(grad, rows[good])
    groups = float(np.diff(host.group_ptr[begin : end + 1])[good].sum())
    total = logits.new_tensor(float(losses @ weights))
    sums = logits.new_tensor([losses.sum(), tails.sum(), groups, deeper.sum(), slopes.sum()])
    if good.all():
        return total * scale, sums, [grad]
    # Each position is a chunk of its own.
    apart = type(loss)(
        targets=replace(targets, chunk_ptr=torch.arange(begin, end + 1, device="cpu"), host=None),
        depth_weights=loss.depth_weights,
        least_mass=loss.least_mass,
    )
    apart.weights = torch.from_numpy(weights)
    for position in np.flatnonzero(~good).tolist():
        more: list[Tensor] = []
        value, counted = run_rows(
            apart, source, scale, 1, needed, (position, position + 1), [grad], [], more
        )
        total = total + value
        sums = sums + torch.cat([counted, sum(more, counted.new_zeros(()))[None]]).to(sums.dtype)
    return total * scale, sums, [grad]
