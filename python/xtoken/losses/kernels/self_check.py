"""Each kernel against the torch path, on a small batch, where it runs for the first time.

Users' worst experience with kernels is silence: a compiler or a card that computes something else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from xtoken.losses.engine.merge import ChunkRows
from xtoken.losses.engine.row_blocks import BlockLoss, run_blocks
from xtoken.losses.engine.student_rows import LogitRows
from xtoken.losses.engine.teacher_rows import TeacherRows
from xtoken.losses.kernels.choice import forced
from xtoken.tensors.target_batch import TargetBatch

# Wider than a block, and no multiple of anything.
_SIZE, _PADDED, _ROWS = 1531, 1537, 5
_SCALE = 0.25


def same_vocab(device: torch.device, student: torch.dtype, teacher: torch.dtype) -> str | None:
    """See `choice.Check`."""
    from xtoken.losses.same_vocab_kl import SameVocabBlocks

    source, signal = some_logits(student, device, 0), some_logits(teacher, device, 1)
    rows = some_rows(device)
    loss = SameVocabBlocks(
        student=rows,
        teacher=TeacherRows(signal, rows, _SIZE, 1.5),
        top_k=None,
        by_student=False,
        tail_bucket=False,
        full_metrics=False,
        temperature=1.5,
        direction="forward",
        beta=0.5,
    )
    return difference(lambda: loss, source)


def exact(device: torch.device, student: torch.dtype, teacher: torch.dtype) -> str | None:
    """See `choice.Check`."""
    from xtoken.losses.exact_kl.block import ExactKLBlocks

    generator = torch.Generator().manual_seed(2)
    order = [torch.randperm(_SIZE, generator=generator) for _ in range(_ROWS)]
    # Groups of 0, 1, 40 and 700 tokens; one position without any.
    sizes = torch.tensor([0, 1, 40, 700] * (_ROWS - 1))
    probs = 0.2 * torch.rand(len(sizes), generator=generator, dtype=torch.float64)
    probs[sizes == 0] = 0.0
    open_ = torch.tensor([True] + [False] * (_ROWS - 1))
    ptr = torch.arange(_ROWS + 1).clamp(max=_ROWS - 1) * 4
    targets = TargetBatch(
        torch.tensor([3, 0, 5, 1, 4]),
        torch.tensor([0, 2, 2, _ROWS]),
        torch.where(open_, 0.0, 1.0) - torch.where(open_, 0.0, _sums(probs, ptr)),
        open_,
        ptr,
        probs,
        torch.arange(len(sizes)) % 3,
        torch.nn.functional.pad(sizes.cumsum(0), (1, 0)),
        torch.cat([each[:741] for each in order[:-1]]),
    )
    loss = ExactKLBlocks(targets=targets.to(device))
    return difference(lambda: loss, some_logits(student, device, 0))


def _sums(values: Tensor, ptr: Tensor) -> Tensor:
    return torch.stack([values[a:b].sum() for a, b in itertools.pairwise(ptr.tolist())])


def some_logits(dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """[1, rows + 1, V'] random logits, some of them -inf, made on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(1, _ROWS + 1, _PADDED, generator=generator)
    if seed == 1:  # a teacher's alone: else the loss is infinite
        logits[torch.rand(logits.shape, generator=generator) < 0.1] = -torch.inf
    return logits.to(device, dtype)


def some_rows(device: torch.device) -> ChunkRows:
    """All rows but one, in no order."""
    index = torch.tensor([3, 0, 5, 1, 4], device=device)
    return ChunkRows(index, None, len(index))


def difference(make: Callable[[], BlockLoss], logits: Tensor) -> str | None:
    """What the kernel has otherwise than torch, of a loss of these logits; None for nothing."""
    source = LogitRows(logits, _SIZE)
    results = []
    for mode in ("torch", "triton"):
        with forced(mode), torch.no_grad():
            total, sums, grads = run_blocks(make(), source, _SCALE, 64, (True,))
        assert grads[0] is not None
        results.append((total, sums[:-1], grads[0].float()))
    (value, metrics, grad), (other, other_metrics, other_grad) = results
    for name, one, two, tolerance in (
        ("the loss", value, other, 1e-3),
        ("a metric", metrics, other_metrics, 1e-3),
        ("the gradient", grad, other_grad, 4 * torch.finfo(logits.dtype).eps + 1e-3),
    ):
        apart = (one - two).abs().amax() / one.abs().amax().clamp(min=1e-6)
        if not bool(apart <= tolerance):  # NaN is none
            return f"{name} is off by {float(apart):.2g} of its largest value"
    return None
