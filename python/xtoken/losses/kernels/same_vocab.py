"""The forward KL of one vocabulary over full logits."""

from __future__ import annotations

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
    one_row_each,
    padded,
    seeds,
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
        return _launch(loss, student, signal, patches, scale, needed, grads)


def _launch(
    loss: SameVocabBlocks,
    source: LogitRows,
    signal: Tensor,
    patches: tuple[Tensor, Tensor],
    scale: float | Tensor,
    needed: tuple[bool, ...],
    grads: list[Tensor | None] | None,
) -> Found:
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
        tau,
        PARTS=parts,
        PATCHES=patch_count,
        SPAN=launch.SPAN,
        BLOCK=launch.BLOCK,
    )
    device.together[(count,)](partial, logs, PARTS=parts, PADDED=padded(parts))
    own, seed = seeds(count, loss.weights, scale, index.device)
    losses = logs[:, 2]
    gradient, checks = None, None
    if any(needed):
        gradient = GradientBuffer.of(source, index, grads)
        width = gradient.flat.shape[1]
        blocks = cdiv(width, launch.BLOCK)
        checks = floats(index, count, blocks)
        device.gradient[(count, blocks)](
            *rows, logs, seed * tau, gradient.flat, gradient.rows, checks, size, width, tau,
            PATCHES=patch_count, ADDS=gradient.adds, BLOCK=launch.BLOCK,
        )  # fmt: skip
    sums = [losses.sum(), torch.full_like(own[0], float(count))]
    return found(source, (losses * own).sum() * tau**2, scale, sums, gradient, checks)
