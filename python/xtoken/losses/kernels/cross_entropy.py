"""Cross-entropy by kernels, into a gradient of its own or added to that of another loss."""

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
)

if TYPE_CHECKING:
    from xtoken.losses.cross_entropy import CrossEntropyBlocks


def cross_entropy_pass(
    loss: CrossEntropyBlocks,
    source: StudentRows,
    scale: float | Tensor,
    needed: tuple[bool, ...],
    grads: list[Tensor | None] | None,
) -> Found | None:
    """The whole pass over a batch by kernels; None where torch computes it."""
    student = one_row_each(loss.student, source)
    if student is None or loss.full_metrics:
        return None
    if not takes("cross-entropy", self_check.cross_entropy, student.logits):
        return None
    with on_device_of(student.logits):
        return _launch(loss, student, scale, needed, grads)


def _launch(
    loss: CrossEntropyBlocks,
    student: LogitRows,
    scale: float | Tensor,
    needed: tuple[bool, ...],
    grads: list[Tensor | None] | None,
) -> Found:
    from xtoken.losses.kernels.device import cross_entropy as device
    from xtoken.losses.kernels.device.top_k import row_parts

    index, size = loss.student.index, student.vocab_size
    z = Rows.of(student.logits, index)
    count, parts = len(z), cdiv(size, launch.SPAN)
    partial, stats = floats(z.tensor, count, parts, 2), floats(z.tensor, count, 2)
    rows = (z.tensor, z.offsets, z.step)
    counted = torch.ones_like(index, dtype=torch.int8)
    if loss.counted is not None:
        counted = loss.counted.to(torch.int8)
    row_parts[(count, parts)](
        *rows, loss.targets, partial, partial, size, 1.0, PATCHES=0, PARTS=parts,
        SPAN=launch.SPAN, BLOCK=launch.BLOCK,
    )  # fmt: skip
    device.losses[(count,)](
        *rows, loss.targets, counted, partial, stats, size, PARTS=parts, PADDED=padded(parts)
    )
    gradient, checks = None, None
    if any(needed):
        gradient = GradientBuffer.of(student, index, grads)
        width = gradient.flat.shape[1]
        blocks = cdiv(width, launch.BLOCK)
        checks = floats(z.tensor, count, blocks)
        factor = torch.ones(1, device=index.device) * scale
        device.gradient[(count, blocks)](
            *rows, loss.targets, counted, stats, factor, gradient.flat, gradient.rows, checks,
            size, width, ADDS=gradient.adds, BLOCK=launch.BLOCK,
        )  # fmt: skip
    total = stats[:, 1].sum()
    return found(student, total, scale, [total], gradient, checks)
