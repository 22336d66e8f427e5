"""P-KL's forward KL of a block with its gradient in closed form: the function a kernel replaces.

With p the softmax of a row, s = W^T p on the kept columns and q the teacher renormalized there,

    loss = sum_k q_k (log q_k - log s_k) + log sum_k s_k
    g_k = d loss / d s_k = 1 / sum_k s_k - q_k / s_k,        d loss / d logits = p * (W g),

for the softmax's own term, sum_k s_k g_k, is 0: the loss does not see a factor on p. A tail is one
more k, whose s is a sum of what lies elsewhere and never 1 minus the rest, which would lose a small
tail's digits. Everything is held transposed, [n, R], which is how a sparse product reads and writes
it, so that a row is turned once on its way in and once out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xtoken.tensors.sparse_ops import SparseMap, bag_sums, bag_tops, bag_totals


@dataclass(frozen=True, eq=False)
class Tail:
    """The column that stands for all that is not kept.

    Attributes:
        log_teacher: [R] the teacher's log-probability of it, in the scale of the kept ones'.
        mass: [R] the student's mass that lies on no output, in the scale of the table.
        outside: [n_in] the share of each input that lies on no output.
    """

    log_teacher: Tensor
    mass: Tensor
    outside: Tensor


@dataclass(frozen=True, eq=False)
class ForwardKL:
    """What `forward_kl` finds in a block.

    Attributes:
        loss: [R] nats.
        log_mass: [R] log of the sum of exp(log_teacher), the tail's included.
        best: [R] int64, the kept column of the student's largest mass; None if not wanted.
        grad: [n_in, R] d(sum of seed * loss) / d logits; None if not wanted.
        grad_values: [nnz] the same for W's non-zeros, or None.
        tail_slope: [R] the same for the student's mass in the tail; None without one.
    """

    loss: Tensor
    log_mass: Tensor
    best: Tensor | None
    grad: Tensor | None
    grad_values: Tensor | None
    tail_slope: Tensor | None


@torch.no_grad()
def forward_kl(
    table: Tensor,
    log_teacher: Tensor,
    places: Tensor | None,
    values: Tensor,
    values_by_input: Tensor,
    sparse: SparseMap,
    seed: Tensor,
    *,
    tail: Tail | None,
    want_values: bool,
    want_best: bool,
    want_grad: bool = True,
) -> ForwardKL | None:
    """
    Args:
        table: [n_in, R] the student's probabilities, at the loss's temperature; up to a factor a
            row.
        log_teacher: [R, K] log-probabilities at the kept columns, up to a factor per row; -inf is
            no mass.
        places: [R, K] int64, the outputs of `sparse` that are kept, n_out where there is none;
            None keeps all, in order.
        values, values_by_input: [nnz] non-zeros of W in the two orders of `sparse`.
        seed: [R] what the gradient of each row is multiplied with.
        tail: None for no tail.
        want_values: whether to return `grad_values`.
        want_best: whether to return `best`.
        want_grad: whether to return `grad`, and what belongs to it.

    Returns: None where a plain sum of exponentials does not do: a column underflows, or a row has
        no mass. The caller then takes the path through log space.
    """
    sums = bag_sums(table, sparse.inputs, sparse.output_ptr, values)  # [n_out, R]
    kept = sums
    if places is not None:
        # A copy: some releases of torch gather wrongly by a column that was turned into a row.
        places = places.t().clone(memory_format=torch.contiguous_format)
        padded = torch.nn.functional.pad(sums, (0, 0, 0, 1))
        kept = padded.gather(0, places)  # [K, R]
    best = kept.argmax(0) if want_best else None
    whole = kept.sum(0)
    if tail is not None:
        log_teacher = torch.cat([log_teacher, tail.log_teacher[:, None]], 1)
        rest = tail.mass
        if places is not None:
            rest = rest + padded.scatter_(0, places, 0.0).sum(0)
        whole = whole + rest
    # No mass on either side there: log 1 stands in for log 0.
    kept = kept if places is None else kept.masked_fill_(places == len(sums), 1.0)
    kept = kept if tail is None else torch.cat([kept, rest[None]])
    log_teacher = log_teacher.to(table.dtype)
    teacher = torch.softmax(log_teacher, 1)
    # max / (its probability) is the sum, for less than a second log-sum-exp.
    log_mass = log_teacher.amax(1) - torch.log(teacher.amax(1))
    negative_entropy = _weighted_mean(teacher, log_teacher) - log_mass
    # Below this a sum has lost digits; NaN fails the test too.
    floor = torch.finfo(sums.dtype).tiny * 1e6
    if not bool(kept.amin() >= floor) or not bool(torch.isfinite(negative_entropy).all()):
        return None
    teacher = teacher.t().contiguous()  # [K, R]
    loss = negative_entropy + torch.log(whole) - torch.log(kept).mul_(teacher).sum(0)
    if not want_grad:
        return ForwardKL(loss, log_mass, best, None, None, None)
    slope = teacher.div_(kept).neg_().add_(whole.reciprocal()).mul_(seed)  # [K, R]
    tail_slope = None
    if tail is not None:
        slope, tail_slope = slope[:-1], slope[-1]
    if places is not None:
        # What is not kept is in the tail, or nowhere.
        every = padded.zero_() if tail_slope is None else padded.copy_(tail_slope)
        slope = every.scatter_(0, places, slope)[:-1]
    grad_values = None
    if want_values:
        grad_values = (table[sparse.inputs] * slope[sparse.outputs]).sum(1)
    grad = bag_sums(slope, sparse.outputs_by_input, sparse.input_ptr, values_by_input)
    if tail is not None and tail_slope is not None:
        grad.addr_(tail.outside, tail_slope)
    return ForwardKL(loss, log_mass, best, grad.mul_(table), grad_values, tail_slope)


@dataclass(frozen=True, eq=False)
class LogTail:
    """`Tail` in log space.

    Attributes:
        log_teacher: [R] as `Tail`.
        log_outside: [n] log of the share of each student token that lies on no output.
        logits: [n, R] of the student on all tokens, transposed.
        has: [R] bool, the rows with a tail; None for all.
    """

    log_teacher: Tensor
    log_outside: Tensor
    logits: Tensor
    has: Tensor | None


@dataclass(frozen=True, eq=False)
class LogForwardKL:
    """What `forward_kl_in_log_space` finds: as `ForwardKL`, and [R] of the tail, the gradient by
    the log of the student's mass there and that log."""

    loss: Tensor
    best: Tensor | None
    grad: Tensor
    grad_values: Tensor | None
    tail: tuple[Tensor, Tensor] | None


