# mypy: ignore-errors
"""P-KL: the student's row gathered into the teacher's columns, and the gradient gathered back.

With s(t) = sum over the tokens of column t of w exp(z), everything in log space,

    loss = sum q (log q - log s) + log S,    S = sum s,    both over the kept columns,
    grad(k) = sum over k's kept columns t of w (exp(z(k)) / S - q(t) exp(z(k)) / s(t)),

so that the student's own softmax is never needed. A tail is one more column. Nearly all columns
have one token (a code >= 0, see `w_map`), for which w exp(z) / s is 1; those of more have their
log s in `logs` and log q - log s in `apart`, where +inf says that they are not kept. A program's
first axis is the part of a row, so that the parts of a row share what the cache holds of it.
"""

import triton
import triton.language as tl

from xtoken.losses.kernels.device.common import (
    add_terms,
    cross_entropy_slope,
    finite_top,
    is_set,
    load_row,
    not_a_number,
    with_patches,
)


@triton.jit
def shared_columns(
    z_ptr, z_rows, z_step, y_ptr, y_rows, y_step, patch_columns, patch_values, columns, ptr, source,
    log_w, bits, bits_step, logs, apart, first, last, count, beta, ALL: tl.constexpr,
    LISTED: tl.constexpr, PATCHES: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """logs [n, count]: log s of the columns [first, last) of several tokens; apart [n, count]: log
    q - log s of those kept, up to a term per row, +inf of the others, and of all where q is
    LISTED elsewhere."""
    row = tl.program_id(1).to(tl.int64)
    z_row = z_ptr + tl.load(z_rows + row)
    place = first + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = place < last
    start = tl.load(ptr + place, mask=inside, other=0)
    stop = tl.load(ptr + place + 1, mask=inside, other=0)
    top = tl.full([COLUMNS], float("-inf"), tl.float32)
    total = tl.full([COLUMNS], 0.0, tl.float32)
    longest = tl.max(stop - start, axis=0)
    for step in range(0, longest, WIDTH):
        at = start[:, None] + step + tl.arange(0, WIDTH)[None, :]
        real = at < stop[:, None]
        token = tl.load(source + at, mask=real, other=0).to(tl.int64)
        z = tl.load(z_row + token * z_step, mask=real, other=float("-inf")).to(tl.float32)
        terms = z * beta + tl.load(log_w + at, mask=real, other=0.0)
        new = tl.maximum(top, tl.max(terms, axis=1))
        shift = finite_top(new)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(terms - shift[:, None]), axis=1)
        top = new
    found = tl.where(total == 0, float("-inf"), finite_top(top) + tl.log(total))
    tl.store(logs + row * count + place, found, mask=inside)
    far = tl.full([COLUMNS], float("inf"), tl.float32)
    if not LISTED:
        column = tl.load(columns + place, mask=inside, other=0)
        kept = inside
        if not ALL:
            kept = is_set(bits + row * bits_step, column, inside)
        y = load_row(y_ptr + tl.load(y_rows + row), column, y_step, kept)
        y = with_patches(y, column, patch_columns, patch_values, row, PATCHES) * beta
        far = tl.where(kept, y - found, far)
    tl.store(apart + row * count + place, far, mask=inside)


@triton.jit
def log_s(z_row, z_step, logs_row, code, log_w, column, kept, beta):
    """log s of kept columns; -inf for the others."""
    which = tl.load(code + column, mask=kept, other=-1)
    one, several = which >= 0, which < -1
    token = tl.where(one, which, 0).to(tl.int64)
    z = tl.load(z_row + token * z_step, mask=one, other=float("-inf")).to(tl.float32)
    alone = z * beta + tl.load(log_w + column, mask=one, other=0.0)
    return tl.where(
        several, tl.load(logs_row - 2 - which, mask=several, other=float("-inf")), alone
    )


