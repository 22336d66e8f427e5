"""What every loss returns, the number it is divided by, and its sum with cross-entropy."""

from __future__ import annotations

import atexit
import os
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from xtoken._checks import check_number
from xtoken.errors import ShapeError
from xtoken.tensors.host import readable

# The balance's bound: a distillation loss below a thousandth of the cross-entropy is rounding, not
# something to learn, and without a bound the weight of a student that agrees grows beyond 10^5.
MAX_BALANCE = 1e3


@atexit.register
def _let_gloo_end() -> None:
    """Leave Python's lock to gloo's threads for a moment, before Python ends."""
    # One may still hold the tensors of the last collective, also after the group was destroyed. If
    # it asks for the lock, to free them, once Python is ending, the whole process aborts: with
    # torch 2.15 and nothing else, one run of two processes in five.
    if "RANK" in os.environ or (dist.is_available() and dist.is_initialized()):
        time.sleep(0.1)


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


def global_normalizer(num_chunks: float | Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The normalizer that makes data-parallel gradients those of one process.

    Data parallel averages gradients over ranks, so each rank divides by the mean number of chunks
    a rank, not by its own. With gradient accumulation pass the sum over the micro-batches.

    Returns: scalar float64, 1 / world size where there is no chunk at all.

    Raises:
        OptionError: a number below 0, or none.
    """
    total = torch.as_tensor(num_chunks, dtype=torch.float64).clone()
    if readable(total):
        check_number("num_chunks", total.item(), 0, rule="must be at least 0: chunks or tokens")
    world = 1
    if dist.is_available() and dist.is_initialized():
        held = total.to(device_of_group(group, total.device))
        dist.all_reduce(held, group=group)
        total, world = held.to(total.device), dist.get_world_size(group)
    return torch.where(total == 0, 1.0, total) / world


def device_of_group(group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    """Where the processes of a group can add up what is on a device: there, or, as with NCCL alone
    for the CPU, on the first device that the group serves."""
    config = dist.get_backend_config(group)  # "cpu:gloo,cuda:nccl"
    served = [each.split(":")[0] for each in config.split(",")]
    if device.type in served:
        return device
    # That of `init_process_group(device_id=...)`, or the current one.
    bound = getattr(group or dist.group.WORLD, "bound_device_id", None)
    return bound if isinstance(bound, torch.device) else torch.device(served[0])


def inverse_normalizer(normalizer: float | Tensor) -> float | Tensor:
    """1 / normalizer; see `xtoken.losses.inputs.check_normalizer`."""
    if isinstance(normalizer, Tensor):
        value = normalizer.detach().reshape(())
        # One that nobody looked at is not taken where it is none.
        return torch.where(value > 0, value.reciprocal(), torch.nan)
    return 1.0 / normalizer


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

    Returns: the scalar, and the detached metrics `kd_scale` and `kd_scale_clipped`, 1 where the
        balance met its bound, `MAX_BALANCE`.

    Raises:
        OptionError: a negative weight.
        ShapeError: a loss that is not a scalar.

    >>> total, metrics = combine(torch.tensor(0.5), torch.tensor(2.0))
    >>> total.item(), metrics["kd_scale"].item()
    (4.0, 4.0)
    """
    for name, value in (("kd", kd), ("ce", ce)):
        if value is not None and value.dim() != 0:
            raise ShapeError(f"{name} has shape {tuple(value.shape)}, expected a scalar")
    for name, weight in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
        if weight is not None:
            check_number(name, weight, 0, rule="must not be negative: a finite factor")
    clipped = torch.zeros_like(kd.detach())
    if kd_weight is None:
        scale = balance(kd, ce)
        clipped = (scale >= MAX_BALANCE).to(kd.dtype)
    else:
        scale = torch.full_like(kd.detach(), kd_weight)
    total = scale * kd
    if ce is not None:
        total = total + ce_weight * ce
    return total, {"kd_scale": scale, "kd_scale_clipped": clipped}


def balance(kd: Tensor, ce: Tensor | None) -> Tensor:
    """sg(ce / kd), at most `MAX_BALANCE`; 1 where kd is not above 0 or ce is None.

    A partial KL (GOLD, H-KL) can be below 0; balanced by a negative factor it would be maximized.
    """
    kd = kd.detach()
    if ce is None:
        return torch.ones_like(kd)
    usable = kd > 0
    scale = ce.detach() / torch.where(usable, kd, torch.ones_like(kd))
    return torch.where(usable, scale.clamp(max=MAX_BALANCE), 1.0)
