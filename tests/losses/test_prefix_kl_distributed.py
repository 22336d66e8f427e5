"""Prefix KL on two processes: data parallel with uneven chunks, and a vocabulary cut in two."""

from __future__ import annotations

import torch
import torch.distributed as dist
from loss_cases import loss_of
from prefix_cases import make_prefix_case
from test_losses_distributed import WORLD, on_two_processes

from xtoken.losses import VocabShard, global_normalizer


def call(case, logits, chunks, **given):
    arguments = (logits, case.batch.teacher_logits, chunks, case.pair)
    return loss_of("prefix-kl", *arguments, **case.ids(), **given)


def data_parallel(rank: int) -> None:
    """The mean over ranks of each rank's gradient is the gradient of the whole batch."""
    case = make_prefix_case(3, batch=3, chunks=8)
    usable = case.batch.usable
    mine = usable.select((usable.sample == 0) == (rank == 0))
    counts = torch.tensor(len(mine))
    dist.all_reduce(counts)
    assert int(counts) == len(usable) != WORLD * len(mine)
    logits = case.batch.student_logits
    part = call(case, logits, mine, normalizer=global_normalizer(len(mine))).loss
    (gradient,) = torch.autograd.grad(part, logits)
    dist.all_reduce(gradient)
    (expected,) = torch.autograd.grad(call(case, logits, usable).loss, logits)
    torch.testing.assert_close(gradient / WORLD, expected)


def vocabulary_parallel(rank: int) -> None:
    """The loss and its gradient from two uneven shards of the logits."""
    case = make_prefix_case(4, batch=2, chunks=8)
    logits = case.batch.student_logits
    whole = call(case, logits, case.batch.usable).loss
    (gradient,) = torch.autograd.grad(whole, logits)
    for cut in (5, logits.shape[-1] // 2):
        part = slice(0, cut) if rank == 0 else slice(cut, logits.shape[-1])
        local = logits.detach()[..., part].clone().requires_grad_()
        found = call(case, VocabShard(local), case.batch.usable, block_size=3).loss
        torch.testing.assert_close(found, whole)
        (mine,) = torch.autograd.grad(found, local)
        torch.testing.assert_close(mine, gradient[..., part])


def test_data_parallel_processes_make_the_single_process_gradient() -> None:
    on_two_processes(data_parallel)


def test_a_sharded_vocabulary_gives_the_same_loss_and_gradient() -> None:
    on_two_processes(vocabulary_parallel)
