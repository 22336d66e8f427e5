"""The torch side of W: a sparse map from student to teacher vocabulary, fixed or learnable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from xtoken._checks import expect
from xtoken.errors import OptionError, ShapeError, TokenIdError
from xtoken.projection import Projection
from xtoken.projection.csr import check_row_sums, part_of, row_range
from xtoken.tensors.host import readable
from xtoken.tensors.segments import offsets_of, ragged_arange
from xtoken.tensors.sparse_ops import SparseMap, project_rows
from xtoken.vocab.fingerprints import PairFingerprint


def places_of(mask: Tensor) -> Tensor:
    """[n + 1] int64: the place of each set entry among the set ones, else (and past the end) their
    number."""
    places = torch.where(mask, mask.cumsum(0) - 1, mask.sum())
    return torch.cat([places, mask.sum()[None]])


@dataclass(frozen=True, eq=False)
class ColumnSlice:
    """W restricted to some teacher columns and to the student rows that reach them.

    Attributes:
        columns: [K] int64 teacher ids, the map's outputs in order; None means all V_t of them.
        rows: [n_in] int64 student ids, ascending, its inputs; None means all of them.
        entries: [nnz] int64, positions of the non-zeros in W's CSR arrays, in the map's order.
        map: the [n_in, K] sparsity.
        real: [nnz] bool, the entries that are non-zeros of W; the others fill the room up and have
            weight 0. None for all.
    """

    columns: Tensor | None
    rows: Tensor | None
    entries: Tensor
    map: SparseMap
    real: Tensor | None = None

    def weights_of(self, values: Tensor) -> Tensor:
        """[nnz] the weights of its entries, of W's `values` in CSR order."""
        found = values[self.entries]
        return found if self.real is None else torch.where(self.real, found, 0.0)

    def mapped(self, move: Callable[[Tensor], Tensor]) -> ColumnSlice:
        """The same in tensors that `move` makes of these, of equal values."""
        some = (self.columns, self.rows, self.real)
        columns, rows, real = (None if each is None else move(each) for each in some)
        return ColumnSlice(columns, rows, move(self.entries), self.map.mapped(move), real)

    def reindexed(self, rows: Tensor) -> ColumnSlice:
        """The same with `rows` [n] int64, ascending, as its inputs; they include its own."""
        if self.rows is None or len(rows) == len(self.rows):
            return self
        sparse = self.map.reindexed(torch.searchsorted(rows, self.rows), len(rows))
        return replace(self, rows=rows, map=sparse)


