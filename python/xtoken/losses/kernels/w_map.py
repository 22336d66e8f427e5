"""W as the kernels read it: by teacher column and by student token, in int32 and float32."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from xtoken.tensors.projection import SparseProjection
from xtoken.tensors.segments import ragged_arange

# A column of more tokens is summed up by programs of its own.
_FEW = 32


@dataclass(frozen=True, eq=False)
class WMap:
    """W [V_s, V_t] in two orders.

    Attributes:
        code: [V_t] int32: the token of a column that has one; -1 of a column without; -2 - m of
            the m-th of the columns of several tokens, which are by rising number of them.
        log_w: [V_t] float32, the log of the weight of a column of one token, else 0.
        ptr, source, entry_log_w: [M + 1] and [E] int32, [E] float32: the columns of several.
        few: how many of those have few tokens.
        row_ptr, targets, weights: W's rows, [V_s + 1] and [nnz] int32, [nnz] float32.
    """

    code: Tensor
    log_w: Tensor
    ptr: Tensor
    source: Tensor
    entry_log_w: Tensor
    few: int
    row_ptr: Tensor
    targets: Tensor
    weights: Tensor

    @property
    def several(self) -> int:
        """M."""
        return self.ptr.shape[0] - 1


_made: weakref.WeakKeyDictionary[SparseProjection, tuple[tuple[object, ...], WMap]]
_made = weakref.WeakKeyDictionary()


def w_map(projection: SparseProjection) -> WMap:
    """W's map; made once, and again where its weights moved or changed."""
    weights = projection.weights
    state = (weights.device, weights.data_ptr(), weights._version)
    known = _made.get(projection)
    if known is None or known[0] != state:
        known = _made[projection] = (state, _make(projection))
    return known[1]


@torch.no_grad()
def _make(projection: SparseProjection) -> WMap:
    order, ptr, row_of = projection.by_column, projection.column_ptr, projection.row_of
    weights = projection.weights.to(torch.float32)
    log_weights = torch.log(weights)
    degree = ptr.diff()
    code = torch.full_like(degree, -1)
    log_w = torch.zeros_like(degree, dtype=torch.float32)
    alone = (degree == 1).nonzero().flatten()
    code[alone] = row_of[order[ptr[alone]]]
    log_w[alone] = log_weights[order[ptr[alone]]]
    several = (degree > 1).nonzero().flatten()
    several = several[torch.argsort(degree[several], stable=True)]
    sizes = degree[several]
    code[several] = -2 - torch.arange(len(several), device=code.device)
    entries = order[ragged_arange(ptr[several], sizes)]
    return WMap(
        code.to(torch.int32),
        log_w,
        torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(torch.int32),
        row_of[entries].to(torch.int32),
        log_weights[entries].contiguous(),
        int((sizes <= _FEW).sum()),
        projection.indptr.to(torch.int32),
        projection.indices.to(torch.int32),
        weights.contiguous(),
    )
