"""Rows of logits: how many to work on together, and in which precision."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements per block of rows: 4 MB in float32 stay in a CPU's cache; GPUs use larger blocks.
_BLOCK_NUMBERS = {"cpu": 2**20, "cuda": 2**25}


def block_rows(width: int, device: torch.device) -> int:
    """Rows that are worked on together, from the widest row that is held of each."""
    numbers = _BLOCK_NUMBERS.get(device.type, _BLOCK_NUMBERS["cuda"])
    return max(1, numbers // max(width, 1))


def upcast(rows: Tensor) -> Tensor:
    """float32 for half precision, else unchanged: the maths of a loss never runs in 16 bits."""
    return rows.to(upcast_dtype(rows.dtype))


def upcast_dtype(dtype: torch.dtype) -> torch.dtype:
    """What rows of a dtype are computed in, and the dtype of their loss."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def taken(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]` of a [n] table, by the gather that is six times as fast on a CPU."""
    return table.index_select(0, index.flatten()).view(index.shape)