class SparseProjection(nn.Module):
    """W [V_s, V_t]: row s says which teacher tokens student token s corresponds to.

    Rows sum to 1 or are empty. `learnable=True` makes the weights a row softmax of free
    parameters over the fixed sparsity, starting at W (X-Token, arXiv 2605.21699, trains them
    with learning rate 1e-2 under P-KL).

    Buffers, beside those of `__init__`: `supported` [V_t] bool, the columns that some row reaches;
    `supported_ids`, the same as ascending ids; `column_of` [V_t + 1] int64, the place of each id
    among them (their number where unsupported, and for the id past the last); `empty_rows` [V_s]
    bool and `empty_ids`, the rows without an entry; `kept` [nnz] int64, of a part of another W
    whose free parameters it shares: which of them are those of the entries. Else None.

    Attributes:
        shape: (V_s, V_t).
        fingerprint: the pair of vocabularies, where known.
    """

    indptr: Tensor
    indices: Tensor
    weights: Tensor
    row_of: Tensor
    by_column: Tensor
    column_ptr: Tensor
    supported: Tensor
    supported_ids: Tensor
    column_of: Tensor
    empty_rows: Tensor
    empty_ids: Tensor

    def __init__(
        self,
        indptr: Tensor,
        indices: Tensor,
        weights: Tensor,
        shape: tuple[int, int],
        *,
        learnable: bool = False,
        fingerprint: PairFingerprint | None = None,
        sliced: bool = False,
    ) -> None:
        """
        Args:
            indptr: [V_s + 1] int64, the range of each row.
            indices: [nnz] int64 teacher ids, in [0, V_t).
            weights: [nnz] float, > 0; those of a row sum to 1.
            shape: (V_s, V_t).
            sliced: this is a block of another W, whose rows may sum to less than 1.

        Raises:
            ShapeError: the arrays do not fit one another or the shape, or a row does not sum to 1.
        """
        super().__init__()
        self.fingerprint = fingerprint
        _check_csr(indptr, indices, weights, shape)
        student_size, teacher_size = shape
        self.shape = (int(student_size), int(teacher_size))
        counts = indptr.diff()
        row_of = torch.repeat_interleave(
            torch.arange(student_size, device=indptr.device), counts
        )  # [nnz]
        if not sliced:
            # What a rounding of each weight may add up to, as of a module in bfloat16.
            tolerance = max(1e-3, torch.finfo(weights.dtype).eps)
            given = weights.detach().double().cpu().numpy()
            remedy = "divide the weights of each row by their sum"
            check_row_sums(row_of.cpu().numpy(), given, remedy, tolerance)
        by_column = torch.argsort(indices, stable=True)
        column_counts = torch.bincount(indices, minlength=teacher_size)
        for name, value in {
            "indptr": indptr,
            "indices": indices,
            "row_of": row_of,
            "by_column": by_column,
            "column_ptr": offsets_of(column_counts),
            "supported": column_counts > 0,
            "supported_ids": (column_counts > 0).nonzero().flatten(),
            "column_of": places_of(column_counts > 0),
            "empty_rows": counts == 0,
            "empty_ids": (counts == 0).nonzero().flatten(),
        }.items():
            self.register_buffer(name, value, persistent=False)
        # W itself is kept in the state, so that a checkpoint holds what the run used.
        self.register_buffer("weights", weights.detach().clone())
        self.free: nn.Parameter | None = None
        if learnable:
            self.free = nn.Parameter(torch.log(weights.detach()))
        self.kept: Tensor | None = None
        self._full: ColumnSlice | None = None
        # How many non-zeros any k columns have at most.
        heaviest = np.sort(column_counts.cpu().numpy())[::-1]
        self._most_entries = np.concatenate([[0], heaviest.cumsum()])

    @classmethod
    def from_csr(
        cls,
        indptr: ArrayLike | Tensor,
        indices: ArrayLike | Tensor,
        weights: ArrayLike | Tensor,
        shape: tuple[int, int],
        *,
        learnable: bool = False,
        fingerprint: PairFingerprint | None = None,
    ) -> SparseProjection:
        """From numpy arrays or tensors of a CSR matrix, explicit zeros dropped.

        float64 weights stay float64, all others become float32.

        Raises: as the constructor.
        """
        values = torch.as_tensor(weights)
        if values.dtype != torch.float64:
            values = values.to(torch.float32)
        ptr, ids = _whole("indptr", indptr), _whole("indices", indices)
        if values.shape == ids.shape and bool((values == 0).any()):
            # A column reached by zeros alone would count as supported, at an infinite KL.
            kept = offsets_of(values != 0)
            ids, values, ptr = ids[values != 0], values[values != 0], kept[ptr]
        return cls(
            ptr, ids, values, (int(shape[0]), int(shape[1])),
            learnable=learnable, fingerprint=fingerprint,
        )  # fmt: skip

    @classmethod
    def from_projection(
        cls, projection: Projection, *, learnable: bool = False
    ) -> SparseProjection:
        """W of a pair as a module.

        Raises:
            ArgumentTypeError: not a `Projection`.
        """
        expect(
            projection, Projection, "projection", "pass xtoken.Projection.build(...) of the pair"
        )
        return cls.from_csr(
            projection.indptr,
            projection.indices,
            projection.weights,
            projection.shape,
            learnable=learnable,
            fingerprint=projection.pair,
        )

    @classmethod
    def identity(cls, size: int) -> SparseProjection:
        """Each of `size` tokens on itself: one vocabulary on both sides."""
        ids = torch.arange(size)
        return cls(torch.arange(size + 1), ids, torch.ones(size), (size, size))

    def values(self) -> Tensor:
        """[nnz] the weights in CSR order; carries a gradient where they are learnable."""
        if self.free is None:
            return self.weights
        rows, free = self.row_of, self.free if self.kept is None else self.free[self.kept]
        top = free.new_full((self.shape[0],), -torch.inf)
        top = top.scatter_reduce(0, rows, free.detach(), "amax")
        exps = torch.exp(free - top[rows])
        sums = exps.new_zeros(self.shape[0]).index_add(0, rows, exps)
        return exps / sums[rows]

    def full(self) -> ColumnSlice:
        """The map onto all supported columns; built once, and again after a move to a device."""
        if self._full is None or self._full.entries.device != self.indptr.device:
            shape = (self.shape[0], len(self.supported_ids))
            with torch.inference_mode(False):  # it is kept, and training may come after
                outputs = self.column_of[self.indices[self.by_column]]
                sparse = SparseMap.build(self.row_of[self.by_column], outputs, *shape)
            every = len(self.supported_ids) == self.shape[1]
            ids = None if every else self.supported_ids
            self._full = ColumnSlice(ids, None, self.by_column, sparse)
        return self._full

    def columns(self, ids: Tensor) -> ColumnSlice:
        """The map onto teacher columns `ids` [K] int64, and the student rows that reach them."""
        if not readable(ids):
            return self._columns_blind(ids)
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.shape[1]):
            raise TokenIdError(
                f"column ids span [{int(ids.min())}, {int(ids.max())}], expected ids below "
                f"V_t = {self.shape[1]}; pass the teacher this W was built for"
            )
        sizes = self.column_ptr[ids + 1] - self.column_ptr[ids]
        entries = self.by_column[ragged_arange(self.column_ptr[ids], sizes)]
        outputs = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), sizes)
        rows, inputs = torch.unique(self.row_of[entries], return_inverse=True)
        return ColumnSlice(
            ids, rows, entries, SparseMap.build(inputs, outputs, len(rows), len(ids))
        )

    def _columns_blind(self, ids: Tensor) -> ColumnSlice:
        """`columns` in shapes that do not depend on which ids they are: room for the non-zeros of
        the heaviest columns, and as many student rows, some of which reach nothing."""
        device, count, room = ids.device, len(ids), int(self._most_entries[len(ids)])
        first = self.column_ptr[ids]
        ends = offsets_of(self.column_ptr[ids + 1] - first)
        place = torch.arange(room, device=device)
        outputs = torch.searchsorted(ends, place, right=True) - 1
        real = outputs < count
        outputs = outputs.clamp(max=count - 1)
        at = torch.where(real, first[outputs] + place - ends[outputs], 0)
        entries = self.by_column[at]
        rows_of = self.row_of[entries]
        reached = torch.zeros(self.shape[0], dtype=torch.int64, device=device)
        reached.index_add_(0, rows_of, real.to(torch.int64))
        size = min(room, self.shape[0])
        rows = torch.argsort((reached == 0).to(torch.int8), stable=True)[:size].sort().values
        places = torch.zeros_like(reached).index_copy(0, rows, torch.arange(size, device=device))
        inputs = torch.where(real, places[rows_of], 0)
        return ColumnSlice(ids, rows, entries, SparseMap.build(inputs, outputs, size, count), real)

    def project(self, probs: Tensor, columns: Tensor | None = None) -> Tensor:
        """`probs @ W`: the student's distributions in the teacher's vocabulary.

        Args:
            probs: [R, V_s] float, >= 0.
            columns: None for all of them, [K] int64 for the same columns in every row, or
                [R, K] int64 for each row's own.

        Returns: [R, V_t] or [R, K]; differentiable in probs and in learnable weights.

        Raises:
            ShapeError: probs or columns do not fit W's shape.
        """
        if probs.dim() != 2 or probs.shape[1] != self.shape[0]:
            raise ShapeError(
                f"probs has shape {tuple(probs.shape)}, expected [R, {self.shape[0]}]; "
                "drop the lm_head's padding, or pass the student this W was built for"
            )
        if columns is not None and columns.dim() == 1:
            part = self.columns(columns)
            assert part.rows is not None
            return project_rows(probs[:, part.rows], part.weights_of(self.values()), part.map)
        full = self.full()
        rows = project_rows(probs, self.values()[full.entries], full.map)
        if full.columns is not None:
            rows = rows.new_zeros(len(rows), self.shape[1]).index_copy(1, full.columns, rows)
        if columns is None:
            return rows
        if columns.shape[0] != probs.shape[0]:
            raise ShapeError(
                f"columns has {columns.shape[0]} rows, expected {probs.shape[0]} like probs"
            )
        return rows.gather(1, columns)

    def limited(self, rows: int, columns: int) -> SparseProjection:
        """W between the first tokens of both sides, rows scaled to sum to 1 again, as
        `Projection.limited`. Learnable weights are shared with this: training one trains both.

        Raises: as `Projection.limited`.
        """
        rows, columns = part_of(self.shape, rows, columns)
        kept = ((self.row_of < rows) & (self.indices < columns)).nonzero().flatten()
        row_of, weights = self.row_of[kept], self.weights[kept]
        sums = weights.new_zeros(rows).index_add(0, row_of, weights)
        made = SparseProjection(
            offsets_of(torch.bincount(row_of, minlength=rows)),
            self.indices[kept],
            weights / sums[row_of],
            (rows, columns),
            fingerprint=self.fingerprint,
            sliced=True,
        )
        if self.free is not None:
            made.free = self.free
            del made.kept  # a name that is taken cannot become a buffer, which moves with the rest
            own = kept if self.kept is None else self.kept[kept]
            made.register_buffer("kept", own, persistent=False)
        return made

    def row_slice(self, start: int, stop: int) -> SparseProjection:
        """W's rows [start, stop): the part of a student vocabulary shard; [stop - start, V_t]."""
        start, stop = row_range(start, stop)
        if not 0 <= start <= stop <= self.shape[0]:
            raise ShapeError(f"rows [{start}, {stop}) are not inside V_s = {self.shape[0]}")
        low, high = int(self.indptr[start]), int(self.indptr[stop])
        return SparseProjection(
            self.indptr[start : stop + 1] - low,
            self.indices[low:high],
            self.values().detach()[low:high],
            (stop - start, self.shape[1]),
            learnable=self.free is not None,
            sliced=True,
        )

    def column_slice(self, start: int, stop: int) -> SparseProjection:
        """W's columns [start, stop); rows may then sum to less than 1. Not for learnable weights,
        whose softmax runs over whole rows."""
        start, stop = row_range(start, stop)
        if not 0 <= start <= stop <= self.shape[1]:
            raise ShapeError(f"columns [{start}, {stop}) are not inside V_t = {self.shape[1]}")
        if self.free is not None:
            raise OptionError("a learnable W cannot be cut by columns; cut it before training")
        keep = (self.indices >= start) & (self.indices < stop)
        counts = torch.bincount(self.row_of[keep], minlength=self.shape[0])
        return SparseProjection(
            offsets_of(counts),
            self.indices[keep] - start,
            self.weights[keep],
            (self.shape[0], stop - start),
            sliced=True,
        )

    def to_projection(self, base: Projection) -> Projection:
        """The learned weights as an `xtoken.Projection`, to save, explain or export.

        Args:
            base: what this was made from.

        Raises:
            PairError: it is of another pair.
        """
        base = expect(base, Projection, "base", "pass the xtoken.Projection this was made from")
        if self.fingerprint is not None:
            self.fingerprint.check(base.pair, "base", "pass the projection this was made from")
        return base.with_weights(self.values().detach().cpu().numpy())

    def extra_repr(self) -> str:
        kind = ", learnable" if self.free is not None else ""
        return f"{self.shape[0]} x {self.shape[1]}, nnz={self.indices.shape[0]}{kind}"


