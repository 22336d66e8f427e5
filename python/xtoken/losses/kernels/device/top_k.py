# mypy: ignore-errors
"""Which teacher columns are kept: the k largest of a row, or the heaviest of a micro-batch."""

import triton
import triton.language as tl

from xtoken.losses.kernels.device.common import (
    add_terms,
    finite_top,
    load_row,
    with_patches,
)


@triton.jit
def ordered(values):
    """Numbers as uint32 in the same order; -0 as 0."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    flipped = tl.where(bits < 0, bits ^ -1, bits ^ -2147483648)
    return flipped.to(tl.uint32, bitcast=True)


@triton.jit
def keys(
    y_row, y_step, patch_columns, patch_values, row, code, column, size, PATCHES: tl.constexpr
):
    """Keys of columns in the order of their logits, and which of them W reaches."""
    inside = column < size
    # A bit for each column instead is slower.
    reached = inside & (tl.load(code + column, mask=inside, other=-1) != -1)
    y = load_row(y_row, column, y_step, reached)
    y = with_patches(y, column, patch_columns, patch_values, row, PATCHES)
    return ordered(y), reached


@triton.jit
def largest(
    y_ptr, y_rows, y_step, patch_columns, patch_values, code, bits, size, k, WORDS,
    PASSES: tl.constexpr, PATCHES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """bits [n, WORDS]: the k largest logits among the columns that W reaches, ties to the lowest.

    A radix select by 8 bits at a time; of 16-bit logits two are enough, as the rest is 0.
    """
    row = tl.program_id(0).to(tl.int64)
    y_row = y_ptr + tl.load(y_rows + row)
    bins = tl.arange(0, 512)
    chosen = tl.full((), 0, tl.uint32)
    need = k + tl.full((), 0, tl.int32)
    for level in tl.static_range(PASSES):
        counts = tl.zeros([512], tl.int32)
        for first in range(0, size, BLOCK):
            column = first + tl.arange(0, BLOCK)
            key, reached = keys(
                y_row, y_step, patch_columns, patch_values, row, code, column, size, PATCHES
            )
            if level > 0:
                reached = reached & ((key >> (32 - 8 * level)) == chosen)
            digit = ((key >> (24 - 8 * level)) & 255).to(tl.int32)
            counts += tl.histogram(tl.where(reached, digit, 511), 512)
        counts = tl.where(bins < 256, counts, 0)
        above = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0)
        best = tl.max(tl.where((bins < 256) & (above + counts >= need), bins, 0), axis=0)
        need -= tl.sum(tl.where(bins == best, above, 0), axis=0)
        chosen = (chosen << 8) | best.to(tl.uint32)
    ties = tl.full((), 0, tl.int32)
    lane = tl.arange(0, BLOCK)
    for first in range(0, size, BLOCK):
        column = first + lane
        key, reached = keys(
            y_row, y_step, patch_columns, patch_values, row, code, column, size, PATCHES
        )
        key = key >> (32 - 8 * PASSES)
        tie = (reached & (key == chosen)).to(tl.int32)
        among = ties + tl.cumsum(tie, axis=0)
        kept = reached & ((key > chosen) | ((tie > 0) & (among <= need)))
        ties += tl.sum(tie, axis=0)
        # Distinct powers of two: their sum is their union.
        words = tl.reshape(kept.to(tl.int32) << (lane & 31), [BLOCK // 32, 32])
        place = first // 32 + tl.arange(0, BLOCK // 32)
        tl.store(bits + row * WORDS + place, tl.sum(words, axis=1), mask=place < WORDS)


@triton.jit
def row_parts(
    y_ptr, y_rows, y_step, patch_columns, patch_values, parts, size, beta,
    PATCHES: tl.constexpr, PARTS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts [n, PARTS, 2]: largest logit and sum of exp after it."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    y_row = y_ptr + tl.load(y_rows + row)
    top, total = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
    for first in range(0, SPAN, BLOCK):
        column = part * SPAN + first + tl.arange(0, BLOCK)
        inside = column < size
        y = load_row(y_row, column, y_step, inside)
        y = with_patches(y, column, patch_columns, patch_values, row, PATCHES) * beta
        top, total = add_terms(top, total, y)
    tl.store(parts + (row * PARTS + part) * 2, top)
    tl.store(parts + (row * PARTS + part) * 2 + 1, total)


@triton.jit
def row_totals(parts, totals, PARTS: tl.constexpr, PADDED: tl.constexpr):
    """totals [n]: log of the sum of exp of each row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PADDED)
    at, inside = parts + (row * PARTS + part) * 2, part < PARTS
    top = tl.load(at, mask=inside, other=float("-inf"))
    total = tl.load(at + 1, mask=inside, other=0.0)
    base = finite_top(tl.max(top, axis=0))
    tl.store(totals + row, base + tl.log(tl.sum(total * tl.exp(top - base), axis=0)))


@triton.jit
def column_mass(
    y_ptr, y_rows, y_step, patch_columns, patch_values, totals, mass, count, size, beta,
    PATCHES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """mass [n / ROWS, size]: the sum of the probabilities of ROWS rows."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, group = column < size, tl.program_id(1).to(tl.int64)
    found = tl.zeros([BLOCK], tl.float32)
    for step in range(0, ROWS):
        row = group * ROWS + step
        if row < count:
            y = load_row(y_ptr + tl.load(y_rows + row), column, y_step, inside)
            y = with_patches(y, column, patch_columns, patch_values, row, PATCHES) * beta
            found += tl.exp(y - tl.load(totals + row))
    tl.store(mass + group * size + column, found, mask=inside)