@triton.jit
def compare(s_top, s_sum, y_top, y_sum, cross, s, y):
    """Running sums of exp of s and of y, and of exp(y - m) ((y - m) - (s - M)), with a block's."""
    s_old, y_old = finite_top(s_top), finite_top(y_top)
    s_base = finite_top(tl.maximum(s_top, tl.max(s, axis=0)))
    y_base = finite_top(tl.maximum(y_top, tl.max(y, axis=0)))
    moved = cross + y_sum * ((s_base - s_old) - (y_base - y_old))
    moved = tl.where(y_sum > 0, moved * tl.exp(y_old - y_base), 0.0)
    share = tl.exp(y - y_base)
    terms = tl.where(share > 0, share * ((y - y_base) - (s - s_base)), 0.0)
    s_top, s_sum = add_terms(s_top, s_sum, s)
    y_top, y_sum = add_terms(y_top, y_sum, y)
    return s_top, s_sum, y_top, y_sum, moved + tl.sum(terms, axis=0)


@triton.jit
def store_part(at, s_top, s_sum, y_top, y_sum, cross, a_top, a_sum, o_top, o_sum, count):
    tl.store(at, s_top)
    tl.store(at + 1, s_sum)
    tl.store(at + 2, y_top)
    tl.store(at + 3, y_sum)
    tl.store(at + 4, cross)
    tl.store(at + 5, a_top)
    tl.store(at + 6, a_sum)
    tl.store(at + 7, o_top)
    tl.store(at + 8, o_sum)
    tl.store(at + 9, count)


