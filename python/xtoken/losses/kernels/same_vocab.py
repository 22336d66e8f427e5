"""The forward KL of one vocabulary over full logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    one_row_each,
    padded,
    seeds,
    times,
)
from xtoken.losses.kernels.patches import patched_columns

if TYPE_CHECKING:
    from xtoken.losses.same_vocab_kl import SameVocabBlocks


def same_vocab_pass(
    loss: SameVocabBlocks,
    source: StudentRows,
    scale: float | Tensor,
    needed: tuple[bool, ...],
    grads: list[Tensor | None] | None,
) -> Found | None:
    """The whole pass over a batch by kernels; None where torch computes it."""
    compared = _compared(loss, source)
    if compared is None:
        return None
    with on_device_of(compared.index):
        return compared.at_once(scale, needed, grads)


def same_vocab_in_two(
    loss: SameVocabBlocks, source: StudentRows, scale: float | Tensor
) -> tuple[Tensor, Tensor, Later] | None:
    """The value now and the gradient later, see `BlockLoss.in_two`."""
    compared = _compared(loss, source)
    return None if compared is None else compared.in_two(scale)


def _compared(loss: SameVocabBlocks, source: StudentRows) -> Compared | None:
    student, teacher = one_row_each(loss.student, source), loss.teacher
    signal = teacher.signal
    if student is None or not isinstance(signal, Tensor) or teacher.where.owner is not None:
        return None
    if loss.direction != "forward" or loss.top_k is not None or loss.full_metrics:
        return None
    patches = patched_columns(teacher)
    if patches is None or not takes("same-vocab-kl", self_check.same_vocab, student.logits, signal):
        return None
    with on_device_of(signal):
        return _compare(loss, student, signal, patches)


def _compare(
    loss: SameVocabBlocks,
    source: LogitRows,
    signal: Tensor,
    patches: tuple[Tensor, Tensor],
) -> Compared:
    from xtoken.losses.kernels.device import same_vocab as device

    index, size, tau = loss.student.index, source.vocab_size, loss.temperature
    z, y = Rows.of(source.logits, index), Rows.of(signal, loss.teacher.where.index)
    count, parts, patch_count = len(z), cdiv(size, launch.SPAN), len(patches[0])
    partial = floats(index, count, parts, 5)
    logs = floats(index, count, 3)
    rows = (z.tensor, z.offsets, z.step, y.tensor, y.offsets, y.step, *patches)
    device.stats[(count, parts)](
        *rows,
        partial,
        size,
        1 / tau,
        PARTS=parts,
        PATCHES=patch_count,
        SPAN=launch.SPAN,
        BLOCK=launch.BLOCK,
    )
    device.together[(count,)](partial, logs, PARTS=parts, PADDED=padded(parts))
    own, _ = seeds(count, loss.weights, 1.0, index.device)
    losses = logs[:, 2]

    def write(scale: float | Tensor, gradient: GradientBuffer) -> Tensor:
        width = gradient.flat.shape[1]
        blocks = cdiv(width, launch.BLOCK)
        checks = floats(index, count, blocks)
        device.gradient[(count, blocks)](
            *rows, logs, times(own, scale) * tau, *gradient.cross_entropy, gradient.flat,
            gradient.rows, checks, size, width, 1 / tau, PATCHES=patch_count,
            JOINS=gradient.joined is not None, ADDS=gradient.adds, BLOCK=launch.BLOCK,
        )  # fmt: skip
        return checks

    sums = [losses.sum(), torch.full_like(own[0], float(count))]
    return Compared(source, index, (losses * own).sum() * tau**2, sums, write)
