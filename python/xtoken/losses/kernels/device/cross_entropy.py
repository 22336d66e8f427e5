# mypy: ignore-errors
"""Cross-entropy: one read of a row for the value, one more for p less 1 at the target."""

import triton
import triton.language as tl

from xtoken.losses.kernels.device.common import (
    cross_entropy_slope,
    finite_top,
    load_row,
    not_a_number,
)


@triton.jit
def losses(
    z_ptr, z_rows, z_step, targets, counted, parts, logs, out, size, PARTS: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp and loss of each row [n]: inf and 0 where it is not counted, the loss NaN where
    the target is outside [0, size)."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PADDED)
    at, inside = parts + (row * PARTS + part) * 2, part < PARTS
    top = tl.load(at, mask=inside, other=float("-inf"))
    total = tl.load(at + 1, mask=inside, other=0.0)
    base = finite_top(tl.max(top, axis=0))
    log = base + tl.log(tl.sum(total * tl.exp(top - base), axis=0))
    target = tl.load(targets + row)
    known = (target >= 0) & (target < size)
    z = tl.load(z_ptr + tl.load(z_rows + row) + target * z_step, mask=known, other=float("nan")).to(
        tl.float32
    )
    counts = tl.load(counted + row) != 0
    # inf of a row that counts, of a logit that is inf, must not read as one that does not.
    told = tl.where(log == float("inf"), float("nan"), log)
    tl.store(logs + row, tl.where(counts, told, float("inf")))
    tl.store(out + row, tl.where(counts, log - z, 0.0))


@triton.jit
def gradient(
    z_ptr, z_rows, z_step, targets, logs, factor, skipped, grad_ptr, grad_rows, checks, size,
    width, SKIPS: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad [n, width] = factor (p - 1 at the target), 0 past `size` and where it is not counted;
    nothing in rows that are `skipped` [n] int8."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    skip = tl.full((), 0, tl.int32)
    if SKIPS:
        skip = tl.load(skipped + row).to(tl.int32)
    if skip == 0:
        column = block * BLOCK + tl.arange(0, BLOCK)
        held = column < width
        inside = column < tl.where(tl.load(logs + row) != float("inf"), size, 0)
        z = load_row(z_ptr + tl.load(z_rows + row), column, z_step, inside)
        slope = cross_entropy_slope(z, column, targets, logs, factor, row)
        grad = tl.where(inside, slope, 0.0)
        check = tl.sum(grad, axis=0) + not_a_number(z, inside)
        tl.store(checks + row * tl.num_programs(1) + block, check)
        at = grad_ptr + tl.load(grad_rows + row) + column
        if ADDS:
            grad += tl.load(at, mask=held, other=0.0).to(tl.float32)
        tl.store(at, grad.to(grad_ptr.dtype.element_ty), mask=held)
