"""Prefix KL by the core on the CPU: the roots, and what is below them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken import _core
from xtoken.losses.engine.row_blocks import Block
from xtoken.losses.engine.student_rows import LogitRows, StudentRows
from xtoken.losses.p_kl.native import native_rows
from xtoken.losses.prefix_kl.targets import PrefixBlock, PrefixPart
from xtoken.tensors.host import readable
from xtoken.tensors.rows import upcast
from xtoken.tensors.teacher_signal import TeacherTopK, teacher_positions

if TYPE_CHECKING:
    from xtoken.losses.engine.run import LossCall
    from xtoken.losses.prefix_kl.block import PrefixKLBlocks

# Chunks whose prefixes torch compares at a time; mirrored ones read whole rows, of these numbers.
_CHUNKS, _MIRRORED_NUMBERS = 128, 2**20


def may_be_native(call: LossCall) -> bool:
    """Whether the core may compute the loss, which reads the logits where they lie."""
    return isinstance(call.source, LogitRows) and readable(call.source.logits)


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
    made = native_rows(loss.root, source, scale * loss.depth_weights[0], needed, grads)
    if made is None:
        return None
    total, sums, found, log_totals = made
    told = _told(loss, log_totals)
    logits = source.logits.detach()
    rows = logits.view(-1, logits.shape[-1])
    grad = None if found[0] is None else found[0].view(rows.shape)
    first = loss.root.student.index
    later, slope = sums.new_zeros(3), sums[-1:]
    for part in loss.parts:
        assert isinstance(part, PrefixPart)
        if part.places is not None:
            part = replace(part, places=None, _ready=None)  # the logits are read where they lie
        by_core = _below(loss, part, source, (rows, grad), scale, told)
        if by_core is not None:
            value, counted, more, left = by_core
            total, later, slope = total + value, later + counted, slope + more
            blocks = _of_items(part, left)
        else:
            blocks = _of_chunks(part, loss.student.count, source.vocab_size)
        for items in blocks:
            row = first[items.chunk]
            # Mirrored items read whole rows, without what pads them.
            size = source.vocab_size if items.mirrored else rows.shape[1]
            value, picked, counted = loss.with_grad(items, items.pick(rows[:, :size], row), scale)
            total = total + value * scale
            later = later + counted
            slope = slope + picked.sum()
            if grad is not None:
                items.put_back(grad[:, :size], row, picked)
    return total, torch.cat([sums[:-1], later, slope]), found


def _of_chunks(part: PrefixPart, count: int, size: int) -> Iterator[PrefixBlock]:
    """All items, those of some chunks at a time."""
    step = min(_CHUNKS, max(1, _MIRRORED_NUMBERS // size)) if part.mirrored else _CHUNKS
    for start in range(0, count, step):
        items = part.block(Block(start, min(start + step, count), None))
        if items is not None:
            yield items


def _of_items(part: PrefixPart, left: list[int]) -> Iterator[PrefixBlock]:
    """Single items by their number."""
    for at in left:
        chunk = int(np.searchsorted(part.items.ptr, at, "right")) - 1
        items = part.block(Block(chunk, chunk + 1, None))
        assert items is not None
        place = at - int(part.items.ptr[chunk])
        yield items.part(place, place + 1)


def _below(
    loss: PrefixKLBlocks,
    part: PrefixPart,
    source: LogitRows,
    rows_and_grad: tuple[Tensor, Tensor | None],
    scale: float | Tensor,
    told: NDArray[np.float64],
) -> tuple[Tensor, Tensor, Tensor, list[int]] | None:
    """The weighted sum times `scale`, what is counted, the sum of the gradient, and the items that
    need log space; None where the core does not read this teacher."""
    rows, grad = rows_and_grad
    teacher = _teacher(part, rows)
    if teacher is None:
        return None
    if not len(part.items):
        return rows.new_zeros(()), rows.new_zeros(3), rows.new_zeros(1), []
    items = part.items
    chunk, depth = items.chunk, items.depth
    weight = loss.depth_factors(depth, rows.new_zeros((), dtype=torch.float64))
    if loss.weights is not None:
        weight = weight * loss.weights[chunk].double()
    student_rows, teacher_rows = loss.root.student.index[chunk], part.teacher_first[chunk]
    if part.mirrored:
        student_rows = student_rows + depth
    else:
        teacher_rows = teacher_rows + depth
    # Sorted by chunk, as the places of the rows are.
    good, losses, compared, known, slopes = _core.prefix_kl_below(
        part.trie.trie.core,
        rows.numpy(),
        teacher[1].numpy(),
        student_rows.numpy(),
        teacher_rows.numpy(),
        items.ptr,
        items.host_node,
        (weight * float(scale)).numpy(),
        ids=None if teacher[0] is None else teacher[0].numpy(),
        log_totals=told[teacher_rows.numpy()] if teacher[0] is None else None,
        sizes=(source.vocab_size, part.entries.vocab_size),
        mirrored=part.mirrored,
        temperature=loss.root.temperature,
        min_mass=part.min_mass,
        end=part.end,
        gradient=None if grad is None else grad.numpy(),
        threads=torch.get_num_threads(),
    )
    value = float(losses @ weight.numpy()) * float(scale)
    counted = [losses.sum(), compared.sum(), known[compared].sum()]
    return (
        rows.new_tensor(value),
        rows.new_tensor(counted),
        rows.new_tensor([slopes.sum()]),
        np.flatnonzero(~good).tolist(),
    )


def _told(loss: PrefixKLBlocks, log_totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """[B * T_t] the log of each position's denominator, as far as the roots tell it."""
    positions = teacher_positions(loss.root.teacher.signal)
    told = np.full(positions[0] * positions[1], np.nan)
    told[loss.root.teacher.where.index.numpy()] = log_totals
    return told


def _teacher(part: PrefixPart, rows: Tensor) -> tuple[Tensor | None, Tensor] | None:
    """Stored ids [n, k], or None of logits, and their numbers; None where they are of another
    dtype or not in one piece."""
    signal = part.entries.signal
    ids = None
    if isinstance(signal, TeacherTopK):
        ids, values = signal.ids, upcast(signal.log_probs.detach())
        if not (readable(ids) and ids.is_contiguous()):
            return None
        ids = ids.view(-1, ids.shape[-1])
    elif isinstance(signal, Tensor):
        values = signal.detach()
    else:
        return None
    if not readable(values) or values.dtype != rows.dtype or not values.is_contiguous():
        return None
    return ids, values.view(-1, values.shape[-1])
