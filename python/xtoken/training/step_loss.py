"""The losses of one micro-batch under the settings of a run, as shares of the whole step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from xtoken.data.collate import DistillBatch
from xtoken.errors import OptionError
from xtoken.losses import LossInputs, LossOutput, TeacherTopK, combine, cross_entropy
from xtoken.projection import Projection
from xtoken.tensors.chunks import ChunkBatch
from xtoken.training.config import DistillConfig
from xtoken.training.distill_loss import DistillLoss


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
        device: where the batches will be.
    Raises: OptionError if the loss needs W and there is none.
    """

    def __init__(
        self,
        config: DistillConfig,
        projection: Projection | None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.needs_teacher = config.loss != "ce" and config.kd_weight != 0
        self._vocab_sizes: tuple[int, int] | None = None
        if projection is not None:
            self._vocab_sizes = projection.shape
        if not self.needs_teacher:
            return
        if projection is None:
            raise OptionError(
                f"loss = {config.loss!r} needs W of the pair; pass Projection.build(...)"
            )
        self._loss = DistillLoss(config, projection, device)

    def counts(self, batch: DistillBatch) -> tuple[int, int]:
        """Return the numbers of predicted tokens and of usable chunks of a batch."""
        tokens = int(batch["student_loss_mask"][:, 1:].sum())
        return tokens, len(_usable(batch)) if self.needs_teacher else 0

    def __call__(
        self,
        student_logits: Tensor,
        signal: Tensor | TeacherTopK | None,
        batch: DistillBatch,
        *,
        token_total: float,
        chunk_total: float,
    ) -> Parts:
        """Return the losses of a micro-batch.

        Args:
            student_logits: [B, T_s, V_s'] float, raw.
            signal: teacher logits [B, T_t, V_t'] or a top-k; None where no teacher is needed.
            batch: what both were made from.
            token_total, chunk_total: what the step divides by, at least the counts of this batch.
        """
        sizes = self._vocab_sizes
        ce = cross_entropy(
            student_logits,
            batch["student_ids"],
            batch["student_loss_mask"],
            max(token_total, 1.0),
            vocab_size=sizes[0] if sizes else None,
        )
        if not self.needs_teacher or signal is None:
            return Parts(ce.loss, None, {})
        output: LossOutput = self._loss(
            LossInputs(
                student_logits,
                signal,
                _usable(batch),
                student_ids=batch["student_ids"],
                teacher_ids=batch["teacher_ids"],
                normalizer=max(chunk_total, 1.0),
            )
        )
        share = float(output.num_chunks) / max(chunk_total, 1.0)
        shares = {name: float(value) * share for name, value in output.metrics.items()}
        return Parts(ce.loss, output.loss, shares | {"chunks": float(output.num_chunks)})

    def combine(self, parts: Parts, kd_scale: float | None) -> tuple[Tensor, float]:
        """Return the loss to differentiate and the weight of the distillation loss in it.

        Args:
            parts: of a micro-batch.
            kd_scale: that weight; None takes it from these parts, as the paper's balance.
        """
        if parts.kd is None:
            return self.config.ce_weight * parts.ce, 0.0
        loss, metrics = combine(
            parts.kd, parts.ce, kd_weight=kd_scale, ce_weight=self.config.ce_weight
        )
        return loss, float(metrics["kd_scale"])

    def balance(self, ce: float, kd: float) -> float:
        """Return the weight of the distillation loss that the paper's balance gives here."""
        _, metrics = combine(torch.tensor(kd), torch.tensor(ce))
        return float(metrics["kd_scale"])


def _usable(batch: DistillBatch) -> ChunkBatch:
    return batch["chunks"].usable(batch["student_loss_mask"], batch["teacher_loss_mask"])
