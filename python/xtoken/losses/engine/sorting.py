"""L1 distance of two rows of probabilities, each sorted by falling value: ULD's measure.

sum_i |p_(i) - q_(i)|, the shorter side padded with zeros (arXiv 2402.12030). Its gradient in p is
the sign of each difference, sent back to where the value came from; 0 at equality.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from xtoken import _core
from xtoken.tensors.host import readable


def top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[R, n] to values and int64 places [R, k], in no order; k above n takes all.

    On the CPU numpy's vectorized partition takes 0.15 ms where torch.topk takes 0.8 (8,192 of
    110,000 float32); it orders NaN last, that is among the largest, as torch does.
    """
    size = values.shape[1]
    if k >= size:
        places = torch.arange(size, device=values.device).expand(values.shape[0], -1)
        return values, places
    if not readable(values) or values.numel() == 0:
        return torch.topk(values, k, sorted=False)
    order = np.argpartition(values.detach().numpy(), size - k, axis=1)[:, size - k :]
    places = torch.from_numpy(np.ascontiguousarray(order))
    return values.gather(1, places), places


def sorted_l1(student_probs: Tensor, teacher_probs: Tensor) -> Tensor:
    """[R, n] and [R, m] probabilities, >= 0, to [R]; differentiable in the student's."""
    if torch.compiler.is_compiling():
        student = torch.sort(student_probs, -1, descending=True).values
        return _l1(student, torch.sort(teacher_probs, -1, descending=True).values)
    result: Tensor = _SortedL1.apply(student_probs, teacher_probs)
    return result


class _SortedL1(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_probs: Tensor, teacher_probs: Tensor) -> Tensor:
        student, teacher = student_probs.detach(), teacher_probs.detach()
        needed = bool(ctx.needs_input_grad[0])
        by_core = student.numel() and teacher.numel() and _packable(student) and _packable(teacher)
        distance, signs = (_by_core if by_core else _by_sorting)(student, teacher, needed)
        if signs is not None:
            ctx.save_for_backward(signs)
        return distance

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (signs,) = ctx.saved_tensors
        return signs * grad[:, None], None


def _by_core(student: Tensor, teacher: Tensor, needed: bool) -> tuple[Tensor, Tensor | None]:
    """`_by_sorting` without sorting: a tenth of the time of 262,144 columns."""
    # numpy's large pages cost less at the first touch.
    signs = torch.from_numpy(np.empty(student.shape, np.float32)) if needed else None
    distances = _core.sorted_l1(
        student.contiguous().numpy(),
        teacher.contiguous().numpy(),
        signs=None if signs is None else signs.numpy(),
        threads=torch.get_num_threads(),
    )
    distance = torch.from_numpy(distances).to(student.dtype)
    left = np.flatnonzero(np.isnan(distances))
    if len(left):  # what is no probability
        rows = torch.from_numpy(left)
        distance[rows], others = _by_sorting(student[rows], teacher[rows], needed)
        if signs is not None and others is not None:
            signs[rows] = others
    return distance, signs


def _by_sorting(student: Tensor, teacher: Tensor, needed: bool) -> tuple[Tensor, Tensor | None]:
    """[R] distances, and [R, n] the signs where they are needed."""
    falling = _sorted(teacher)
    if not needed:
        return _l1(_sorted(student), falling), None
    values, order = _sorted_with_order(student)
    signs = torch.sign(values)  # unmatched values face zeros
    width = min(values.shape[1], falling.shape[1])
    signs[:, :width] = torch.sign(values[:, :width] - falling[:, :width])
    return _l1(values, falling), torch.empty_like(values).scatter_(1, order, signs)


def _l1(student: Tensor, teacher: Tensor) -> Tensor:
    width = min(student.shape[1], teacher.shape[1])
    rest = student[:, width:].sum(1) + teacher[:, width:].sum(1)
    return (student[:, :width] - teacher[:, :width]).abs().sum(1) + rest


def _packable(values: Tensor) -> bool:
    return readable(values) and values.dtype == torch.float32


def _sorted(values: Tensor) -> Tensor:
    """Each row by falling value. numpy's vectorized sort is 25 times faster than torch's here."""
    if _packable(values):
        return torch.from_numpy(np.sort(-values.numpy(), axis=1)).neg_()
    return torch.sort(values, -1, descending=True).values


def _sorted_with_order(values: Tensor) -> tuple[Tensor, Tensor]:
    """Each row by falling value, and where each value came from; ties to the lowest index.

    On the CPU the bits of a float >= 0 order as an integer, so that value and index are sorted as
    one int64: 13 times faster than a stable sort of values with indices, and as deterministic.
    """
    if not _packable(values):
        result = torch.sort(values, dim=-1, descending=True, stable=True)
        return result.values, result.indices
    bits = values.contiguous().view(torch.int32)
    index = torch.arange(values.shape[1], dtype=torch.int64, device=values.device)
    packed = bits.to(torch.int64).neg_().bitwise_left_shift_(32).bitwise_or_(index)
    packed.numpy().sort(axis=1)  # in place, in the tensor's own memory
    found = (packed >> 32).neg_().to(torch.int32).view(torch.float32)
    return found, packed & 0xFFFFFFFF
