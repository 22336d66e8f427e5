"""The tail bucket: one more column on each side for all that is not kept."""

from __future__ import annotations

import torch
from torch import Tensor


def safe_logsumexp(values: Tensor) -> Tensor:
    """[R, n] to [R]; -inf, with no gradient, for a row of -inf, where torch's gradient is NaN."""
    silent = torch.isneginf(values).all(-1)
    found = torch.logsumexp(values.masked_fill(silent[:, None], 0.0), -1)
    return found.masked_fill(silent, -torch.inf)


def log_shares(shares: Tensor) -> Tensor:
    """log of shares >= 0; -inf, with no gradient, at 0."""
    none = shares <= 0
    return torch.log(shares.masked_fill(none, 1.0)).masked_fill(none, -torch.inf)


def with_tail(
    log_teacher: Tensor,
    log_student: Tensor,
    teacher_tail: Tensor,
    student_tail: Tensor,
    has_tail: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Both sides with the column of their tails.

    Args:
        log_teacher, log_student: [R, K].
        teacher_tail, student_tail: [R], in the scales of the kept columns.
        has_tail: [R] bool, the rows in which something is not kept; None for all. The others get
            no mass there on either side.
    """
    sides = []
    for kept, tail in ((log_teacher, teacher_tail), (log_student, student_tail)):
        if has_tail is not None:
            tail = tail.masked_fill(~has_tail, -torch.inf)
        sides.append(torch.cat([kept, tail[:, None].to(kept.dtype)], 1))
    return sides[0], sides[1]
