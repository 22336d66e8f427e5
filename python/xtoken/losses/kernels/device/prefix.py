# mypy: ignore-errors
"""Prefix KL below trie nodes: slots of tokens, renormalized over each item's.

With l(s) the log of the sum of exp of a slot's logits and L that of all slots that are compared,

    loss = sum q log q - sum q l + L,    grad(k) = exp(z(k) - L) - q exp(z(k) - l(slot of k)).

The tokens below a node are one range of the trie's order, and a chunk's deeper nodes are inside its
first one's range: so each token's gradient is summed up over depths and added to memory once.
"""

import triton
import triton.language as tl

from xtoken.losses.kernels.device.common import add_terms, finite_top


@triton.jit
def items(
    logs, piece, probs, valid, slot_first, slot_last, negentropy, counted, slots, losses,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """losses [N]; slots [S, 3]: L, l and q of each slot that is compared, inf, 0 and 0 of others.

    `piece` is -1 for END; slots of which the teacher says nothing, -2, count in END where that is
    compared.
    """
    item = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(slot_first + item), tl.load(slot_last + item)
    count = (stop - start).to(tl.int32)
    says = tl.load(counted + item).to(tl.int32)
    # END is an item's first slot, if it has one.
    is_end = tl.where(tl.load(piece + start) == -1, tl.load(valid + start), 0)
    has_end = is_end.to(tl.int32) * says
    q_end = tl.where(has_end != 0, tl.load(probs + start).to(tl.float32), 0.0)
    e_top, e_sum = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
    top, total = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
    for first in range(0, count, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        inside = slot < count
        log = tl.load(logs + start + slot, mask=inside, other=float("-inf"))
        what = tl.load(piece + start + slot, mask=inside, other=-2)
        child = inside & (tl.where(what >= 0, says, 0) != 0)
        ends = inside & (tl.where(what < 0, has_end, 0) != 0)
        e_top, e_sum = add_terms(e_top, e_sum, tl.where(ends, log, float("-inf")))
        top, total = add_terms(top, total, tl.where(child | ends, log, float("-inf")))
    log_end = tl.where(e_sum == 0, float("-inf"), finite_top(e_top) + tl.log(e_sum))
    whole = tl.where(total == 0, float("-inf"), finite_top(top) + tl.log(total))
    loss = tl.load(negentropy + item).to(tl.float32) + whole
    loss -= tl.where(q_end > 0, q_end * log_end, 0.0)
    for first in range(0, count, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        inside = slot < count
        log = tl.load(logs + start + slot, mask=inside, other=float("-inf"))
        what = tl.load(piece + start + slot, mask=inside, other=-2)
        child = inside & (tl.where(what >= 0, says, 0) != 0)
        ends = inside & (tl.where(what < 0, has_end, 0) != 0)
        q = tl.where(
            child, tl.load(probs + start + slot, mask=child, other=0.0).to(tl.float32), 0.0
        )
        loss -= tl.sum(tl.where(q > 0, q * log, 0.0), axis=0)
        to = slots + (start + slot) * 3
        tl.store(to, tl.where(child | ends, whole, float("inf")), mask=inside)
        tl.store(to + 1, tl.where(ends, log_end, tl.where(child, log, 0.0)), mask=inside)
        tl.store(to + 2, tl.where(ends, q_end, q), mask=inside)
    tl.store(losses + item, tl.where(says != 0, loss, 0.0))


@triton.jit
def gradient(
    z_ptr, z_rows, z_step, item_ptr, node_start, node_size, token_start, token_slot, tokens, slots,
    seed, grad_ptr, grad_rows, checks, beta, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds to the gradient of each chunk's row what its items say; checks [C] sums of it."""
    chunk = tl.program_id(0).to(tl.int64)
    first, last = tl.load(item_ptr + chunk), tl.load(item_ptr + chunk + 1)
    check = tl.full((), 0.0, tl.float32)
    if first < last:
        widest, base = tl.load(node_size + first).to(tl.int32), tl.load(node_start + first)
        listed = tl.load(token_start + first)
        z_row, grad_row = z_ptr + tl.load(z_rows + chunk), grad_ptr + tl.load(grad_rows + chunk)
        depths = (last - first).to(tl.int32)
        for step in range(0, widest, BLOCK):
            place = step + tl.arange(0, BLOCK)
            inside = place < widest
            token = tl.load(tokens + listed + place, mask=inside, other=0)
            z = tl.load(z_row + token * z_step, mask=inside, other=0.0).to(tl.float32) * beta
            grad = tl.zeros([BLOCK], tl.float32)
            for depth in range(0, depths):
                item = first + depth
                within = base + place - tl.load(node_start + item)
                below = inside & (within >= 0) & (within < tl.load(node_size + item))
                slot = tl.load(
                    token_slot + tl.load(token_start + item) + within, mask=below, other=0
                )
                whole = tl.load(slots + slot * 3, mask=below, other=float("inf"))
                log = tl.load(slots + slot * 3 + 1, mask=below, other=0.0)
                q = tl.load(slots + slot * 3 + 2, mask=below, other=0.0)
                pull = tl.where(q > 0, q * tl.exp(z - finite_top(log)), 0.0)
                grad += (tl.exp(z - whole) - pull) * tl.load(seed + item)
            grad = tl.where(inside, grad, 0.0)
            check += tl.sum(grad, axis=0)
            grad += tl.load(grad_row + token, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_row + token, grad.to(grad_ptr.dtype.element_ty), mask=inside)
    tl.store(checks + chunk, check)
