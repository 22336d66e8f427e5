"""One training loss out of the distillation loss and the student's cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor


def combine(
    kd: Tensor,
    ce: Tensor | None = None,
    *,
    kd_weight: float | None = None,
    ce_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`scale * kd + ce_weight * ce`.

    Args:
        kd: scalar distillation loss.
        ce: scalar cross-entropy, or None for none.
        kd_weight: a fixed scale. None balances as the paper's Eq. 7, `sg(ce / kd)`: the
            distillation term then has the value of the cross-entropy and keeps its own gradient's
            direction. Where `kd` is not above 0 (nothing usable, a student equal to its teacher, a
            partial KL) or `ce` is absent the scale is 1.
        ce_weight: fixed weight of `ce`.

    Returns: the scalar, and the detached metric `kd_scale`.

    Raises:
        ValueError: a negative weight, or a loss that is not a scalar.
    """
    for name, value in (("kd", kd), ("ce", ce)):
        if value is not None and value.dim() != 0:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected a scalar")
    for name, weight in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
        if weight is not None and not weight >= 0:
            raise ValueError(f"{name} = {weight} must not be negative")
    scale = balance(kd, ce) if kd_weight is None else torch.full_like(kd.detach(), kd_weight)
    total = scale * kd
    if ce is not None:
        total = total + ce_weight * ce
    return total, {"kd_scale": scale}


def balance(kd: Tensor, ce: Tensor | None) -> Tensor:
    """sg(ce / kd), 1 where kd is not above 0 or ce is None.

    A partial KL (GOLD, H-KL) can be below 0; balanced by a negative factor it would be maximized.
    """
    kd = kd.detach()
    if ce is None:
        return torch.ones_like(kd)
    usable = kd > 0
    return torch.where(usable, ce.detach() / torch.where(usable, kd, torch.ones_like(kd)), 1.0)