@triton.jit
def columns_of_logits(
    z_ptr, z_rows, z_step, y_ptr, y_rows, y_step, patch_columns, patch_values, code, log_w, logs,
    several, bits, bits_step, parts, size, beta, ALL: tl.constexpr, TAIL: tl.constexpr,
    FEW: tl.constexpr, PATCHES: tl.constexpr, PARTS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """parts [n, PARTS, 10] over the teacher's logits: s, y on the kept columns and the sum of their
    differences; y on all; y on those not kept; the number kept. FEW reads the kept columns alone,
    so that y on all is none."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    z_row, y_row = z_ptr + tl.load(z_rows + row), y_ptr + tl.load(y_rows + row)
    none, zero = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
    s_top, s_sum, y_top, y_sum, cross = none, zero, none, zero, zero
    a_top, a_sum, o_top, o_sum, count = none, zero, none, zero, zero
    for first in range(0, SPAN, BLOCK):
        column = part * SPAN + first + tl.arange(0, BLOCK)
        inside = column < size
        if ALL:
            kept = inside & (tl.load(code + column, mask=inside, other=-1) != -1)
        else:
            kept = inside & is_set(bits + row * bits_step, column, inside)
        if FEW:
            every = load_row(y_row, column, y_step, kept)
        else:
            every = load_row(y_row, column, y_step, inside)
        every = with_patches(every, column, patch_columns, patch_values, row, PATCHES) * beta
        s = log_s(z_row, z_step, logs + row * several, code, log_w, column, kept, beta)
        y = tl.where(kept, every, float("-inf"))
        s_top, s_sum, y_top, y_sum, cross = compare(s_top, s_sum, y_top, y_sum, cross, s, y)
        a_top, a_sum = add_terms(a_top, a_sum, every)
        if TAIL:
            o_top, o_sum = add_terms(o_top, o_sum, tl.where(kept, float("-inf"), every))
        count += tl.sum(kept.to(tl.float32), axis=0)
    store_part(
        parts + (row * PARTS + part) * 10,
        s_top, s_sum, y_top, y_sum, cross, a_top, a_sum, o_top, o_sum, count,
    )  # fmt: skip


@triton.jit
def columns_of_list(
    z_ptr, z_rows, z_step, ids, values, length, code, log_w, logs, several, apart, listed, parts,
    size, beta, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same over listed columns, ids and values [n, length]; -inf for what is none. `listed`
    [n, size] is log q up to a term per row, at those of one token alone."""
    row = tl.program_id(1).to(tl.int64)
    z_row = z_ptr + tl.load(z_rows + row)
    none, zero = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
    s_top, s_sum, y_top, y_sum, cross, count = none, zero, none, zero, zero, zero
    for first in range(0, length, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < length
        y = tl.load(values + row * length + place, mask=inside, other=float("-inf"))
        kept = inside & (y != float("-inf"))
        column = tl.load(ids + row * length + place, mask=kept, other=0)
        s = log_s(z_row, z_step, logs + row * several, code, log_w, column, kept, beta)
        s_top, s_sum, y_top, y_sum, cross = compare(s_top, s_sum, y_top, y_sum, cross, s, y)
        which = tl.load(code + column, mask=kept, other=-1)
        tl.store(listed + row * size + column, y, mask=which >= 0)
        tl.store(apart + row * several - 2 - which, y - s, mask=which < -1)
        count += tl.sum(kept.to(tl.float32), axis=0)
    store_part(parts + row * 10, s_top, s_sum, y_top, y_sum, cross, none, zero, none, zero, count)


@triton.jit
def mark(ids, values, length, bits, WORDS, BLOCK: tl.constexpr):
    """bits [n, WORDS] int32: 1 for each listed column."""
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < length
    y = tl.load(values + row * length + place, mask=inside, other=float("-inf"))
    kept = inside & (y != float("-inf"))
    column = tl.load(ids + row * length + place, mask=kept, other=0)
    bit = tl.full([BLOCK], 1, tl.int32) << (column & 31).to(tl.int32)
    # Of integers, which give the same in any order.
    tl.atomic_or(bits + row * WORDS + (column >> 5), bit, mask=kept)


@triton.jit
def kept_columns(code, bits_row, apart_row, ALL: tl.constexpr):
    """Of codes: which are kept, which of those have one token, `apart` of the others."""
    one = code >= 0
    if not ALL:
        one = is_set(bits_row, code, one)
    far = tl.load(apart_row - 2 - code, mask=code < -1, other=float("inf"))
    return one | (far < float("inf")), one, far


@triton.jit
def student_sums(
    z_ptr, z_rows, z_step, first, first_weight, more_ptr, more, more_weights, apart, several, bits,
    bits_step, parts, size, beta, ALL: tl.constexpr, PARTS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """parts [n, PARTS, 6]: of the student's tail, of its empty rows of W, of all its tokens."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    z_row = z_ptr + tl.load(z_rows + row)
    none, zero = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
    t_top, t_sum, e_top, e_sum, a_top, a_sum = none, zero, none, zero, none, zero
    bits_row, apart_row = bits + row * bits_step, apart + row * several
    for begin in range(0, SPAN, BLOCK):
        token = part * SPAN + begin + tl.arange(0, BLOCK)
        inside = token < size
        z = load_row(z_row, token, z_step, inside) * beta
        which = tl.load(first + token, mask=inside, other=-1)
        empty = inside & (which == -1)
        share = empty.to(tl.float32)
        if not ALL:
            weight = tl.load(first_weight + token, mask=inside, other=0.0)
            kept, _, _ = kept_columns(which, bits_row, apart_row, ALL)
            share += tl.where(kept, 0.0, weight)
            start = tl.load(more_ptr + token, mask=inside, other=0)
            stop = tl.load(more_ptr + token + 1, mask=inside, other=0)
            longest = tl.max(stop - start, axis=0)
            for step in range(0, longest):
                real = start + step < stop
                which = tl.load(more + start + step, mask=real, other=-1)
                weight = tl.load(more_weights + start + step, mask=real, other=0.0)
                kept, _, _ = kept_columns(which, bits_row, apart_row, ALL)
                share += tl.where(kept, 0.0, weight)
        log_share = tl.log(tl.where(share > 0, share, 1.0))
        t_top, t_sum = add_terms(t_top, t_sum, tl.where(share > 0, z + log_share, float("-inf")))
        e_top, e_sum = add_terms(e_top, e_sum, tl.where(empty, z, float("-inf")))
        a_top, a_sum = add_terms(a_top, a_sum, z)
    at = parts + (row * PARTS + part) * 6
    tl.store(at, t_top)
    tl.store(at + 1, t_sum)
    tl.store(at + 2, e_top)
    tl.store(at + 3, e_sum)
    tl.store(at + 4, a_top)
    tl.store(at + 5, a_sum)


@triton.jit
def log_of_parts(at, inside):
    """Log of the sum of parts (largest term, sum of exp after it)."""
    top = tl.load(at, mask=inside, other=float("-inf"))
    total = tl.load(at + 1, mask=inside, other=0.0)
    base = finite_top(tl.max(top, axis=0))
    total = tl.sum(total * tl.exp(top - base), axis=0)
    return tl.where(total == 0, float("-inf"), base + tl.log(total))


@triton.jit
def together(
    parts, tails, teacher_tail, totals, out, most, PARTS: tl.constexpr, PADDED: tl.constexpr,
    TAILS: tl.constexpr, TAILS_PADDED: tl.constexpr, TAIL: tl.constexpr, LISTED: tl.constexpr,
    FEW: tl.constexpr,
):  # fmt: skip
    """out [n, 7]: log S, log of the sum of q, the KL, the log of the teacher's mass on the kept
    columns (up to its log of all where that is not read), log q - log s of the tail, the student's
    mass on empty rows of W, 1 where there is a tail: not where `most` columns or more are kept."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PADDED)
    inside, at = part < PARTS, parts + (row * PARTS + part) * 10
    s_top = tl.load(at, mask=inside, other=float("-inf"))
    s_sum = tl.load(at + 1, mask=inside, other=0.0)
    y_top = tl.load(at + 2, mask=inside, other=float("-inf"))
    y_sum = tl.load(at + 3, mask=inside, other=0.0)
    cross = tl.load(at + 4, mask=inside, other=0.0)
    count = tl.sum(tl.load(at + 9, mask=inside, other=0.0), axis=0)
    log_kept = log_of_parts(at + 2, inside)
    log_all = log_kept * 0.0
    if FEW:
        log_all = tl.load(totals + row)
    elif not LISTED:
        log_all = log_of_parts(at + 5, inside)
    tail_s, tail_y = tl.full((), float("-inf"), tl.float32), tl.full((), float("-inf"), tl.float32)
    empty, has = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    if TAILS > 0:
        place = tl.arange(0, TAILS_PADDED)
        beside, from_ = place < TAILS, tails + (row * TAILS + place) * 6
        empty = tl.exp(log_of_parts(from_ + 2, beside) - log_of_parts(from_ + 4, beside))
        if TAIL:
            has = tl.where(count < most, 1.0, 0.0)
            if count < most:
                tail_s = log_of_parts(from_, beside)
                if LISTED:
                    tail_y = tl.load(teacher_tail + row)
                else:
                    tail_y = log_of_parts(at + 7, inside)
    s_base = finite_top(tl.maximum(tl.max(s_top, axis=0), tail_s))
    y_base = finite_top(tl.maximum(tl.max(y_top, axis=0), tail_y))
    s_total = tl.sum(s_sum * tl.exp(s_top - s_base), axis=0) + tl.exp(tail_s - s_base)
    shrink = tl.exp(y_top - y_base)
    y_total = tl.sum(y_sum * shrink, axis=0) + tl.exp(tail_y - y_base)
    moved = (s_base - finite_top(s_top)) - (y_base - finite_top(y_top))
    crossed = tl.sum(tl.where(y_sum == 0, 0.0, (cross + y_sum * moved) * shrink), axis=0)
    share = tl.exp(tail_y - y_base)
    crossed += tl.where(share > 0, share * ((tail_y - y_base) - (tail_s - s_base)), 0.0)
    log_s, log_y = s_base + tl.log(s_total), y_base + tl.log(y_total)
    loss = crossed / y_total - tl.log(y_total) + tl.log(s_total)
    # A row whose teacher has no mass on what is compared says nothing.
    silent = y_total == 0
    loss = tl.where(silent, 0.0, loss)
    if not LISTED:
        loss += log_all - log_all  # NaN or inf anywhere in the teacher's row
    tl.store(out + row * 7, tl.where(silent, float("inf"), log_s))
    tl.store(out + row * 7 + 1, tl.where(silent, float("inf"), log_y))
    tl.store(out + row * 7 + 2, loss)
    tl.store(out + row * 7 + 3, log_kept - log_all)
    pull = tl.where(tail_y == float("-inf"), float("-inf"), tail_y - tail_s)
    tl.store(out + row * 7 + 4, pull)
    tl.store(out + row * 7 + 5, empty)
    tl.store(out + row * 7 + 6, has)


@triton.jit
def pulled(
    which, weight, z, y_row, y_step, patch_columns, patch_values, row, bits_row, apart_row, log_y,
    beta, ALL: tl.constexpr, LISTED: tl.constexpr, PATCHES: tl.constexpr,
):  # fmt: skip
    """How much q pulls tokens by one column of each, of these codes; the weights of kept ones, and
    of others."""
    kept, one, far = kept_columns(which, bits_row, apart_row, ALL)
    y = load_row(y_row, which, y_step, one)
    if not LISTED:
        y = with_patches(y, which, patch_columns, patch_values, row, PATCHES) * beta
    own = tl.exp(tl.where(one, y, z + far) - log_y) * tl.where(one, 1.0, weight)
    own = tl.where(kept & (z != float("-inf")), own, 0.0)
    return own, tl.where(kept, weight, 0.0), tl.where(kept, 0.0, weight)


@triton.jit
def gradient(
    z_ptr, z_rows, z_step, y_ptr, y_rows, y_step, patch_columns, patch_values, first, first_weight,
    more_ptr, more, more_weights, apart, several, bits, bits_step, listed, columns, stats, seed,
    ce_targets, ce_logs, ce_factor, grad_ptr, grad_rows, checks, size, width, beta,
    ALL: tl.constexpr, LISTED: tl.constexpr, TAIL: tl.constexpr, PATCHES: tl.constexpr,
    JOINS: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad [n, width] as the module says, 0 past `size`; checks [n, blocks] sums of it. JOINS adds
    a cross-entropy's."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside, held = token < size, token < width
    raw = load_row(z_ptr + tl.load(z_rows + row), token, z_step, inside)
    z = raw * beta
    log_all_s, log_all_y = tl.load(stats + row * 7), tl.load(stats + row * 7 + 1)
    bits_row, apart_row = bits + row * bits_step, apart + row * several
    if LISTED:
        y_row, y_at = listed + row * columns, 1
    else:
        y_row, y_at = y_ptr + tl.load(y_rows + row), y_step
    which = tl.load(first + token, mask=inside, other=-1)
    weight = tl.load(first_weight + token, mask=inside, other=0.0)
    pull, mine, rest = pulled(
        which, weight, z, y_row, y_at, patch_columns, patch_values, row, bits_row, apart_row,
        log_all_y, beta, ALL, LISTED, PATCHES,
    )  # fmt: skip
    rest += (inside & (which == -1)).to(tl.float32)
    start = tl.load(more_ptr + token, mask=inside, other=0)
    stop = tl.load(more_ptr + token + 1, mask=inside, other=0)
    longest = tl.max(stop - start, axis=0)
    for step in range(0, longest):
        real = start + step < stop
        which = tl.load(more + start + step, mask=real, other=-1)
        weight = tl.load(more_weights + start + step, mask=real, other=0.0)
        own, kept, left = pulled(
            which, weight, z, y_row, y_at, patch_columns, patch_values, row, bits_row, apart_row,
            log_all_y, beta, ALL, LISTED, PATCHES,
        )  # fmt: skip
        pull += own
        mine += kept
        rest += left
    # A token of no kept column may be far above S.
    grad = tl.where(mine > 0, mine * tl.exp(z - log_all_s), 0.0) - pull
    if TAIL:
        far, rest = tl.load(stats + row * 7 + 4), rest * tl.load(stats + row * 7 + 6)
        beyond = tl.exp(z - log_all_s) - tl.exp(z + (far - log_all_y))
        grad += tl.where((z != float("-inf")) & (rest > 0), rest * beyond, 0.0)
    grad = tl.where(inside, grad * tl.load(seed + row), 0.0)
    checked = tl.sum(grad, axis=0) + not_a_number(z, inside)
    tl.store(checks + row * tl.num_programs(0) + block, checked)
    if JOINS:
        slope = cross_entropy_slope(raw, token, ce_targets, ce_logs, ce_factor, row)
        grad += tl.where(inside, slope, 0.0)
    at = grad_ptr + tl.load(grad_rows + row) + token
    if ADDS:
        grad += tl.load(at, mask=held, other=0.0).to(tl.float32)
    tl.store(at, grad.to(grad_ptr.dtype.element_ty), mask=held)
