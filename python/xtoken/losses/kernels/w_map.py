"""W as the kernels read it: by teacher column and by student token, in int32 and float32.

A code names a column: its one token or itself where it has one, >= 0; -1 for none; -2 - m for the
m-th of the columns of several tokens, which are by rising number of them.
"""

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
        code: [V_t] int32, each column's; of one token, that token.
        log_w: [V_t] float32, the log of the weight of a column of one token, else 0.
        columns: [M] int32, those of several tokens.
        ptr, source, entry_log_w: [M + 1] and [E] int32, [E] float32: the columns of several.
        few: how many of those have few tokens.
        first, first_weight: [V_s] int32 and float32, the code of each row's first column, the
            column itself where it has one token, and its weight.
        more_ptr, more, more_weights: [V_s + 1] and [R] int32, [R] float32, those of its others.
    """

    code: Tensor
    log_w: Tensor
    columns: Tensor
    ptr: Tensor
    source: Tensor
    entry_log_w: Tensor
    few: int
    first: Tensor
    first_weight: Tensor
    more_ptr: Tensor
    more: Tensor
    more_weights: Tensor

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
    # By student token.
    row_ptr, targets = projection.indptr, projection.indices
    codes = torch.where(code[targets] >= 0, targets, code[targets])
    some = row_ptr.diff() > 0
    head = torch.zeros_like(codes, dtype=torch.bool)
    head[row_ptr[:-1][some]] = True
    first = torch.full_like(row_ptr[1:], -1).masked_scatter(some, codes[head])
    first_weight = torch.zeros_like(first, dtype=torch.float32)
    first_weight = first_weight.masked_scatter(some, weights[head])
    more = (row_ptr.diff() - 1).clamp(min=0)
    return WMap(
        code.to(torch.int32),
        log_w,
        several.to(torch.int32),
        torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(torch.int32),
        row_of[entries].to(torch.int32),
        log_weights[entries].contiguous(),
        int((sizes <= _FEW).sum()),
        first.to(torch.int32),
        first_weight,
        torch.nn.functional.pad(more.cumsum(0), (1, 0)).to(torch.int32),
        codes[~head].to(torch.int32),
        weights[~head],
    )
