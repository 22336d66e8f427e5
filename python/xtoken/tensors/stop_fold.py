"""Stop tokens of the teacher that no student token stands for, added to one that is reached.

All that stops a side is one event. A student with one marker under a teacher with two (an end of
turn and an end of text) can say only that it stops, so the teacher's probabilities of both are
compared with it together; left apart, the second would count as an event that the student should
have given no mass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class StopFold(nn.Module):
    """Which teacher columns are added to which.

    Args:
        sources: teacher ids whose probability moves.
        targets: as many ids that it moves to, none of them a source.

    >>> fold = StopFold([3], [1])
    >>> fold.dense(torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))).exp()
    tensor([[0.1000, 0.6000, 0.3000, 0.0000]])
    """

    def __init__(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        super().__init__()
        # Python numbers: a handful of columns, each an operation without waiting for a device.
        self.pairs = tuple(zip(map(int, sources), map(int, targets), strict=True))

    def __len__(self) -> int:
        return len(self.pairs)

    def dense(self, rows: Tensor) -> Tensor:
        """[R, V_t] logits or log-probabilities, the sources' moved; changed in place."""
        for source, target in self.pairs:
            rows[:, target] = torch.logaddexp(rows[:, target], rows[:, source])
            rows[:, source] = -torch.inf
        return rows

    def with_graph(self, rows: Tensor) -> Tensor:
        """[R, V] logits, the sources' moved, differentiable; where both are -inf, so is the sum."""
        for source, target in self.pairs:
            one, other = rows[:, target], rows[:, source]
            nothing = torch.isneginf(one) & torch.isneginf(other)
            # The gradient of logaddexp(-inf, -inf) is NaN.
            total = torch.logaddexp(one.masked_fill(nothing, 0.0), other.masked_fill(nothing, 0.0))
            total = total.masked_fill(nothing, -torch.inf)
            # A tensor made of a list would wait for the device.
            columns = torch.full((2,), target, device=rows.device)
            columns[1].fill_(source)
            moved = torch.stack([total, torch.full_like(total, -torch.inf)], 1)
            rows = rows.index_copy(1, columns, moved)
        return rows

    def chosen(self, rows: Tensor, whole: Tensor, columns: Tensor) -> Tensor:
        """[R, K] at `columns` [K] of `whole` [R, V_t], as `dense` has them; changed in place."""
        for source, target in self.pairs:
            moved = whole[:, source, None].to(rows.dtype)
            rows = torch.where(columns == target, torch.logaddexp(rows, moved), rows)
            rows = torch.where(columns == source, -torch.inf, rows)
        return rows

    def stored(self, ids: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities [R, k] of a stored top-k, the sources' moved."""
        for source, target in self.pairs:
            from_source, at_target = ids == source, ids == target
            moved = log_probs.masked_fill(~from_source, -torch.inf).logsumexp(1, keepdim=True)
            taken = at_target & torch.isfinite(log_probs)
            has_target = taken.any(1, keepdim=True)
            log_probs = torch.where(taken, torch.logaddexp(log_probs, moved), log_probs)
            # Where the target is not among the stored ids, the source's entry becomes it.
            renamed = from_source & ~has_target
            ids = torch.where(renamed, target, ids)
            log_probs = log_probs.masked_fill(from_source & has_target, -torch.inf)
        return ids, log_probs

    def named(self, mask: Tensor) -> Tensor:
        """[V_t] bool of named ids: a target is named where its source is; changed in place."""
        for source, target in self.pairs:
            mask[target] |= mask[source]
            mask[source] = False
        return mask

    def extra_repr(self) -> str:
        return ", ".join(f"{source} -> {target}" for source, target in self.pairs)


def folded_logits(rows: Tensor, temperature: float, fold: StopFold | None) -> Tensor:
    """[R, V_s] logits by temperature, with their graph, the stops added to the one that counts."""
    logits = rows if temperature == 1.0 else rows / temperature
    return logits if fold is None else fold.with_graph(logits)
