"""A sparse matrix applied to rows: products in both directions, and in log space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xtoken.tensors.host import readable
from xtoken.tensors.once import once_differentiable
from xtoken.tensors.segments import counts_of, offsets_of, ragged_arange, segment_logsumexp


@dataclass(frozen=True, eq=False)
class SparseMap:
    """A sparse [n_in, n_out] matrix, its non-zeros sorted by output and by input; values outside.

    Attributes:
        inputs: [nnz] int64, input of each non-zero, sorted by output.
        outputs: [nnz] int64, output of each non-zero, in the same order.
        output_ptr: [n_out + 1] int64, range of each output's non-zeros.
        transposed: [nnz] int64, the order that sorts the non-zeros by input.
        outputs_by_input: [nnz] int64, output of each non-zero in that order.
        input_ptr: [n_in + 1] int64, range of each input's non-zeros in that order.
    """

    inputs: Tensor
    outputs: Tensor
    output_ptr: Tensor
    transposed: Tensor
    outputs_by_input: Tensor
    input_ptr: Tensor

    @classmethod
    def build(cls, inputs: Tensor, outputs: Tensor, n_in: int, n_out: int) -> SparseMap:
        """From non-zeros already sorted by output."""
        transposed = torch.argsort(inputs, stable=True)
        return cls(
            inputs,
            outputs,
            offsets_of(counts_of(outputs, n_out)),
            transposed,
            outputs[transposed],
            offsets_of(counts_of(inputs, n_in)),
        )

    def reindexed(self, places: Tensor, n_in: int) -> SparseMap:
        """The same with its inputs at `places` [old n_in] int64, ascending, among `n_in`."""
        inputs = places[self.inputs]
        ptr = offsets_of(counts_of(inputs, n_in))
        return replace(self, inputs=inputs, input_ptr=ptr)

    def mapped(self, move: Callable[[Tensor], Tensor]) -> SparseMap:
        """The same in tensors that `move` makes of these, of equal values."""
        return SparseMap(
            move(self.inputs),
            move(self.outputs),
            move(self.output_ptr),
            move(self.transposed),
            move(self.outputs_by_input),
            move(self.input_ptr),
        )

    def matmul(self, rows: Tensor, values: Tensor) -> Tensor:
        """[R, n_in] times the matrix: [R, n_out]."""
        return _bag(rows, self.inputs, self.output_ptr, values)

    def matmul_transposed(self, rows: Tensor, values: Tensor) -> Tensor:
        """[R, n_out] times the transposed matrix: [R, n_in]."""
        return _bag(rows, self.outputs_by_input, self.input_ptr, values[self.transposed])

    def value_gradient(self, rows_in: Tensor, rows_out: Tensor) -> Tensor:
        """[nnz]: sum over rows of `rows_in[:, input] * rows_out[:, output]`."""
        return (rows_in[:, self.inputs] * rows_out[:, self.outputs]).sum(0)


def _bag(rows: Tensor, index: Tensor, ptr: Tensor, values: Tensor) -> Tensor:
    """out[r, i] = sum over j in [ptr[i], ptr[i+1]) of values[j] * rows[r, index[j]]."""
    # A bag sums whole rows of its table, so the table is the transposed block: a weighted
    # gather of R contiguous numbers. Deterministic, and 4 times faster than index_add_.
    return bag_sums(rows.t().contiguous(), index, ptr, values).t().contiguous()


def bag_sums(table: Tensor, index: Tensor, ptr: Tensor, values: Tensor) -> Tensor:
    """out[i] = sum over j in [ptr[i], ptr[i+1]) of values[j] * table[index[j]]; [n, R] in, [m, R].

    Where the sums of `_bag` are wanted transposed, and the rows are at hand so.
    """
    if index.shape[0] == 0:
        return table.new_zeros(ptr.shape[0] - 1, table.shape[1])
    return F.embedding_bag(
        index, table, ptr, mode="sum", per_sample_weights=values.to(table.dtype),
        include_last_offset=True,
    )  # fmt: skip


def bag_totals(table: Tensor, ptr: Tensor) -> Tensor:
    """out[i] = sum over j in [ptr[i], ptr[i+1]) of table[j]; [n, R] to [m, R], 0 for none."""
    every = torch.arange(len(table), device=table.device)
    return F.embedding_bag(every, table, ptr, mode="sum", include_last_offset=True)


def bag_tops(table: Tensor, ptr: Tensor) -> Tensor:
    """The same for the largest; 0 for none."""
    every = torch.arange(len(table), device=table.device)
    return F.embedding_bag(every, table, ptr, mode="max", include_last_offset=True)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, values: Tensor, sparse: SparseMap) -> Tensor:
        ctx.save_for_backward(rows, values)
        ctx.sparse = sparse
        return sparse.matmul(rows, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, values = ctx.saved_tensors
        grad_rows = ctx.sparse.matmul_transposed(grad, values) if ctx.needs_input_grad[0] else None
        grad_values = None
        if ctx.needs_input_grad[1]:
            grad_values = ctx.sparse.value_gradient(rows, grad).to(values.dtype)
        return grad_rows, grad_values, None


class _LogProject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, values: Tensor, sparse: SparseMap) -> Tensor:
        top = logits.amax(1, keepdim=True) if logits.shape[1] else logits.new_zeros(len(logits), 1)
        top = top.nan_to_num(neginf=0.0) if bool(torch.isneginf(top).any()) else top
        exps = torch.exp(logits - top)
        sums = sparse.matmul(exps, values)
        # Below this a sum has lost digits, or underflowed to a zero that would read as an
        # infinite KL although the logits are finite: those columns are redone in log space.
        faint = (sums < torch.finfo(sums.dtype).tiny * 1e6).any(0).nonzero().flatten()
        out = torch.log(sums).add_(top)
        redone = out.new_zeros(0)
        if faint.numel():
            out[:, faint] = _log_sums(logits, values, sparse, faint)
            redone = logits
        ctx.save_for_backward(exps, sums, values, faint, redone, out if faint.numel() else redone)
        ctx.sparse = sparse
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        exps, sums, values, faint, logits, out = ctx.saved_tensors
        sparse: SparseMap = ctx.sparse
        scaled = grad / sums
        if faint.numel():
            scaled[:, faint] = 0.0
        grad_logits = sparse.matmul_transposed(scaled, values).mul_(exps)
        grad_values = None
        if ctx.needs_input_grad[1]:
            grad_values = sparse.value_gradient(exps, scaled)
        if faint.numel():
            entries, column = _entries(sparse, faint)
            source = sparse.inputs[entries]
            ratio = torch.exp(logits[:, source] - out[:, faint[column]]).nan_to_num(nan=0.0)
            ratio = ratio * grad[:, faint[column]]  # [R, E]
            grad_logits.index_add_(1, source, ratio * values[entries].to(ratio.dtype))
            if grad_values is not None:
                grad_values.index_add_(0, entries, ratio.sum(0))
        if grad_values is not None:
            grad_values = grad_values.to(values.dtype)
        return grad_logits, grad_values, None


def _entries(sparse: SparseMap, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the non-zeros of `columns`, and for each the index into `columns`."""
    sizes = sparse.output_ptr[columns + 1] - sparse.output_ptr[columns]
    owner = torch.repeat_interleave(torch.arange(len(columns), device=columns.device), sizes)
    return ragged_arange(sparse.output_ptr[columns], sizes), owner


