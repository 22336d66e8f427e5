# mypy: ignore-errors
"""Parts of several kernels. Sums are of exponentials after the largest of their terms, in float32.

`beta` is 1 / temperature. Every block is masked, rows begin at
int64 offsets, no float is added atomically.
"""

import triton
import triton.language as tl


@triton.jit
def finite_top(top):
    """A largest term to subtract: 0 where there is none."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def add_terms(top, total, terms):
    """A running largest term and sum of exp, with those of a block."""
    new = tl.maximum(top, tl.max(terms, axis=0))
    base = finite_top(new)
    total = total * tl.exp(top - base) + tl.sum(tl.exp(terms - base), axis=0)
    return new, total


@triton.jit
def load_row(base, columns, step, inside):
    """Logits of a row as float32; -inf outside."""
    at = base + columns.to(tl.int64) * step
    return tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def with_patches(values, columns, patch_columns, patch_values, row, PATCHES: tl.constexpr):
    """Logits of a row with those of some columns replaced, [PATCHES] columns of every row."""
    for j in tl.static_range(PATCHES):
        value = tl.load(patch_values + row * PATCHES + j)
        values = tl.where(columns == tl.load(patch_columns + j), value, values)
    return values


@triton.jit
def is_set(bits, column, inside):
    """Whether the bits of a row, 32 in an int32, are 1 at each column."""
    word = tl.load(bits + (column >> 5), mask=inside, other=0)
    return ((word >> (column & 31)) & 1) != 0


@triton.jit
def not_a_number(values, inside):
    """The sum of 0 for numbers and -inf, NaN for the rest: what makes a gradient's check fail."""
    told = tl.where(values < float("inf"), 0.0, float("nan"))
    return tl.sum(tl.where(inside, told, 0.0), axis=0)


@triton.jit
def cross_entropy_slope(z, column, targets, logs, factor, row):
    """factor (p - 1 at the target) of raw logits z of a row; 0 where its log-sum-exp is inf."""
    log = tl.load(logs + row)
    target = (column == tl.load(targets + row)).to(tl.float32)
    return tl.where(log != float("inf"), (tl.exp(z - log) - target) * tl.load(factor), 0.0)


@triton.jit
def clear_rows(flat, touched, width, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """0 in the rows [n, width] that are not touched [n]."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(touched + row) == 0:
        zeros = tl.zeros([BLOCK], dtype=flat.dtype.element_ty)
        for first in range(0, SPAN, BLOCK):
            column = tl.program_id(1) * SPAN + first + tl.arange(0, BLOCK)
            tl.store(flat + row * width + column, zeros, mask=column < width)


@triton.jit
def scale_unless_one(flat, factor, count, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """flat [count] times a number; nothing is read or written where that is 1."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        for first in range(0, SPAN, BLOCK):
            at = tl.program_id(0).to(tl.int64) * SPAN + first + tl.arange(0, BLOCK)
            values = tl.load(flat + at, mask=at < count, other=0.0).to(tl.float32) * by
            tl.store(flat + at, values.to(flat.dtype.element_ty), mask=at < count)
