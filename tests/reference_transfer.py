"""The definition of new embedding rows, entry by entry in float64: slow and obvious."""

from __future__ import annotations

import torch
from torch import Tensor

from xtoken import Pair


def new_rows(pair: Pair, old: Tensor) -> Tensor:
    """[V_s, ...] float64: the rows of the pair's student tokens, from `old` [V_t or more, ...]."""
    teacher = pair.teacher_vocab
    with_text = [old[token].double() for token in range(len(teacher)) if teacher.token_bytes(token)]
    mean = torch.stack(with_text).mean(0)
    rows = []
    for token in range(len(pair.student_vocab)):
        indices, weights = pair.projection.csr.row(token)
        row = torch.zeros_like(mean)
        for teacher_token, weight in zip(indices.tolist(), weights.tolist(), strict=True):
            row = row + weight * old[teacher_token].double()
        rows.append(row if len(indices) else mean)
    return torch.stack(rows)
