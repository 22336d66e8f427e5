"""The losses of one micro-batch under the settings of a run, as shares of the whole step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from xtoken.data.collate import DistillBatch
from xtoken.losses import TeacherTopK, cross_entropy, gold, p_kl
from xtoken.projection import Projection
from xtoken.sparse import SparseProjection
from xtoken.training.config import DistillConfig


class TeacherSource(Protocol):
    """Anything that gives the teacher's predictions of a padded batch."""

    def signal(self, ids: Tensor, attention_mask: Tensor) -> Tensor | TeacherTopK:
        """Return logits [B, T, V], or the likeliest columns of each position."""


@dataclass(frozen=True)
class Parts:
    """The losses of a micro-batch, each divided by the totals of the step.

    Args:
        ce: scalar with a graph, nats per token.
        kd: scalar with a graph, nats per chunk; None for a run without teacher.
        shares: what else the loss measured, each weighted so that micro-batches add up.
    """

    ce: Tensor
    kd: Tensor | None
    shares: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """Return all values by name, detached."""
        values = {"ce": float(self.ce.detach()), **self.shares}
        if self.kd is not None:
            values["kd"] = float(self.kd.detach())
        return values


class Objective:
    """Computes cross-entropy and the configured distillation loss.

    Args:
        config: which loss, and its options.
        projection: W of the pair; may be None for `ce`.
    """

    def __init__(self, config: DistillConfig, projection: Projection | None) -> None:
        self.config = config
        self.needs_teacher = config.loss != "ce" and config.kd_weight != 0
        self._sparse: SparseProjection | None = None
        if self.needs_teacher:
            if projection is None:
                raise ValueError(f"loss = {config.loss!r} needs the projection of the pair")
            self._sparse = SparseProjection.from_projection(projection)
            self._common = projection.common_set(mode="strict")

    def counts(self, batch: DistillBatch) -> tuple[int, int]:
        """Return the numbers of predicted tokens and of usable chunks of a batch."""
        tokens = int(_targets(batch).sum())
        if not self.needs_teacher:
            return tokens, 0
        usable = batch["chunks"].usable(batch["student_loss_mask"], batch["teacher_loss_mask"])
        return tokens, len(usable)
