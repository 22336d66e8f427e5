# mypy: ignore-errors
"""Cross-entropy: one read of a row for the value, one more for p less 1 at the target."""

import triton
import triton.language as tl

from xtoken.losses.kernels.device.common import finite_top, load_row, not_a_number


@triton.jit
def losses(
    z_ptr, z_rows, z_step, targets, counted, parts, out, size, PARTS: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """out [n, 2]: log-sum-exp and loss of each row; the loss 0 where it is not counted, NaN where
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
    tl.store(out + row * 2, log)
    tl.store(out + row * 2 + 1, tl.where(tl.load(counted + row) != 0, log - z, 0.0))


@triton.jit
def gradient(
    z_ptr, z_rows, z_step, targets, counted, stats, scale, grad_ptr, grad_rows, checks, size,
    width, ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad [n, width] = scale (p - 1 at the target), 0 past `size` and where it is not counted."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    held = column < width
    inside = column < tl.where(tl.load(counted + row) != 0, size, 0)
    z = load_row(z_ptr + tl.load(z_rows + row), column, z_step, inside)
    target = (column == tl.load(targets + row)).to(tl.float32)
    grad = tl.where(inside, (tl.exp(z - tl.load(stats + row * 2)) - target) * tl.load(scale), 0.0)
    check = tl.sum(grad, axis=0) + not_a_number(z, inside)
    tl.store(checks + row * tl.num_programs(1) + block, check)
    at = grad_ptr + tl.load(grad_rows + row) + column
    if ADDS:
        grad += tl.load(at, mask=held, other=0.0).to(tl.float32)
    tl.store(at, grad.to(grad_ptr.dtype.element_ty), mask=held)