@torch.no_grad()
def forward_kl_in_log_space(
    logits: Tensor,
    log_teacher: Tensor,
    places: Tensor | None,
    values: Tensor,
    sparse: SparseMap,
    seed: Tensor,
    *,
    tail: LogTail | None,
    want_values: bool,
    want_best: bool,
) -> LogForwardKL:
    """`forward_kl` without a look at any value, for a device: no sum underflows.

    Each output's sum is taken after its own largest term, so that an entry's share in it,

        r = w exp(z) / s,    d loss / d z = sum over an input's entries of r (P - q),

    with P the softmax of log s, is told whatever the size of s.

    Args:
        logits: [n_in, R] the student's, by temperature, up to a term per row.
        log_teacher, places, values, seed, want_values, want_best: as `forward_kl`.
    """
    weights = values.to(logits.dtype)
    none = weights <= 0
    log_weights = torch.log(weights.masked_fill(none, 1.0)).masked_fill(none, -torch.inf)
    terms = logits.index_select(0, sparse.inputs).add_(log_weights[:, None])  # [nnz, R]
    top = bag_tops(terms, sparse.output_ptr)
    shift = torch.where(torch.isneginf(top), 0.0, top)
    shares = terms.sub_(shift.index_select(0, sparse.outputs)).exp_()
    sums = bag_totals(shares, sparse.output_ptr)  # [n_out, R]
    log_sums = torch.log(sums) + shift
    shares.mul_(torch.where(sums > 0, sums.reciprocal(), 0.0).index_select(0, sparse.outputs))
    kept = log_sums
    if places is not None:
        places = places.t().contiguous()
        padded = torch.nn.functional.pad(log_sums, (0, 0, 0, 1), value=-torch.inf)
        kept = padded.gather(0, places)  # [K, R]
    best = kept.argmax(0) if want_best else None
    log_teacher = log_teacher.to(logits.dtype).t()
    log_tail = None
    if tail is not None:
        log_tail = torch.logsumexp(tail.logits + tail.log_outside[:, None], 0)
        if places is not None:
            others = padded.scatter(0, places, -torch.inf)[:-1]
            log_tail = torch.logaddexp(log_tail, torch.logsumexp(others, 0))
        log_rest = tail.log_teacher.to(logits.dtype)
        if tail.has is not None:
            log_tail = log_tail.masked_fill(~tail.has, -torch.inf)
            log_rest = log_rest.masked_fill(~tail.has, -torch.inf)
        kept = torch.cat([kept, log_tail[None]])
        log_teacher = torch.cat([log_teacher, log_rest[None]])
    # A row whose teacher has no mass anywhere says nothing.
    silent = torch.isneginf(log_teacher).all(0)
    log_student = _log_softmax(kept.masked_fill(silent, 0.0))
    log_teacher = _log_softmax(log_teacher.masked_fill(silent, 0.0))
    teacher = torch.exp(log_teacher)
    loss = torch.where(torch.isneginf(log_teacher), 0.0, teacher * (log_teacher - log_student))
    slope = torch.where(silent, 0.0, (torch.exp(log_student) - teacher) * seed)
    tail_slope = None
    if tail is not None:
        slope, tail_slope = slope[:-1], slope[-1]
    if places is not None:
        every = torch.zeros_like(padded)
        if tail_slope is not None and log_tail is not None:
            every = torch.where(torch.isneginf(padded), 0.0, torch.exp(padded - log_tail))
            every = torch.where(torch.isneginf(log_tail), 0.0, every * tail_slope)
        slope = every.scatter(0, places, slope)[:-1]
    by_entry = shares.mul_(slope.index_select(0, sparse.outputs))
    grad_values = None
    if want_values:
        grad_values = torch.where(none, 0.0, by_entry.sum(1) / weights)
    grad = bag_totals(by_entry.index_select(0, sparse.transposed), sparse.input_ptr)
    found = None
    if tail_slope is not None and log_tail is not None:
        found = (torch.where(torch.isneginf(log_tail), 0.0, tail_slope), log_tail)
    return LogForwardKL(loss.sum(0), best, grad, grad_values, found)


def _weighted_mean(probs: Tensor, values: Tensor) -> Tensor:
    """[R] sum of probs * values, 0 where a value is -inf and its probability 0."""
    product = probs * values
    sums = product.sum(1)
    return sums if bool(torch.isfinite(sums).all()) else product.nansum(1)


def _log_softmax(columns: Tensor) -> Tensor:
    """Of each column of [K, R]; torch's own goes down a column with one thread of a device."""
    return columns - torch.logsumexp(columns, 0, keepdim=True)
