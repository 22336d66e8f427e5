"""The teacher's likeliest next tokens, with the rest of its mass spread over all others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xtoken.errors import ShapeError
from xtoken.tensors.rows import upcast


@dataclass(frozen=True, eq=False)
class TeacherSpread:
    """The teacher's best next tokens at each position, and a prior that says where the rest is.

    It is read as full logits are: a row is `log_priors[prior] + log_scale`, with `log_probs` at
    `ids`. Rows are made where a loss reads them, and never kept.

    Attributes:
        ids: [M] int32 teacher ids below V_t', rising within a row; one row after another.
        log_probs: [M] float, their log-probabilities under the full vocabulary.
        start, count: [B, T_t] int64, where a row lies in both; a place without a token has none.
        log_priors: [P, V_t'] float, how mass that is not kept is spread.
        prior: [B, T_t] int64, which of them a row has.
        log_scale: [B, T_t] float, what a row adds to its prior.
        widest: the largest of `count`, or more.
        teacher_fingerprint: of the teacher's vocabulary, where known.

    Raises:
        ShapeError: shapes or dtypes that do not fit.
    """

    ids: Tensor
    log_probs: Tensor
    start: Tensor
    count: Tensor
    log_priors: Tensor
    prior: Tensor
    log_scale: Tensor
    widest: int
    teacher_fingerprint: str | None = None

    def __post_init__(self) -> None:
        places = (self.start, self.count, self.prior)
        fit = (
            self.ids.dim() == 1
            and self.ids.dtype == torch.int32
            and self.log_probs.shape == self.ids.shape
            and self.log_scale.dim() == 2
            and all(each.shape == self.log_scale.shape for each in places)
            and all(each.dtype == torch.int64 for each in places)
            and self.log_priors.dim() == 2
        )
        if not fit:
            raise ShapeError(
                f"ids {tuple(self.ids.shape)}, log_probs {tuple(self.log_probs.shape)}, start "
                f"{tuple(self.start.shape)}, count {tuple(self.count.shape)}, prior "
                f"{tuple(self.prior.shape)}, log_scale {tuple(self.log_scale.shape)} and "
                f"log_priors {tuple(self.log_priors.shape)} do not fit, expected [M], [M], [B, T] "
                "four times, and [P, V]; take them from TopKStore.signal"
            )

    @classmethod
    def of_prior(cls, log_prior: Tensor, ids: Tensor) -> TeacherSpread:
        """The prior [V_t'] itself at every place of `ids` [B, T_t]: of rows that nobody reads."""
        place = ids.new_zeros(ids.shape)
        log_prior = log_prior.to(ids.device)
        nothing = ids.new_zeros(0, dtype=torch.int32)
        return cls(
            nothing, log_prior[:0], place, place, log_prior[None], place,
            log_prior.new_zeros(ids.shape), 0,
        )  # fmt: skip

    @property
    def positions(self) -> tuple[int, int]:
        """(B, T_t)."""
        return self.log_scale.shape[0], self.log_scale.shape[1]

    @property
    def width(self) -> int:
        """V_t', the columns of a row."""
        return self.log_priors.shape[1]

    @torch.no_grad()
    def rows(self, index: Tensor, columns: Tensor | None = None, *, width: int) -> Tensor:
        """[N, K] log-probabilities of flattened positions, float32 or float64.

        Args:
            index: [N] int64 positions.
            columns: [K] int64; None for the first `width`.
        """
        found = self.log_priors.index_select(0, self.prior.flatten()[index])
        found = upcast(found + self.log_scale.flatten()[index, None])
        start, count = self.start.flatten()[index], self.count.flatten()[index]
        if index.device.type == "cpu":
            self._write(found, start, count)
        elif self.widest:
            self._write_padded(found, start, count)
        return found[:, :width] if columns is None else found.index_select(1, columns)

    def _write(self, found: Tensor, start: Tensor, count: Tensor) -> None:
        """Write what is kept of rows into `found` [N, V_t']."""
        row = torch.arange(len(count), device=count.device).repeat_interleave(count)
        at = torch.arange(len(row), device=row.device) + (start - count.cumsum(0) + count)[row]
        found[row, self.ids[at].long()] = self.log_probs[at].to(found.dtype)

    def _write_padded(self, found: Tensor, start: Tensor, count: Tensor) -> None:
        """The same, without waiting for the device to say how wide these rows are: as wide as any.
        A short row repeats its last column, and one of none keeps what it has."""
        beside = torch.arange(self.widest, device=count.device).minimum(count[:, None] - 1)
        at = (start[:, None] + beside).clamp(min=0)
        ids = self.ids[at].long()
        kept = self.log_probs[at].to(found.dtype)
        found.scatter_(1, ids, torch.where(count[:, None] > 0, kept, found.gather(1, ids)))

    @torch.no_grad()
    def entries(self, index: Tensor, columns: Tensor) -> Tensor:
        """[S] log-probabilities at (position, column) pairs, float32 or float64."""
        spread = self.log_priors[self.prior.flatten()[index], columns]
        spread = upcast(spread + self.log_scale.flatten()[index])
        if not self.widest:
            return spread
        low = self.start.flatten()[index]
        end = high = low + self.count.flatten()[index]
        last = len(self.ids) - 1
        # The first of a row's ids that is not below the column, by bisection.
        for _ in range(self.widest.bit_length()):
            middle = (low + high) // 2
            below = (low < high) & (self.ids[middle.clamp(max=last)] < columns)
            low, high = torch.where(below, middle + 1, low), torch.where(below, high, middle)
        at = low.clamp(max=last)
        found = (low < end) & (self.ids[at] == columns)
        return torch.where(found, self.log_probs[at].to(spread), spread)

    def to(self, device: torch.device | str) -> TeacherSpread:
        """The same signal on another device."""
        moved = self.map_tensors(lambda tensor: tensor.to(device))
        return replace(
            moved,
            ids=self.ids.to(device),
            log_probs=self.log_probs.to(device),
            log_priors=self.log_priors.to(device),
        )

    def map_tensors(self, move: Callable[[Tensor], Tensor]) -> TeacherSpread:
        """The same signal with `move` of each tensor that has positions; zeros stand for a place of
        which nothing is kept."""
        return replace(
            self,
            start=move(self.start),
            count=move(self.count),
            prior=move(self.prior),
            log_scale=move(self.log_scale),
        )
