"""Cross-entropy by kernels, into a gradient of its own or added to that of another loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xtoken.losses.engine.shared_gradient import CrossEntropyRows
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
    write_cross_entropy,
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
    if loss.by_row is None:
        loss.by_row = _values(loss, student)
    logs, losses = loss.by_row
    gradient, checks = None, None
    if any(needed):
        index = loss.student.index
        gradient = GradientBuffer.of(student, index, grads)
        factor = torch.ones((), device=index.device) * scale
        rows = CrossEntropyRows(index, loss.targets, logs, factor)
        checks = write_cross_entropy(student, rows, gradient)
    total = losses.sum()
    return found(student, total, scale, [total], gradient, checks)


def _values(loss: CrossEntropyBlocks, student: LogitRows) -> tuple[Tensor, Tensor]:
    """[n] log-sum-exp and loss of each row; inf and 0 where it does not count."""
    from xtoken.losses.kernels.device import cross_entropy as device
    from xtoken.losses.kernels.device.top_k import row_parts

    index, size = loss.student.index, student.vocab_size
    z = Rows.of(student.logits, index)
    count, parts = len(z), cdiv(size, launch.SPAN)
    partial = floats(z.tensor, count, parts, 2)
    logs, losses = floats(z.tensor, count), floats(z.tensor, count)
    rows = (z.tensor, z.offsets, z.step)
    counted = torch.ones_like(index, dtype=torch.int8)
    if loss.counted is not None:
        counted = loss.counted.to(torch.int8)
    row_parts[(count, parts)](
        *rows, loss.targets, partial, partial, size, 1.0, PATCHES=0, PARTS=parts,
        SPAN=launch.SPAN, BLOCK=launch.BLOCK,
    )  # fmt: skip
    device.losses[(count,)](
        *rows, loss.targets, counted, partial, logs, losses, size, PARTS=parts,
        PADDED=padded(parts),
    )  # fmt: skip
    return logs, losses
