"""Cross-entropy by the core on the CPU: a row in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from xtoken import _core
from xtoken.losses.engine.native_rows import flat, gradient_of, suits, zero_others
from xtoken.losses.engine.student_rows import LogitRows, StudentRows

if TYPE_CHECKING:
    from xtoken.losses.cross_entropy import CrossEntropyBlocks


def native_pass(
    loss: CrossEntropyBlocks,
    source: StudentRows,
    scale: float | Tensor,
    needed: tuple[bool, ...],
    grads: list[Tensor | None] | None,
) -> tuple[Tensor, Tensor, list[Tensor | None]] | None:
    """`run_blocks` of all rows; None where they are not for the core."""
    if not isinstance(source, LogitRows) or loss.full_metrics or loss.counted is not None:
        return None
    logits = source.logits.detach()
    if not suits(logits):
        return None
    rows = loss.student.index.numpy()
    if not len(rows) or len(np.unique(rows)) < len(rows):
        return None
    grad = gradient_of(logits, needed, grads)
    losses, slopes = _core.cross_entropy(
        flat(logits), rows, loss.targets.numpy(), size=source.vocab_size, seed=float(scale),
        gradient=None if grad is None else flat(grad), adds=grads is not None,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    if grads is None and grad is not None:
        zero_others(grad, rows[~np.isnan(losses)])
    total = losses.sum()
    sums = logits.new_tensor([total, slopes.sum()])
    return logits.new_tensor(total) * scale, sums, [grad]
