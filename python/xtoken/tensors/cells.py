"""The cells of a pair: teacher columns that a student tells apart, and where the others belong."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xtoken.projection import Projection
from xtoken.targets import TargetBuilder
from xtoken.tensors.projection import SparseProjection
from xtoken.tensors.segments import segment_logsumexp
from xtoken.tensors.stop_fold import StopFold

Ints = NDArray[np.int64]


class CellFold(nn.Module):
    """Teacher columns added to those that their cells are named after; as `StopFold`, of many.

    Attributes:
        column_of: [V_t + 1] int64 the column that each one is added to, itself for most; the last
            is that of what is no column.
        sources, groups: [m] int64 the columns that move, and the index of each one's target.
        targets: [n] int64 the columns that others are added to.

    >>> fold = CellFold(torch.tensor([0, 0, 2]))
    >>> fold.dense(torch.log(torch.tensor([[0.5, 0.2, 0.3]]))).exp()
    tensor([[0.7000, 0.0000, 0.3000]])
    """

    column_of: Tensor
    sources: Tensor
    groups: Tensor
    targets: Tensor

    def __init__(self, column_of: Tensor) -> None:
        """
        Args:
            column_of: [V_t] int64 the column that each one is added to.
        """
        super().__init__()
        size = len(column_of)
        moved = (column_of != torch.arange(size)).nonzero().flatten()
        targets, groups = torch.unique(column_of[moved], return_inverse=True)
        for name, tensor in (
            ("column_of", torch.cat([column_of, torch.tensor([size])])),
            ("sources", moved),
            ("groups", groups),
            ("targets", targets),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def __len__(self) -> int:
        return len(self.sources)

    def dense(self, rows: Tensor) -> Tensor:
        """[R, V_t] logits or log-probabilities, the sources' moved; changed in place."""
        if not len(self.sources):
            return rows
        moved = segment_logsumexp(rows[:, self.sources], self.groups, len(self.targets))
        rows[:, self.targets] = torch.logaddexp(rows[:, self.targets], moved)
        # A number put at an index would wait for the device.
        return rows.index_fill_(1, self.sources, -torch.inf)

    def chosen(self, rows: Tensor, whole: Tensor, columns: Tensor) -> Tensor:
        """[R, K] at `columns` [K] of `whole` [R, V_t], as `dense` has them."""
        return self.dense(whole).index_select(1, columns).to(rows.dtype)

    def stored(self, ids: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities [R, k] of a stored top-k, the sources' moved; of several
        entries of one column the first holds all, and the others nothing."""
        ids = self.column_of[ids.clamp(max=len(self.column_of) - 1)]
        ids, order = torch.sort(ids, dim=1, stable=True)
        log_probs = log_probs.gather(1, order)
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        place = first.cumsum(1) - 1
        rows = torch.arange(len(ids), device=ids.device)[:, None] * ids.shape[1]
        sums = segment_logsumexp(log_probs.flatten(), (place + rows).flatten(), ids.numel())
        return ids, sums.view_as(log_probs).gather(1, place).masked_fill(~first, -torch.inf)

    def named(self, mask: Tensor) -> Tensor:
        """[V_t] bool of named ids: a target is named where a source of it is."""
        counts = torch.zeros_like(mask, dtype=torch.int64)
        return counts.index_add(0, self.column_of[:-1], mask.to(torch.int64)) > 0

    def extra_repr(self) -> str:
        return f"{len(self.sources)} columns to {len(self.targets)}"


class Cells(nn.Module):
    """What `cells` and `consistent` need of a pair; made on the CPU.

    Attributes:
        fold: teacher columns to cells, stop tokens folded as ever.
        projection: W onto the cells.
        builder: of exact targets, which knows the cells and where the student has its boundaries.
    """

    fold: CellFold
    projection: SparseProjection

    def __init__(self, projection: Projection, stops: StopFold | None = None) -> None:
        """
        Args:
            projection: W of the pair, built or loaded with its tokenizers.
            stops: the teacher's stop tokens that no student token stands for.

        Raises:
            OptionError: the projection was loaded without its tokenizers.
            UnsupportedTokenizerError: a tokenizer has no model that can segment.
        """
        super().__init__()
        self.builder = TargetBuilder.from_projection(projection)
        columns = projection.shape[1]
        # Of a narrow head the builder is that of all columns: what it names may lie beyond.
        roots = self.builder.roots[:columns]
        to = np.where((roots >= 0) & (roots < columns), roots, np.arange(columns))
        for source, target in () if stops is None else stops.pairs:
            to = np.where(to == source, target, to)
        self.fold = CellFold(torch.from_numpy(to))
        self.projection = _onto(projection, to)
        self._swallowing: dict[int, Ints] = {}

    def first_pieces(self, first: SparseProjection) -> SparseProjection:
        """W with `decay = 0` onto the cells."""
        columns = self.fold.column_of[first.indices]
        return SparseProjection(
            first.indptr, columns, first.weights, first.shape, fingerprint=first.fingerprint
        )

    def swallowing(self, tokens: Ints) -> list[Ints]:
        """For each student token the teacher tokens that the student would have joined to it."""
        unknown = sorted({int(token) for token in tokens} - self._swallowing.keys())
        if unknown:
            indptr, ids = self.builder.swallowing(np.asarray(unknown, np.int64))
            size = self.projection.shape[1]
            for at, token in enumerate(unknown):
                mine = ids[indptr[at] : indptr[at + 1]]
                self._swallowing[token] = mine[mine < size]
        return [self._swallowing[int(token)] for token in tokens]


def _onto(projection: Projection, to: Ints) -> SparseProjection:
    """W with its columns moved, entries of one cell added up, rows by falling weight."""
    rows, columns = projection.csr.row_of(), to[projection.indices]
    key = rows * projection.shape[1] + columns
    unique, place = np.unique(key, return_inverse=True)
    weights = np.bincount(place, projection.weights, len(unique))
    rows, columns = np.divmod(unique, projection.shape[1])
    order = np.lexsort((columns, -weights, rows))
    indptr = np.concatenate([[0], np.bincount(rows, minlength=projection.shape[0]).cumsum()])
    return SparseProjection.from_csr(
        indptr,
        columns[order],
        weights[order].astype(np.float32),
        projection.shape,
        fingerprint=projection.pair,
    )
