"""Two processes: data parallel with uneven chunks, and a vocabulary cut in two."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from forked import free_port, start_server
from loss_cases import every_loss, make_case, relayout

from xtoken.errors import ShapeError
from xtoken.losses import VocabShard, cross_entropy, global_normalizer
from xtoken.losses.engine import row_blocks

WORLD = 2


def start(
    rank: int, port: int, work: Callable[[int], None], environment: Mapping[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    work(rank)
    dist.barrier()  # nobody leaves while another still listens
    # Past torch's destructors: that of 2.6 can wait for ever for the GIL that it holds, and a later
    # one ended a process in a run of ten.
    os._exit(0)


def on_two_processes(work: Callable[[int], None]) -> None:
    start_server()
    arguments = (free_port(), work, dict(os.environ))
    mp.start_processes(start, args=arguments, nprocs=WORLD, start_method="forkserver")


def data_parallel(rank: int) -> None:
    """The mean over ranks of each rank's gradient is the gradient of the whole batch."""
    loss = every_loss()["p_kl"]
    case = make_case(1, batch=3)
    shards = [[0], [1, 2]]
    mine = relayout(case, shards[rank])
    whole = loss(case)
    weight = torch.zeros(case.student_logits.shape[-1], dtype=torch.float64, requires_grad=True)
    # A parameter that all ranks share: a bias on the logits.
    normalizer = global_normalizer(len(mine.usable))
    part = loss(replace(mine, student_logits=mine.student_logits + weight), normalizer=normalizer)
    (grad,) = torch.autograd.grad(part.loss, weight)
    dist.all_reduce(grad)
    total = loss(replace(case, student_logits=case.student_logits + weight)).loss
    (wanted,) = torch.autograd.grad(total, weight)
    assert torch.allclose(grad / WORLD, wanted, atol=1e-12)
    value = part.loss.detach().clone()
    dist.all_reduce(value)
    assert torch.allclose(value / WORLD, whole.loss)
    counts = torch.tensor(len(mine.usable))
    dist.all_reduce(counts)
    assert int(counts) == len(case.usable) != WORLD * len(mine.usable)


def vocabulary_parallel(rank: int) -> None:
    """Each loss and its gradient, from two uneven shards, one of them empty, and from a DTensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    case = make_case(2)
    width = case.student_logits.shape[-1]
    mesh = init_device_mesh("cpu", (WORLD,))
    for loss in every_loss().values():
        wanted = loss(case)
        (grad,) = torch.autograd.grad(wanted.loss, case.student_logits)
        for cut in (7, width // 2, 0):
            part = slice(0, cut) if rank == 0 else slice(cut, width)
            local = case.student_logits.detach()[..., part].clone().requires_grad_()
            found = loss(replace(case, student_logits=VocabShard(local)))
            (mine,) = torch.autograd.grad(found.loss, local)
            assert torch.allclose(found.loss, wanted.loss)
            assert torch.allclose(mine, grad[..., part], atol=1e-13)
        local = case.student_logits.detach().chunk(WORLD, -1)[rank].clone().requires_grad_()
        logits = DTensor.from_local(local, mesh, [Shard(2)])
        (mine,) = torch.autograd.grad(loss(replace(case, student_logits=logits)).loss, local)
        assert torch.allclose(mine, grad.chunk(WORLD, -1)[rank], atol=1e-13)
    ids, mask = case.student_ids, case.student_mask
    ce = cross_entropy(case.student_logits, ids, mask, vocab_size=case.v_s).loss
    local = case.student_logits.detach()[..., rank * 8 : rank * 8 + 8]
    assert torch.allclose(cross_entropy(VocabShard(local), ids, mask, vocab_size=13).loss, ce)
    with pytest.raises(ShapeError, match="the shards together has 6 columns, fewer than"):
        every_loss()["p_kl"](replace(case, student_logits=VocabShard(local[..., :3])))
    with pytest.raises(ShapeError, match=r"the shard has shape \(3,\)"):
        every_loss()["p_kl"](replace(case, student_logits=VocabShard(torch.zeros(3))))


def each_its_share(rank: int) -> None:
    """Neither rank computes more than its half, and together they compute every chunk once."""
    loss, case = every_loss()["p_kl"], make_case(3, batch=3)
    computed = []
    through = row_blocks._through

    def count(*given: Any) -> Any:
        computed.append(len(given[1]))
        return through(*given)

    row_blocks._through = count  # type: ignore[assignment]
    width = case.student_logits.shape[-1] // WORLD
    part = case.student_logits.detach()[..., rank * width : (rank + 1) * width].clone()
    found = loss(replace(case, student_logits=VocabShard(part.requires_grad_()))).loss
    row_blocks._through = through
    assert torch.allclose(found, loss(case).loss)
    rows = torch.tensor(sum(computed))
    assert 0 < rows <= -(-len(case.usable) // WORLD)
    dist.all_reduce(rows)
    assert int(rows) == len(case.usable)


@pytest.mark.parametrize("work", [data_parallel, vocabulary_parallel, each_its_share])
def test_two_processes_give_the_gradient_of_one(work: Callable[[int], None]) -> None:
    on_two_processes(work)
