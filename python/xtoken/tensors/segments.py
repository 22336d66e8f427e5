"""Ragged rows: offsets, indices and sums of segments of different lengths."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xtoken.tensors.once import once_differentiable


def offsets_of(counts: Tensor) -> Tensor:
    """[n] counts to [n + 1] offsets: 0, then the running sums."""
    return F.pad(counts.cumsum(0), (1, 0))


def counts_of(segments: Tensor, count: int) -> Tensor:
    """[count] int64, how often each of 0..count - 1 is in `segments`; unlike `bincount`, without
    waiting for a device."""
    return segments.new_zeros(count).index_add(0, segments, torch.ones_like(segments))


def owners(sizes: Tensor, total: int | None = None) -> Tensor:
    """`sizes[i]` times i, for all i; int64. With their `total` nothing waits for a device."""
    every = torch.arange(len(sizes), device=sizes.device)
    return torch.repeat_interleave(every, sizes, output_size=total)


def ragged_arange(starts: Tensor, sizes: Tensor, total: int | None = None) -> Tensor:
    """Concatenate `range(starts[i], starts[i] + sizes[i])` for all i; int64 in, int64 out.

    Args:
        total: the sum of the sizes, where it is known; then nothing waits for a device.
    """
    owner = owners(sizes, total)
    inner = torch.arange(owner.shape[0], device=sizes.device) - (sizes.cumsum(0) - sizes)[owner]
    return starts[owner] + inner


def segment_logsumexp(values: Tensor, segment: Tensor, count: int) -> Tensor:
    """[..., count] log of the sum of exp(values [..., K]) by segment [K] int64; -inf for none."""
    if torch.compiler.is_compiling():
        return _log(*_sums(values, segment, count)[1:])
    result: Tensor = _LogSumExp.apply(values, segment, count)
    return result


def _sums(values: Tensor, segment: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """exp(values - shift) and its sums by segment, with the shift [..., count] of each."""
    top = values.new_full((*values.shape[:-1], count), -torch.inf)
    top = top.scatter_reduce(-1, segment.expand_as(values), values.detach(), "amax")
    shift = torch.where(torch.isneginf(top), torch.zeros_like(top), top)
    exps = torch.exp(values - shift.index_select(-1, segment))
    return exps, torch.zeros_like(top).index_add(-1, segment, exps), shift


def _log(sums: Tensor, shift: Tensor) -> Tensor:
    return torch.log(sums) + shift


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, segment: Tensor, count: int) -> Tensor:
        exps, sums, shift = _sums(values, segment, count)
        ctx.save_for_backward(exps, sums, segment)
        return _log(sums, shift)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        exps, sums, segment = ctx.saved_tensors
        # An empty segment passes nothing on: 0 / 0 there is no gradient.
        share = torch.where(sums > 0, grad / sums, torch.zeros_like(sums))
        return exps * share.index_select(-1, segment), None, None
