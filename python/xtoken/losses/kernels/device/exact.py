# mypy: ignore-errors
"""Exact KL: the softmax summed over groups of tokens, and the gradient in one write.

With l(g) the log of the sum of exp of a group's logits, L that of all that is compared, q the
target and A its sum over the position,

    loss = sum q (log q - (l - L)),    grad(k) = A exp(z(k) - L) - q exp(z(k) - l(g of k)),

all after a largest term, so that no mass underflows. With weights by depth (DEEP), c of the groups
and u of the unions of deeper groups as in `exact_kl/block.py`, l of a union as of a group,

    loss = sum c q (log q - (l - L)) + sum u A (log A - (l - L)),
    grad(k) = (sum of all c q and u A) exp(z(k) - L) - c q exp(z(k) - l(g of k))
              - sum u A exp(z(k) - l) over the unions that k is in.

`opened` is 1 where the tokens of no group are not compared, and 2 where their q is the student's
own share, at most the given one, and the groups have their shares of the rest. Which tokens are in
no group, the tail, is told by a bit for each token of a position: 1/16 of a row in bfloat16.
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
)


@triton.jit
def mark(tokens, token_group, group_row, bits, first, last, begin, WORDS, BLOCK: tl.constexpr):
    """bits [P, WORDS] int32: 1 for each listed token of a position; a token below 0 is none."""
    at = first + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < last
    token = tl.load(tokens + at, mask=inside, other=0)
    inside = inside & (token >= 0)
    group = tl.load(token_group + at, mask=inside, other=0)
    row = tl.load(group_row + group, mask=inside, other=begin) - begin
    bit = tl.full([BLOCK], 1, tl.int32) << (token & 31).to(tl.int32)
    # Of integers, which give the same in any order.
    tl.atomic_or(bits + row * WORDS + (token >> 5), bit, mask=inside)


@triton.jit
def group_logs(
    z_ptr, z_rows, z_step, tokens, token_ptr, group_row, logs, first, last, begin,
    beta, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """logs [G] log of the sum of exp of each group's logits; -inf for none."""
    group = first + tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    inside = group < last
    start = tl.load(token_ptr + group, mask=inside, other=0)
    stop = tl.load(token_ptr + group + 1, mask=inside, other=0)
    row = tl.load(group_row + group, mask=inside, other=begin) - begin
    base = tl.load(z_rows + row, mask=inside, other=0)
    top = tl.full([GROUPS], float("-inf"), tl.float32)
    total = tl.full([GROUPS], 0.0, tl.float32)
    longest = tl.max(stop - start, axis=0).to(tl.int32)
    for step in range(0, longest, WIDTH):
        at = start[:, None] + step + tl.arange(0, WIDTH)[None, :]
        real = at < stop[:, None]
        token = tl.load(tokens + at, mask=real, other=-1)
        real = real & (token >= 0)
        z = tl.load(z_ptr + base[:, None] + token * z_step, mask=real, other=float("-inf"))
        z = z.to(tl.float32) * beta
        new = tl.maximum(top, tl.max(z, axis=1))
        shift = finite_top(new)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift[:, None]), axis=1)
        top = new
    found = tl.where(total == 0, float("-inf"), finite_top(top) + tl.log(total))
    tl.store(logs + group, found, mask=inside)


