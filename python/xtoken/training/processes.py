"""torchrun helpers: rank, number of processes, and a barrier with a long timeout."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

# The groups of torch and accelerate give up after 10 (NCCL) or 30 minutes (gloo), and a large
# teacher predicts for hours. A process that dies ends the wait of the others at once.
PATIENCE = timedelta(days=7)

T = TypeVar("T")


def process_index() -> int:
    """Return the number of this process among those that torchrun started, 0 without it."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """Return how many processes torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this process is the one that prints and writes."""
    return process_index() == 0


def join_processes(device: torch.device) -> None:
    """Meet the other processes, if there are any, as `transformers.Trainer` will on this device."""
    if process_count() > 1 and not dist.is_initialized():
        from accelerate import PartialState  # type: ignore[import-untyped]

        PartialState(cpu=device.type == "cpu", timeout=timedelta(minutes=30))


def wait_for_all() -> None:
    """Return once every process has called this; needs `join_processes`."""
    if process_count() > 1:
        dist.barrier(group=_patient_group(dist.group.WORLD))


def on_first_process(work: Callable[[], T]) -> T:
    """Return in every process what `work` returns in the first one, or raise what it raises there.

    Args:
        work: called in the first process alone; its result can be pickled.
    """
    if process_count() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if is_main_process():
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=_patient_group(dist.group.WORLD))
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def from_all(value: T) -> list[T]:
    """Return in every process what each has given, in their order; it can be pickled. Needs
    `join_processes`."""
    if process_count() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value, group=_patient_group(dist.group.WORLD))
    return found


def on_first_of_node(work: Callable[[], Iterable[T]]) -> list[T]:
    """Return in every process what `work` gives in the first one on its machine, or raise what it
    raises there.

    Args:
        work: called in the first process of each machine alone; what it gives can be pickled, and
            is sent piece by piece.

    Needs `join_processes`. The machines wait for one another only before the first call.
    """
    if process_count() == 1:
        return list(work())
    ranks, group = _node(dist.group.WORLD)
    if len(ranks) == 1:
        return list(work())
    found: list[T] = []

    def exchange(*message: Any) -> tuple[bool, Any, Exception | None]:
        held = list(message) or [None, None, None]
        dist.broadcast_object_list(held, src=ranks[0], group=group)
        return held[0], held[1], held[2]

    if dist.get_rank() != ranks[0]:
        while True:
            more, piece, error = exchange()
            if error is not None:
                raise error
            if not more:
                return found
            found.append(piece)
    try:
        for piece in work():
            exchange(True, piece, None)
            found.append(piece)
    except Exception as error:
        exchange(False, None, error)
        raise
    exchange(False, None, None)
    return found


def shard_frozen(model: nn.Module, device: torch.device) -> None:
    """Shard a model that is only read over all processes by FSDP2, layer by layer, in place.

    Args:
        model: of transformers, which names the layers that may not be split.
        device: of this process; shards are moved there, one layer at a time.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    # The root is kept whole after its forward pass by default, for a backward pass.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


@functools.cache
def _node(world: Any) -> tuple[list[int], Any]:
    """Return the ranks on this machine, and a group of them."""
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname(), group=_patient_group(world))
    own: tuple[list[int], Any] | None = None
    for host in dict.fromkeys(hosts):
        ranks = [rank for rank, each in enumerate(hosts) if each == host]
        # Every process takes part in the making of every group.
        group = dist.new_group(ranks, backend="gloo", timeout=PATIENCE)
        if dist.get_rank() in ranks:
            own = ranks, group
    assert own is not None
    return own


@functools.cache
def _patient_group(world: Any) -> Any:
    """Return a group of all processes that waits long; one for each world, as it is made once."""
    # gloo: it exchanges objects on the CPU, and a GPU that waits in NCCL for hours is kept busy.
    return dist.new_group(backend="gloo", timeout=PATIENCE)
