"""A sparse matrix in compressed rows, as numpy arrays: checks, slices, transposition."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xtoken._checks import as_whole, expect, shown
from xtoken._extras import needs_extra
from xtoken.errors import ArgumentTypeError, OptionError, ShapeError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Csr:
    """A sparse [rows, columns] matrix; row r holds entries `indptr[r]` to `indptr[r + 1]`.

    Attributes:
        indptr: [rows + 1] int64, rising from 0 to nnz.
        indices: [nnz] int64, columns.
        weights: [nnz] float32, finite and >= 0.
        shape: (rows, columns).

    Raises:
        ShapeError: the arrays do not fit one another or the shape.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int64]
    weights: NDArray[np.float32]
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        rows, columns = self.shape
        nnz = len(self.indices)
        for name, dtype in (("indptr", np.int64), ("indices", np.int64), ("weights", np.float32)):
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != 1:
                raise ShapeError(
                    f"{name} is {array.dtype} of shape {array.shape}; expected {np.dtype(dtype)} "
                    "with one axis"
                )
        if len(self.indptr) != rows + 1:
            raise ShapeError(
                f"indptr has {len(self.indptr)} entries; expected {rows + 1}, rows + 1"
            )
        if len(self.weights) != nnz:
            raise ShapeError(f"weights has {len(self.weights)} entries; indices has {nnz}")
        if self.indptr[0] != 0 or self.indptr[-1] != nnz or bool((np.diff(self.indptr) < 0).any()):
            raise ShapeError(f"indptr must rise from 0 to {nnz}, the number of entries")
        if nnz and not 0 <= int(self.indices.min()) <= int(self.indices.max()) < columns:
            raise ShapeError(
                f"indices lie in [{self.indices.min()}, {self.indices.max()}]; expected columns "
                f"in [0, {columns})"
            )
        if not bool((np.isfinite(self.weights) & (self.weights >= 0)).all()):
            raise ShapeError("weights holds negative or non-finite values; expected 0 and above")

    def row(self, row: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Columns and weights of one row.

        Raises:
            ArgumentTypeError: no whole number.
            ShapeError: there is no such row.
        """
        row = as_whole("row", row, "pass one row")
        if not 0 <= row < self.shape[0]:
            raise ShapeError(f"row {row} is not inside [0, {self.shape[0]}); pass a row of W")
        part = slice(self.indptr[row], self.indptr[row + 1])
        return self.indices[part], self.weights[part]

    def row_of(self) -> NDArray[np.int64]:
        """[nnz] int64, the row of each entry."""
        return np.repeat(np.arange(self.shape[0]), np.diff(self.indptr))

    def row_sums(self) -> NDArray[np.float64]:
        """[rows] float64; a row of W sums to 1 or, where it is empty, to 0."""
        weights = self.weights.astype(np.float64)
        return np.bincount(self.row_of(), weights, self.shape[0]).astype(np.float64)

    def transposed(self) -> Csr:
        """The [columns, rows] matrix; in a row by rising column."""
        order = np.argsort(self.indices, kind="stable")
        counts = np.bincount(self.indices, minlength=self.shape[1])
        return Csr(offsets(counts), self.row_of()[order], self.weights[order], self.shape[::-1])

    def row_slice(self, start: int, stop: int) -> Csr:
        """Rows [start, stop), as for one shard of a student's vocabulary.

        Raises:
            ArgumentTypeError: an end is no whole number.
            ShapeError: the range lies outside the rows.
        """
        start, stop = row_range(start, stop)
        if not 0 <= start <= stop <= self.shape[0]:
            raise ShapeError(f"rows [{start}, {stop}) are not inside [0, {self.shape[0]})")
        indptr = self.indptr[start : stop + 1]
        part = slice(indptr[0], indptr[-1])
        return Csr(
            indptr - indptr[0], self.indices[part], self.weights[part],
            (stop - start, self.shape[1]),
        )  # fmt: skip

    def column_slice(self, columns: ArrayLike) -> Csr:
        """The matrix onto some columns, in the order given; its rows may sum to less than 1.

        Args:
            columns: [K] distinct columns, as the teacher's top-k ids.

        Raises:
            ArgumentTypeError: they are no sequence of whole numbers.
            ShapeError: a column is outside the matrix or is given twice.
        """
        wanted = numbers("columns", columns, "iu", "whole numbers [K]").astype(np.int64)
        if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < self.shape[1]:
            raise ShapeError(
                f"columns lie in [{wanted.min()}, {wanted.max()}]; expected [0, {self.shape[1]})"
            )
        position = np.full(self.shape[1], -1, dtype=np.int64)
        position[wanted] = np.arange(len(wanted))
        if not np.array_equal(position[wanted], np.arange(len(wanted))):
            raise ShapeError("columns holds an id twice; pass each id once")
        kept = position[self.indices] >= 0
        counts = np.bincount(self.row_of()[kept], minlength=self.shape[0])
        return Csr(
            offsets(counts), position[self.indices[kept]], self.weights[kept],
            (self.shape[0], len(wanted)),
        )  # fmt: skip

    def to_torch(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """A torch sparse CSR tensor, float32 unless `dtype` says otherwise.

        Raises:
            ArgumentTypeError: `dtype` is none of torch's.
            OptionError: torch knows no such device, or `dtype` holds no fractions.
            ShapeError: a row has a column twice.
            MissingExtraError: torch is not installed.
        """
        with needs_extra():
            import torch

        if dtype is None:
            dtype = torch.float32
        if not expect(dtype, torch.dtype, "dtype", "pass such as torch.float32").is_floating_point:
            raise OptionError(
                f"dtype = {dtype} holds no weights below 1; pass such as torch.float32"
            )
        if device is not None:
            try:
                device = torch.device(device)
            except (RuntimeError, TypeError) as error:
                raise OptionError(
                    f"device = {shown(device)}, which torch does not know; pass such as 'cuda'"
                ) from error
        # torch wants rising columns in a row; W has falling weights.
        row_of = self.row_of()
        order = np.lexsort((self.indices, row_of))
        twice = (np.diff(row_of[order]) == 0) & (np.diff(self.indices[order]) == 0)
        if bool(twice.any()):
            at = order[np.flatnonzero(twice)[0]]
            raise ShapeError(
                f"row {row_of[at]} has column {self.indices[at]} twice; add up its weights"
            )
        with warnings.catch_warnings():
            # torch calls its CSR support beta, once per process.
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
            matrix = torch.sparse_csr_tensor(
                torch.tensor(self.indptr, device="cpu"),
                torch.tensor(self.indices[order], device="cpu"),
                torch.tensor(self.weights[order], device="cpu"),
                size=self.shape,
                check_invariants=True,
            )
        return matrix.to(device=device, dtype=dtype)


def row_range(start: int, stop: int) -> tuple[int, int]:
    """Two ends as whole numbers.

    Raises:
        ArgumentTypeError: one is none.
    """
    hint = "pass the first row and the one after the last"
    return as_whole("start", start, hint), as_whole("stop", stop, hint)


def part_of(shape: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
    """How many of the first rows and columns of a W [V_s, V_t] are kept, as whole numbers.

    Raises:
        ArgumentTypeError: a number is no whole one.
        ShapeError: a number is outside its range.
    """
    rows = as_whole("rows", rows, "pass the rows of the student's head")
    columns = as_whole("columns", columns, "pass the columns of the teacher's head")
    for (name, value), size in zip((("rows", rows), ("columns", columns)), shape, strict=True):
        if not 0 < value <= size:
            raise ShapeError(f"{name} = {value}, expected 1 to {size}, W's own number")
    return rows, columns


def check_row_sums(
    row_of: NDArray[np.int64], weights: ArrayLike, remedy: str, tolerance: float = 1e-3
) -> None:
    """Refuse a W with a row that is no distribution.

    Args:
        row_of: [nnz], the row of each weight.
        remedy: what to do.
        tolerance: float32 rounding is below the default, and what bfloat16 training leaves.

    Raises:
        ShapeError: names the first row and its sum.
    """
    sums = np.bincount(row_of, np.asarray(weights, dtype=np.float64))
    rows = np.unique(row_of)
    wrong = rows[np.abs(sums[rows] - 1) > tolerance]
    if len(wrong):
        raise ShapeError(
            f"row {wrong[0]} of W sums to {sums[wrong[0]]:.4f}, as do {len(wrong)} rows to other "
            f"than 1; {remedy}"
        )


def numbers(name: str, values: ArrayLike, kinds: str, wanted: str) -> NDArray[Any]:
    """[n] an array of numbers, where they are of these kinds of NumPy's dtypes.

    Raises:
        ArgumentTypeError: they are not.
        ShapeError: they have another number of axes.
    """
    try:
        found = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(
            f"{name} cannot be read ({str(error).strip().splitlines()[0]}); pass {wanted}"
        ) from error
    if found.ndim != 1:
        raise ShapeError(f"{name} has shape {found.shape}, expected {wanted}; pass one axis")
    if len(found) and found.dtype.kind not in kinds:
        raise ArgumentTypeError(f"{name} is {found.dtype}, expected {wanted}; pass a list of those")
    return found


def offsets(counts: ArrayLike) -> NDArray[np.int64]:
    """Running sums of counts with a leading 0: the `indptr` of rows of these lengths."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


def reweighted(
    csr: Csr, weights: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Other weights on the entries of a matrix, rows scaled to sum to 1 and sorted by weight.

    Args:
        weights: [nnz] float, finite and >= 0, in the order of `csr.indices`.

    Returns: indptr, the kept entries' positions in the old order, and their weights; entries whose
        weight is 0 are left out.

    Raises:
        ArgumentTypeError: they are no numbers.
        ShapeError: another number of weights, or one that is negative or not finite.
        OptionError: the weights of a row are all 0.
    """
    given = numbers("weights", weights, "fiu", "numbers [nnz]").astype(np.float64)
    if given.shape != csr.weights.shape:
        raise ShapeError(f"weights has shape {given.shape}; expected {csr.weights.shape}")
    if not bool((np.isfinite(given) & (given >= 0)).all()):
        raise ShapeError("weights holds negative or non-finite values; expected 0 and above")
    rows = csr.row_of()
    sums = np.bincount(rows, given, csr.shape[0])
    if bool((sums[rows] == 0).any()):
        raise OptionError(f"the weights of row {rows[sums[rows] == 0][0]} are all 0")
    given = given / sums[rows]
    order = np.lexsort((-given, rows))  # stable: of equal weights the order stays
    kept = order[given[order].astype(np.float32) > 0]
    indptr = offsets(np.bincount(rows[kept], minlength=csr.shape[0]))
    return indptr, kept, given[kept].astype(np.float32)
