"""What a distiller's step gives, and what it divides by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from xtoken._checks import check_number, expect
from xtoken.distillation.options import KdWeight
from xtoken.losses.output import LossOutput, combine, global_normalizer


@dataclass(frozen=True)
class Counts:
    """What a step divides by: add them up over the micro-batches of a step.

    Attributes:
        tokens: predicted student tokens, the normalizer of the cross-entropy.
        chunks: usable chunks, the normalizer of the distillation loss.
    """

    tokens: float
    chunks: float

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tokens + other.tokens, self.chunks + other.chunks)

    def over_processes(self) -> Counts:
        """The mean per process, where torch.distributed runs: data parallel averages gradients."""
        return Counts(float(global_normalizer(self.tokens)), float(global_normalizer(self.chunks)))


def checked_counts(totals: object, name: str = "totals") -> Counts:
    """What a step divides by, where it is that.

    Raises:
        ArgumentTypeError: it is of another class.
        OptionError: a count is not a number of at least 0.
    """
    counts = expect(totals, Counts, name, "add up distiller.counts(batch) of the step's batches")
    found = []
    for field_name in ("tokens", "chunks"):
        value: object = getattr(counts, field_name)
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        rule = "must be a number of at least 0; add up distiller.counts(batch)"
        check_number(f"{name}.{field_name}", value, 0, rule=rule)
        found.append(float(cast(float, value)))
    return Counts(*found)


@dataclass(frozen=True, eq=False)
class DistillOutput:
    """A training loss and its parts.

    Attributes:
        loss: scalar with a graph: `kd_scale * kd + ce_weight * ce`.
        kd: scalar with a graph, nats per chunk; None for cross-entropy alone.
        ce: scalar with a graph, nats per token; None where its weight is 0.
        kd_scale: detached scalar, the weight of `kd` in `loss`.
        num_chunks, num_tokens: what was counted in this batch.
        metrics: detached scalars, means over the counted chunks unless the key says otherwise.
    """

    loss: Tensor
    kd: Tensor | None
    ce: Tensor | None
    kd_scale: Tensor
    num_chunks: Tensor
    num_tokens: int
    metrics: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        kd: LossOutput | None,
        ce: Tensor | None,
        tokens: int,
        *,
        kd_weight: KdWeight,
        ce_weight: float,
        kd_scale: float | None = None,
    ) -> DistillOutput:
        """The weighted sum; without `kd` the cross-entropy alone.

        `kd_scale` goes before `kd_weight`; `balanced` is by the values of the two.
        """
        if kd is None:
            assert ce is not None
            zero = torch.zeros((), device=ce.device)
            return cls(ce_weight * ce, None, ce, zero, zero.long(), tokens)
        if kd_scale is not None:
            check_number("kd_scale", kd_scale, 0, rule="is out of range; expected at least 0")
        weight = kd_scale
        if weight is None and not isinstance(kd_weight, str):
            weight = kd_weight
        loss, metrics = combine(kd.loss, ce, kd_weight=weight, ce_weight=ce_weight)
        scale = metrics["kd_scale"]
        return cls(loss, kd.loss, ce, scale, kd.num_chunks, tokens, {**kd.metrics, **metrics})
