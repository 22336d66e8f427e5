# mypy: ignore-errors
"""Forward KL of one vocabulary: one read of both rows for the value, one more for p - q.

With z and y the logits, M and m running largest ones of z and y, a part of a row holds

    log-sum-exp of z, of y, and the sum of exp(y - m) ((y - m) - (z - M)),

centred so that a common offset of all logits costs no digits; parts are then put together.
"""

import triton
import triton.language as tl

from xtoken.losses.kernels.device.common import (
    add_terms,
    cross_entropy_slope,
    finite_top,
    load_row,
    not_a_number,
    with_patches,
)


@triton.jit
def stats(
    z_ptr, z_rows, z_step, y_ptr, y_rows, y_step, patch_columns, patch_values, parts, size, beta,
    PARTS: tl.constexpr, PATCHES: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts [n, PARTS, 5]: largest z, sum, largest y, sum, weighted sum of differences."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    z_row, y_row = z_ptr + tl.load(z_rows + row), y_ptr + tl.load(y_rows + row)
    z_top = tl.full((), float("-inf"), tl.float32)
    y_top = tl.full((), float("-inf"), tl.float32)
    z_sum = tl.full((), 0.0, tl.float32)
    y_sum = tl.full((), 0.0, tl.float32)
    cross = tl.full((), 0.0, tl.float32)
    for first in range(0, SPAN, BLOCK):
        column = part * SPAN + first + tl.arange(0, BLOCK)
        inside = column < size
        z = load_row(z_row, column, z_step, inside) * beta
        y = load_row(y_row, column, y_step, inside)
        y = with_patches(y, column, patch_columns, patch_values, row, PATCHES) * beta
        z_old, y_old = finite_top(z_top), finite_top(y_top)
        z_top, z_sum = add_terms(z_top, z_sum, z)
        z_base, y_base = finite_top(z_top), finite_top(tl.maximum(y_top, tl.max(y, axis=0)))
        moved = cross + y_sum * ((z_base - z_old) - (y_base - y_old))
        moved = tl.where(y_sum > 0, moved * tl.exp(y_old - y_base), 0.0)
        share = tl.exp(y - y_base)
        terms = tl.where(share > 0, share * ((y - y_base) - (z - z_base)), 0.0)
        cross = moved + tl.sum(terms, axis=0)
        y_top, y_sum = add_terms(y_top, y_sum, y)
    at = parts + (row * PARTS + part) * 5
    tl.store(at, z_top)
    tl.store(at + 1, z_sum)
    tl.store(at + 2, y_top)
    tl.store(at + 3, y_sum)
    tl.store(at + 4, cross)


@triton.jit
def together(parts, out, PARTS: tl.constexpr, PADDED: tl.constexpr):
    """out [n, 3]: log-sum-exp of z, of y, and the KL in nats."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PADDED)
    inside = part < PARTS
    at = parts + (row * PARTS + part) * 5
    z_top = tl.load(at, mask=inside, other=float("-inf"))
    z_sum = tl.load(at + 1, mask=inside, other=0.0)
    y_top = tl.load(at + 2, mask=inside, other=float("-inf"))
    y_sum = tl.load(at + 3, mask=inside, other=0.0)
    cross = tl.load(at + 4, mask=inside, other=0.0)
    z_base, y_base = finite_top(tl.max(z_top, axis=0)), finite_top(tl.max(y_top, axis=0))
    z_total = tl.sum(z_sum * tl.exp(z_top - z_base), axis=0)
    # NaN of a part is in its sums, and its largest term may be none.
    shrink = tl.exp(y_top - y_base)
    y_total = tl.sum(y_sum * shrink, axis=0)
    moved = (z_base - finite_top(z_top)) - (y_base - finite_top(y_top))
    cross_total = tl.sum(tl.where(y_sum == 0, 0.0, (cross + y_sum * moved) * shrink), axis=0)
    tl.store(out + row * 3, z_base + tl.log(z_total))
    tl.store(out + row * 3 + 1, y_base + tl.log(y_total))
    tl.store(out + row * 3 + 2, cross_total / y_total - tl.log(y_total) + tl.log(z_total))


@triton.jit
def gradient(
    z_ptr, z_rows, z_step, y_ptr, y_rows, y_step, patch_columns, patch_values, logs, seed,
    ce_targets, ce_logs, ce_factor, grad_ptr, grad_rows, checks, size, width, beta,
    PATCHES: tl.constexpr, JOINS: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad [n, width] = seed (p - q), 0 past `size`; checks [n, blocks] sums of it. JOINS adds a
    cross-entropy's."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside, held = column < size, column < width
    raw = load_row(z_ptr + tl.load(z_rows + row), column, z_step, inside)
    z = raw * beta
    y = load_row(y_ptr + tl.load(y_rows + row), column, y_step, inside)
    y = with_patches(y, column, patch_columns, patch_values, row, PATCHES) * beta
    p, q = tl.exp(z - tl.load(logs + row * 3)), tl.exp(y - tl.load(logs + row * 3 + 1))
    grad = tl.where(inside, (p - q) * tl.load(seed + row), 0.0)
    check = tl.sum(grad, axis=0) + not_a_number(z, inside)
    tl.store(checks + row * tl.num_programs(1) + block, check)
    if JOINS:
        slope = cross_entropy_slope(raw, column, ce_targets, ce_logs, ce_factor, row)
        grad += tl.where(inside, slope, 0.0)
    at = grad_ptr + tl.load(grad_rows + row) + column
    if ADDS:
        grad += tl.load(at, mask=held, other=0.0).to(tl.float32)
    tl.store(at, grad.to(grad_ptr.dtype.element_ty), mask=held)
