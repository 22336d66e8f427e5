"""Prefix KL whose roots the core compares on the CPU; what is below them torch reads in place."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xtoken.losses.engine.row_blocks import Block
from xtoken.losses.engine.student_rows import LogitRows, StudentRows
from xtoken.losses.p_kl.native import native_pass
from xtoken.losses.prefix_kl.targets import PrefixPart

if TYPE_CHECKING:
    from xtoken.losses.prefix_kl.block import PrefixKLBlocks

# Chunks whose prefixes are compared at a time; mirrored ones read whole rows, of these numbers.
_CHUNKS, _MIRRORED_NUMBERS = 128, 2**20


def native_prefix_pass(
    loss: PrefixKLBlocks,
    source: StudentRows,
    scale: float | Tensor,
    needed: tuple[bool, ...],
    grads: list[Tensor | None] | None,
) -> tuple[Tensor, Tensor, list[Tensor | None]] | None:
    """`run_blocks` of all chunks; None where the core has no form of the roots' loss."""
    if not isinstance(source, LogitRows):
        return None
    loss.root.weights = loss.weights
    made = native_pass(loss.root, source, scale * loss.depth_weights[0], needed, grads)
    if made is None:
        return None
    total, sums, found = made
    logits = source.logits.detach()
    rows = logits.view(-1, logits.shape[-1])
    grad = None if found[0] is None else found[0].view(rows.shape)
    first = loss.root.student.index
    later, slope = sums.new_zeros(3), sums[-1:]
    for part in loss.parts:
        if isinstance(part, PrefixPart) and part.places is not None:
            part = replace(part, places=None, _ready=None)  # the logits are read where they lie
        mirrored = isinstance(part, PrefixPart) and part.mirrored
        step = _CHUNKS
        if mirrored:
            step = min(_CHUNKS, max(1, _MIRRORED_NUMBERS // source.vocab_size))
        for start in range(0, loss.student.count, step):
            items = part.block(Block(start, min(start + step, loss.student.count), None))
            if items is None:
                continue
            row = first[items.chunk]
            # Mirrored items read whole rows, without what pads them.
            size = source.vocab_size if items.mirrored else rows.shape[1]
            value, more, counted = loss.with_grad(items, items.pick(rows[:, :size], row), scale)
            total = total + value * scale
            later = later + counted
            slope = slope + more.sum()
            if grad is not None:
                items.put_back(grad[:, :size], row, more)
    return total, torch.cat([sums[:-1], later, slope]), found
