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

from xtoken.tensors.sparse_ops import SparseMap, bag_sums


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
        best: [R] int64, the kept column of the student's largest mass.
        grad: [n_in, R] d(sum of seed * loss) / d logits.
        grad_values: [nnz] the same for W's non-zeros, or None.
        tail_slope: [R] the same for the student's mass in the tail; None without one.
    """

    loss: Tensor
    log_mass: Tensor
    best: Tensor
    grad: Tensor
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
    best = kept.argmax(0)
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


def _weighted_mean(probs: Tensor, values: Tensor) -> Tensor:
    """[R] sum of probs * values, 0 where a value is -inf and its probability 0."""
    product = probs * values
    sums = product.sum(1)
    return sums if bool(torch.isfinite(sums).all()) else product.nansum(1)
