"""What every loss returns, and the number it is divided by."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LossOutput:
    """A loss and what was counted on the way.

    Attributes:
        loss: scalar with a graph, also where nothing was usable (then 0).
        num_chunks: scalar int64, the chunks (or tokens) counted.
        metrics: detached scalars, means over the counted chunks unless the key says otherwise.
    """

    loss: Tensor
    num_chunks: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


def global_normalizer(num_chunks: int | Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The normalizer that makes data-parallel gradients those of one process.

    Data parallel averages gradients over ranks, so each rank divides by the mean number of chunks
    a rank, not by its own. With gradient accumulation pass the sum over the micro-batches.

    Returns: scalar float64, at least 1 / world size.
    """
    total = torch.as_tensor(num_chunks, dtype=torch.float64).clone()
    world = 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total, group=group)
        world = dist.get_world_size(group)
    return total.clamp(min=1.0) / world


def inverse_normalizer(normalizer: float | Tensor | None, count: int) -> float | Tensor:
    """1 / normalizer, `count` where none was given.

    Raises:
        ValueError: the normalizer is not above 0, or a tensor of more than one element.
    """
    if normalizer is None:
        return 1.0 / max(count, 1)
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer has shape {tuple(normalizer.shape)}, expected a scalar")
        return normalizer.detach().reshape(()).reciprocal()
    if not normalizer > 0:
        raise ValueError(f"normalizer = {normalizer} must be above 0: a number of chunks")
    return 1.0 / normalizer
