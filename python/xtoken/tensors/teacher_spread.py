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
        ids: [B, T_t, K] int64 teacher ids below V_t', rising within a row; a short row repeats its
            last one.
        log_probs: [B, T_t, K] float, log-probabilities under the full vocabulary, repeated too.
        log_priors: [P, V_t'] float, how mass that is not kept is spread.
        prior: [B, T_t] int64, which of them a row has.
        log_scale: [B, T_t] float, what a row adds to its prior.
        teacher_fingerprint: of the teacher's vocabulary, where known.

    Raises:
        ShapeError: shapes or dtypes that do not fit.
    """

    ids: Tensor
    log_probs: Tensor
    log_priors: Tensor
    prior: Tensor
    log_scale: Tensor
    teacher_fingerprint: str | None = None

    def __post_init__(self) -> None:
        fit = (
            self.ids.dim() == 3
            and self.ids.dtype == self.prior.dtype == torch.int64
            and self.ids.shape[2] > 0
            and self.log_probs.shape == self.ids.shape
            and self.prior.shape == self.log_scale.shape == self.ids.shape[:2]
            and self.log_priors.dim() == 2
        )
        if not fit:
            raise ShapeError(
                f"ids {tuple(self.ids.shape)}, log_probs {tuple(self.log_probs.shape)}, prior "
                f"{tuple(self.prior.shape)}, log_scale {tuple(self.log_scale.shape)} and "
                f"log_priors {tuple(self.log_priors.shape)} do not fit, expected [B, T, K], "
                "[B, T, K], [B, T], [B, T] and [P, V]; take them from TopKStore.signal"
            )

    @classmethod
    def of_prior(cls, log_prior: Tensor, ids: Tensor) -> TeacherSpread:
        """The prior [V_t'] itself at every place of `ids` [B, T_t]: of rows that nobody reads."""
        place = ids.new_zeros(ids.shape)
        log_prior = log_prior.to(ids.device)
        kept = log_prior[:1].expand(*ids.shape, 1)
        return cls(place[..., None], kept, log_prior[None], place, torch.zeros_like(kept[..., 0]))

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
        kept = self.log_probs.flatten(0, 1)[index].to(found.dtype)
        found.scatter_(1, self.ids.flatten(0, 1)[index], kept)
        return found[:, :width] if columns is None else found.index_select(1, columns)

    @torch.no_grad()
    def entries(self, index: Tensor, columns: Tensor) -> Tensor:
        """[S] log-probabilities at (position, column) pairs, float32 or float64."""
        spread = self.log_priors[self.prior.flatten()[index], columns]
        spread = upcast(spread + self.log_scale.flatten()[index])
        ids = self.ids.flatten(0, 1)
        first = torch.arange(len(ids), device=ids.device)[:, None] * self.width
        keys, wanted = (ids + first).flatten(), index * self.width + columns
        at = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        return torch.where(keys[at] == wanted, self.log_probs.flatten()[at].to(spread), spread)

    def to(self, device: torch.device | str) -> TeacherSpread:
        """The same signal on another device."""
        moved = self.map_tensors(lambda tensor: tensor.to(device))
        return replace(moved, log_priors=self.log_priors.to(device))

    def map_tensors(self, move: Callable[[Tensor], Tensor]) -> TeacherSpread:
        """The same signal with `move` of each tensor that has positions."""
        return replace(
            self,
            ids=move(self.ids),
            log_probs=move(self.log_probs),
            prior=move(self.prior),
            log_scale=move(self.log_scale),
        )