def _log_sums(logits: Tensor, values: Tensor, sparse: SparseMap, columns: Tensor) -> Tensor:
    """log of the sums of `columns`, [R, K], by a segment log-sum-exp; -inf without any mass."""
    entries, column = _entries(sparse, columns)
    terms = logits[:, sparse.inputs[entries]] + torch.log(values[entries].to(logits.dtype))
    return segment_logsumexp(terms, column, len(columns))


def log_project(logits: Tensor, values: Tensor, sparse: SparseMap) -> Tensor:
    """log of `exp(logits) @ matrix`, differentiable in logits and values, without underflow.

    Args:
        logits: [R, n_in] float, any offset per row; -inf is no mass.
        values: [nnz] the non-zeros, in the order of `sparse`, >= 0.

    Returns: [R, n_out]; -inf only where a column has no mass at all.
    """
    if not readable(logits):  # no branch on data there: all of it in log space
        weights = values.to(logits.dtype)
        none = weights <= 0  # what fills room up has no mass, and no gradient
        weights = torch.log(weights.masked_fill(none, 1.0)).masked_fill(none, -torch.inf)
        terms = logits[:, sparse.inputs] + weights
        return segment_logsumexp(terms, sparse.outputs, sparse.output_ptr.shape[0] - 1)
    result: Tensor = _LogProject.apply(logits, values, sparse)
    return result


def project_rows(rows: Tensor, values: Tensor, sparse: SparseMap) -> Tensor:
    """[R, n_in] rows times the matrix, [R, n_out]; differentiable in rows and values [nnz]."""
    result: Tensor = _Project.apply(rows, values, sparse)
    return result
