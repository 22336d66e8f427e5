"""exact-kl on two processes, the vocabulary cut in two."""

from __future__ import annotations

import torch
from exact_kl_cases import V, chunks_of, laid_out, pair, random_targets, student
from test_losses_distributed import on_two_processes
from torch import Tensor

from xtoken.losses import LossInputs, LossOptions, VocabShard
from xtoken.losses.exact_kl.loss import exact_kl


def vocabulary_parallel(rank: int) -> None:
    """The loss and its gradient from two uneven shards of the logits."""
    targets, tokens = random_targets(5)
    batch = laid_out(targets, tokens)
    logits = student(5, padded=2)
    chunks = chunks_of(targets)
    ids = torch.zeros(logits.shape[:2], dtype=torch.int64)
    teacher = torch.zeros(*logits.shape[:2], V)

    def loss(student: Tensor | VocabShard) -> Tensor:
        inputs = LossInputs(
            student, teacher, chunks, student_ids=ids, teacher_ids=ids, targets=batch
        )
        return exact_kl(inputs, pair(), LossOptions(block_size=3)).loss

    whole = loss(logits)
    (gradient,) = torch.autograd.grad(whole, logits)
    for cut in (3, 8):
        part = slice(0, cut) if rank == 0 else slice(cut, logits.shape[-1])
        local = logits.detach()[..., part].clone().requires_grad_()
        found = loss(VocabShard(local))
        torch.testing.assert_close(found, whole)
        (mine,) = torch.autograd.grad(found, local)
        torch.testing.assert_close(mine, gradient[..., part])


def test_a_sharded_vocabulary_gives_the_same_loss_and_gradient() -> None:
    on_two_processes(vocabulary_parallel)
