"""New rows of a matrix with one row per token: W times the old rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xtoken.projection import Csr

# New rows worked on at a time.
BLOCK = 4096


@torch.no_grad()
def transferred_rows(
    old: Tensor,
    w: Csr,
    size: int,
    mean_of: Tensor,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """The rows of the new tokens: `W @ old`, and the mean where a row of W is empty.

    A row of W with one entry is a row of `old` bit for bit. Sums are in float64 where `old` is,
    in float32 otherwise, and rounded once.

    Args:
        old: [rows, ...] float, at least as many rows as W has columns.
        w: [tokens, columns].
        size: rows of the result, at least as many as tokens; those beyond are the mean.
        mean_of: [n] int64, the rows of `old` that the mean is taken of, at least one.
        progress: told the number of rows after each block.

    Returns: [size, ...] in the dtype and on the device of `old`.
    """
    exact = torch.float64 if old.dtype == torch.float64 else torch.float32
    indptr, indices = torch.from_numpy(w.indptr), torch.from_numpy(w.indices)
    weights = torch.from_numpy(w.weights)
    new = old.new_empty((size, *old.shape[1:]))
    new[:] = _mean(old, mean_of)
    for start in range(0, w.shape[0], BLOCK):
        stop = min(start + BLOCK, w.shape[0])
        begin, end = int(indptr[start]), int(indptr[stop])
        lengths = indptr[start : stop + 1].diff()
        taken = old[indices[begin:end].to(old.device)].to(exact)
        factors = weights[begin:end].to(old.device, exact)
        taken *= factors.view(-1, *[1] * (old.dim() - 1))
        row = torch.repeat_interleave(torch.arange(stop - start), lengths).to(old.device)
        block = torch.zeros((stop - start, *old.shape[1:]), dtype=exact, device=old.device)
        block.index_add_(0, row, taken)
        sourced = (lengths > 0).to(old.device)
        new[start:stop][sourced] = block[sourced].to(old.dtype)
        if progress is not None:
            progress(stop)
    return new


def _mean(old: Tensor, rows: Tensor) -> Tensor:
    """The mean of some rows; in float64, as they are many."""
    total = torch.zeros(old.shape[1:], dtype=torch.float64, device=old.device)
    for part in torch.split(rows.to(old.device), BLOCK):
        total += old[part].double().sum(0)
    return (total / len(rows)).to(old.dtype)
