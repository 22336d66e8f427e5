"""Single log-probabilities of rows of logits, and all else in each row, in one read of the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from xtoken.losses.kernels import self_check
from xtoken.losses.kernels.choice import on_device_of, takes
from xtoken.losses.kernels.exact import GroupedKL, Groups
from xtoken.losses.kernels.launch import Rows


def read_entries(
    logits: Tensor, size: int, tau: float, rows: Tensor, entry_row: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor] | None:
    """As `TeacherEntries.read` of full logits [B, T, V']; None where torch reads them.

    Returns:
        [S] float32 log-probabilities, -inf for no entry; [N] log of the mass on other columns.
    """
    if not len(rows) or not takes("prefix-kl", self_check.prefix_kl, logits):
        return None
    count, listed, device = len(rows), len(columns), rows.device
    every = torch.arange(listed + 1, device=device)
    starts = torch.searchsorted(entry_row, torch.arange(count + 1, device=device))
    nothing = torch.zeros(listed, device=device)
    groups = Groups(
        columns, every[:-1], entry_row, every, starts, nothing, torch.zeros_like(columns),
        torch.zeros(count, device=device), torch.zeros(count, dtype=torch.int8, device=device),
        (0, count), (0, listed), (0, listed),
    )  # fmt: skip
    with on_device_of(logits):
        found = GroupedKL.of(Rows.of(logits, rows), groups, size, tau=tau)
    whole, others = found.stats[:, 0], found.stats[:, 1]
    return found.logs - whole[entry_row], others - whole