@triton.jit
def tail_parts(
    z_ptr, z_rows, z_step, bits, opened, parts, size, WORDS, begin, beta,
    PARTS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts [P, PARTS, 2]: largest logit and sum of exp over the tokens of no group."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    if tl.load(opened + begin + row) != 1:
        z_row = z_ptr + tl.load(z_rows + row)
        for first in range(0, SPAN, BLOCK):
            column = part * SPAN + first + tl.arange(0, BLOCK)
            inside = column < size
            z = load_row(z_row, column, z_step, inside) * beta
            z = tl.where(is_set(bits + row * WORDS, column, inside), float("-inf"), z)
            top, total = add_terms(top, total, z)
    at = parts + (row * PARTS + part) * 2
    tl.store(at, top)
    tl.store(at + 1, total)


@triton.jit
def positions(
    logs, probs, depths, tails, opened, group_ptr, parts, weights, union_ptr, levels, tail_weights,
    masses, union_weights, unions, out, begin, factor, DEEP: tl.constexpr, PARTS: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [P, 8]: L, l of the tail, loss, its part below depth 0, A, the tail's q as it is pulled,
    by how much the groups' q are to be multiplied, and the tail's q; `factor` weighs all of q. With
    DEEP A is the sum of all that pulls, and unions [D, 2]: l of each, and u A."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PADDED)
    at = parts + (row * PARTS + part) * 2
    tops = tl.load(at, mask=part < PARTS, other=float("-inf"))
    sums = tl.load(at + 1, mask=part < PARTS, other=0.0)
    base = finite_top(tl.max(tops, axis=0))
    outside = tl.sum(sums * tl.exp(tops - base), axis=0)
    tail = tl.where(outside == 0, float("-inf"), base + tl.log(outside))
    top, total = tail, tl.where(outside == 0, 0.0, 1.0)
    total = tl.where(outside == outside, total, outside)
    start = tl.load(group_ptr + begin + row)
    count = (tl.load(group_ptr + begin + row + 1) - start).to(tl.int32)
    for first in range(0, count, BLOCK):
        group = first + tl.arange(0, BLOCK)
        log = tl.load(logs + start + group, mask=group < count, other=float("-inf"))
        top, total = add_terms(top, total, log)
    whole = finite_top(top) + tl.log(total)
    q_tail = tl.load(tails + begin + row).to(tl.float32)
    at_most = tl.load(opened + begin + row) == 2
    q_tail = tl.where(at_most, tl.minimum(q_tail, tl.exp(tail - whole)), q_tail)
    rest = tl.where(at_most, 1.0 - q_tail, 1.0)
    log_q = tl.log(tl.where(q_tail > 0, q_tail, 1.0))
    loss = tl.where(q_tail > 0, q_tail * (log_q - (tail - whole)), 0.0)
    pulled, deeper = q_tail, tl.full((), 0.0, tl.float32)
    if DEEP:
        tail_weight = tl.load(tail_weights + begin + row).to(tl.float32)
        loss, pulled = loss * tail_weight, pulled * tail_weight
    mass = pulled
    for first in range(0, count, BLOCK):
        group = first + tl.arange(0, BLOCK)
        inside = group < count
        log = tl.load(logs + start + group, mask=inside, other=0.0)
        q = tl.load(probs + start + group, mask=inside, other=0.0).to(tl.float32) * rest
        depth = tl.load(depths + start + group, mask=inside, other=0)
        some = tl.where(q > 0, q, 1.0)
        terms = tl.where(q > 0, q * (tl.log(some) - (log - whole)), 0.0)
        deeper += tl.sum(tl.where(depth > 0, terms, 0.0), axis=0)
        if DEEP:
            weight = tl.load(weights + start + group, mask=inside, other=0.0).to(tl.float32)
            terms, q = terms * weight, q * weight
        loss += tl.sum(terms, axis=0)
        mass += tl.sum(q, axis=0)
    if DEEP:
        union = tl.load(union_ptr + begin + row)
        number = (tl.load(union_ptr + begin + row + 1) - union).to(tl.int32)
        for at in range(0, number):
            level = tl.load(levels + union + at)
            top, total = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
            for first in range(0, count, BLOCK):
                group = first + tl.arange(0, BLOCK)
                depth = tl.load(depths + start + group, mask=group < count, other=0)
                inside = (group < count) & (depth >= level)
                log = tl.load(logs + start + group, mask=inside, other=float("-inf"))
                top, total = add_terms(top, total, log)
            union_log = finite_top(top) + tl.log(total)
            union_q = tl.load(masses + union + at).to(tl.float32) * rest
            log_q = tl.log(tl.where(union_q > 0, union_q, 1.0))
            pull = tl.load(union_weights + union + at).to(tl.float32) * union_q
            loss += tl.where(union_q > 0, pull * (log_q - (union_log - whole)), 0.0)
            mass += pull
            tl.store(unions + (union + at) * 2, union_log)
            tl.store(unions + (union + at) * 2 + 1, pull)
    tl.store(out + row * 8, whole)
    tl.store(out + row * 8 + 1, tail)
    # A logit that is no number is told even where nothing is said of it.
    told = tl.where(whole == float("-inf"), 0.0, whole - whole)
    tl.store(out + row * 8 + 2, loss * factor + told)
    tl.store(out + row * 8 + 3, deeper)
    tl.store(out + row * 8 + 4, mass * factor)
    tl.store(out + row * 8 + 5, pulled * factor)
    tl.store(out + row * 8 + 6, rest * factor)
    tl.store(out + row * 8 + 7, q_tail)


@triton.jit
def tail_gradient(
    z_ptr, z_rows, z_step, bits, opened, stats, seed, ce_targets, ce_logs, ce_factor, grad_ptr,
    grad_rows, checks, size, width, WORDS, begin, beta, JOINS: tl.constexpr, ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the tokens of no group, 0 where they are not compared; 0 past `size`. JOINS
    adds a cross-entropy's, there and in the groups."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside, held = column < size, column < width
    raw = load_row(z_ptr + tl.load(z_rows + row), column, z_step, inside)
    z = raw * beta
    is_listed = is_set(bits + row * WORDS, column, inside)
    whole, tail = tl.load(stats + row * 8), tl.load(stats + row * 8 + 1)
    mass, q = tl.load(stats + row * 8 + 4), tl.load(stats + row * 8 + 5)
    pull = tl.where(q > 0, q * tl.exp(z - finite_top(tail)), 0.0)
    grad = (mass * tl.exp(z - whole) - pull) * tl.load(seed + row)
    counted = inside & ~is_listed & (tl.load(opened + begin + row) != 1)
    grad = tl.where(counted, grad, 0.0)
    tl.store(
        checks + row * tl.num_programs(1) + block, tl.sum(grad, axis=0) + not_a_number(z, inside)
    )
    at, mine = grad_ptr + tl.load(grad_rows + row) + column, held & ~is_listed
    if JOINS:
        slope = cross_entropy_slope(raw, column, ce_targets, ce_logs, ce_factor, row)
        grad += tl.where(inside, slope, 0.0)
    if ADDS:
        grad += tl.load(at, mask=mine, other=0.0).to(tl.float32)
    tl.store(at, grad.to(grad_ptr.dtype.element_ty), mask=mine)


@triton.jit
def group_gradient(
    z_ptr, z_rows, z_step, tokens, token_group, group_row, logs, probs, depths, weights, union_ptr,
    levels, unions, stats, seed, ce_targets, ce_logs, ce_factor, grad_ptr, grad_rows, checks, first,
    last, begin, beta, DEEP: tl.constexpr, JOINS: tl.constexpr, ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the tokens of groups, each written once."""
    at = first + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < last
    token = tl.load(tokens + at, mask=inside, other=0)
    inside = inside & (token >= 0)
    group = tl.load(token_group + at, mask=inside, other=0)
    row = tl.load(group_row + group, mask=inside, other=begin) - begin
    base = tl.load(z_rows + row, mask=inside, other=0)
    raw = tl.load(z_ptr + base + token * z_step, mask=inside, other=0.0).to(tl.float32)
    z = raw * beta
    log = tl.load(logs + group, mask=inside, other=0.0)
    q = tl.load(probs + group, mask=inside, other=0.0).to(tl.float32)
    q *= tl.load(stats + row * 8 + 6, mask=inside, other=0.0)
    whole = tl.load(stats + row * 8, mask=inside, other=0.0)
    mass = tl.load(stats + row * 8 + 4, mask=inside, other=0.0)
    if DEEP:
        q *= tl.load(weights + group, mask=inside, other=0.0).to(tl.float32)
    pull = tl.where(q > 0, q * tl.exp(z - finite_top(log)), 0.0)
    if DEEP:
        depth = tl.load(depths + group, mask=inside, other=0)
        start = tl.load(union_ptr + begin + row, mask=inside, other=0)
        stop = tl.load(union_ptr + begin + row + 1, mask=inside, other=0)
        most = tl.max(stop - start, axis=0).to(tl.int32)
        for step in range(0, most):
            union = start + step
            real = union < stop
            real = real & (tl.load(levels + union, mask=real, other=0) <= depth)
            log = tl.load(unions + union * 2, mask=real, other=0.0)
            part = tl.load(unions + union * 2 + 1, mask=real, other=0.0)
            pull += tl.where(real, part * tl.exp(z - finite_top(log)), 0.0)
    grad = (mass * tl.exp(z - whole) - pull) * tl.load(seed + row, mask=inside, other=0.0)
    grad = tl.where(inside, grad, 0.0)
    tl.store(checks + tl.program_id(0), tl.sum(grad, axis=0))
    to = grad_ptr + tl.load(grad_rows + row, mask=inside, other=0) + token
    if JOINS:
        slope = cross_entropy_slope(raw, token, ce_targets, ce_logs, ce_factor, row)
        grad += tl.where(inside, slope, 0.0)
    if ADDS:
        grad += tl.load(to, mask=inside, other=0.0).to(tl.float32)
    tl.store(to, grad.to(grad_ptr.dtype.element_ty), mask=inside)
