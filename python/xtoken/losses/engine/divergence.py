"""Divergences between rows of log-probabilities, in nats."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Direction = Literal["forward", "reverse", "jsd"]


def kl_sum(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum over the last axis of a * (log a - log b), 0 where a is 0; [R, K] each, to [R].

    A KL where both sum to 1, else a part of one. Infinite where b is 0 and a is not.
    """
    a = torch.exp(log_a)
    difference = torch.where(torch.isneginf(log_a), torch.zeros_like(log_a), log_a - log_b)
    return (a * difference).sum(-1)


def divergence(
    log_teacher: Tensor, log_student: Tensor, direction: Direction = "forward", beta: float = 0.5
) -> Tensor:
    """Divergence of each row; [R, K] log-probabilities on both sides, to [R].

    forward is KL(teacher || student), reverse KL(student || teacher), jsd the generalized
    Jensen-Shannon divergence beta * KL(teacher || m) + (1 - beta) * KL(student || m) with
    m = beta * teacher + (1 - beta) * student (GKD, arXiv 2306.13649).
    """
    if direction == "forward":
        return kl_sum(log_teacher, log_student)
    if direction == "reverse":
        return kl_sum(log_student, log_teacher)
    # Where both sides are empty the terms are 0, but logaddexp's gradient would be NaN.
    both = torch.isneginf(log_teacher) & torch.isneginf(log_student)
    log_mean = torch.logaddexp(
        log_teacher.masked_fill(both, 0.0) + math.log(beta),
        log_student.masked_fill(both, 0.0) + math.log1p(-beta),
    )
    return beta * kl_sum(log_teacher, log_mean) + (1.0 - beta) * kl_sum(log_student, log_mean)
