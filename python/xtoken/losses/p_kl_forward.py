"""P-KL's forward KL of a block with its gradient in closed form: the function a kernel replaces.

With p the softmax of a row, s = W^T p on the kept columns and q the teacher renormalized there,

    loss = sum_k q_k (log q_k - log s_k) + log sum_k s_k
    g_k = d loss / d s_k = 1 / sum_k s_k - q_k / s_k,        d loss / d logits = p * (W g),

for the softmax's own term, sum_k s_k g_k, is 0: the loss does not see a factor on p. Everything is
held transposed, [n, R], which is how a sparse product reads and writes it, so that a row is turned
once on its way in and once out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..sparse_map import SparseMap, bag_sums


@dataclass(frozen=True, eq=False)
class ForwardKL:
    """What `forward_kl` finds in a block; `grad` is in the rows' own layout.

    Attributes:
        loss: [R] nats.
        log_mass: [R] log of the sum of exp(log_teacher).
        best: [R] int64, the kept column of the student's largest mass.
        unread: [R] the student's mass on `unread_rows`.
        grad: [R, n_in] d(sum of seed * loss) / d logits.
        grad_values: [nnz] the same for W's non-zeros, or None.
    """

    loss: Tensor
    log_mass: Tensor
    best: Tensor
    unread: Tensor
    grad: Tensor
    grad_values: Tensor | None


@torch.no_grad()
def forward_kl(
    logits: Tensor,
    log_teacher: Tensor,
    places: Tensor | None,
    values: Tensor,
    sparse: SparseMap,
    seed: Tensor,
    *,
    unread_rows: Tensor,
    want_values: bool,
) -> ForwardKL | None:
    """
    Args:
        logits: [R, n_in] float, at the loss's temperature; left as it is.
        log_teacher: [R, K] log-probabilities at the kept columns, up to a factor a row; -inf is
            no mass.
        places: [R, K] int64, the outputs of `sparse` that are kept, n_out where there is none;
            None keeps all, in order.
        values: [nnz] non-zeros of W in the order of `sparse`.
        seed: [R] what the gradient of each row is multiplied with.
        unread_rows: [n] int64, inputs whose mass is asked for.
        want_values: whether to return `grad_values`.

    Returns: None where a plain sum of exponentials does not do: a column underflows, or a row has
        no mass. The caller then takes the path through log space.
    """
    log_teacher = log_teacher.to(logits.dtype)
    table = torch.softmax(logits, 1).t().contiguous()  # [n_in, R]
    sums = bag_sums(table, sparse.inputs, sparse.output_ptr, values)  # [n_out, R]
    kept = sums
    if places is not None:
        places = places.t()
        kept = torch.nn.functional.pad(sums, (0, 0, 0, 1)).gather(0, places)  # [K, R]
    whole, best = kept.sum(0), kept.argmax(0)
    if places is not None:  # no mass on either side there: log 1 stands in for log 0
        kept = kept.masked_fill_(places == len(sums), 1.0)
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
    if places is not None:
        slope = sums.new_zeros(len(sums) + 1, len(seed)).scatter_(0, places, slope)[:-1]
    grad_values = None
    if want_values:
        grad_values = (table[sparse.inputs] * slope[sparse.outputs]).sum(1)
    order = sparse.transposed
    grad = bag_sums(slope, sparse.outputs[order], sparse.input_ptr, values[order]).mul_(table)
    unread = table.index_select(0, unread_rows).sum(0)
    return ForwardKL(loss, log_mass, best, unread, grad.t().contiguous(), grad_values)


def _weighted_mean(probs: Tensor, values: Tensor) -> Tensor:
    """[R] sum of probs * values, 0 where a value is -inf and its probability 0."""
    product = probs * values
    sums = product.sum(1)
    return sums if bool(torch.isfinite(sums).all()) else product.nansum(1)