def _whole(name: str, values: ArrayLike | Tensor) -> Tensor:
    found = torch.as_tensor(values)
    if found.numel() and (found.is_floating_point() or found.dtype == torch.bool):
        raise ShapeError(f"{name} is {found.dtype}, expected whole numbers; pass int64")
    return found.to(torch.int64)


def _check_csr(indptr: Tensor, indices: Tensor, weights: Tensor, shape: tuple[int, int]) -> None:
    student_size, teacher_size = shape
    for name, value in (("indptr", indptr), ("indices", indices)):
        if value.dtype != torch.int64 or value.dim() != 1:
            raise ShapeError(f"{name} is {value.dtype} {tuple(value.shape)}, expected int64 [n]")
    if indptr.shape[0] != student_size + 1:
        raise ShapeError(
            f"indptr has {indptr.shape[0]} entries, expected V_s + 1 = {student_size + 1}"
        )
    if not weights.is_floating_point():
        raise ShapeError(f"weights is {weights.dtype}, expected a floating dtype; pass floats")
    nnz = indices.shape[0]
    if weights.shape != indices.shape:
        raise ShapeError(f"weights has {tuple(weights.shape)} entries, expected {nnz} like indices")
    if int(indptr[0]) != 0 or int(indptr[-1]) != nnz or bool((indptr.diff() < 0).any()):
        raise ShapeError(f"indptr must rise from 0 to nnz = {nnz}; this is no CSR matrix")
    if nnz and (int(indices.min()) < 0 or int(indices.max()) >= teacher_size):
        raise ShapeError(
            f"indices span [{int(indices.min())}, {int(indices.max())}], expected ids below "
            f"V_t = {teacher_size}"
        )
    if not bool(torch.isfinite(weights).all()) or bool((weights <= 0).any()):
        raise ShapeError("weights must be finite and above 0; from_csr drops explicit zeros")
