"""What kernels are launched with: rows in memory, the gradient's buffer, the engine's answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xtoken.losses.engine.merge import ChunkRows
from xtoken.losses.engine.student_rows import LogitRows, StudentRows

# Columns that a program works on at a time, and that one program reads in all.
BLOCK = 1024
SPAN = 8 * BLOCK

# Loss, metric sums with the check of the gradient, gradients: as the engine's own pass.
Found = tuple[Tensor, Tensor, list[Tensor | None]]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of logits [B, T, V'] where they lie, whatever their strides.

    Attributes:
        tensor: what they are read from.
        offsets: [n] int64, where each row begins.
        step: from column to column.
    """

    tensor: Tensor
    offsets: Tensor
    step: int

    @classmethod
    def of(cls, tensor: Tensor, index: Tensor) -> Rows:
        """Those at flattened positions `index` [n] int64."""
        length, (batch_step, row_step, step) = tensor.shape[1], tensor.stride()
        sample = torch.div(index, length, rounding_mode="floor")
        offsets = sample * batch_step + (index - sample * length) * row_step
        return cls(tensor.detach(), offsets, step)

    def part(self, start: int, stop: int) -> Rows:
        """Rows [start, stop)."""
        return Rows(self.tensor, self.offsets[start:stop], self.step)

    def __len__(self) -> int:
        return self.offsets.shape[0]


@dataclass(frozen=True, eq=False)
class GradientBuffer:
    """Where the gradient of the student's logits goes: [B * T_s, V_s'], contiguous.

    Attributes:
        flat: the buffer.
        rows: [n] int64, where each row of it begins.
        adds: whether it holds something already, to which the kernel adds.
    """

    flat: Tensor
    rows: Tensor
    adds: bool

    @classmethod
    def of(
        cls, source: LogitRows, index: Tensor, grads: list[Tensor | None] | None
    ) -> GradientBuffer:
        """The engine's buffer, or a new one: zeros where no row of `index` is.

        A row is in `index` once.
        """
        width = source.logits.shape[-1]
        if grads is not None:
            assert grads[0] is not None
            return cls(grads[0].view(-1, width), index * width, True)
        flat = torch.empty(
            (source.logits[..., 0].numel(), width),
            dtype=source.logits.dtype, device=source.logits.device,
        )  # fmt: skip
        from xtoken.losses.kernels.device.common import clear_rows

        touched = torch.zeros(len(flat), dtype=torch.int8, device=flat.device)
        touched.index_fill_(0, index, 1)  # a number put at an index would wait for the device
        if len(flat):
            clear_rows[(len(flat), cdiv(width, BLOCK))](flat, touched, width, BLOCK=BLOCK)
        return cls(flat, index * width, False)

    @classmethod
    def made(cls, grad: Tensor, index: Tensor) -> GradientBuffer:
        """Rows `index` of a gradient that holds something already."""
        width = grad.shape[-1]
        return cls(grad.view(-1, width), index * width, True)

    def part(self, start: int, stop: int) -> GradientBuffer:
        """That of rows [start, stop)."""
        return GradientBuffer(self.flat, self.rows[start:stop], self.adds)


def one_row_each(student: ChunkRows, source: StudentRows) -> LogitRows | None:
    """The source, where every chunk has one row of plain logits that kernels can read."""
    if student.owner is None and student.count and isinstance(source, LogitRows):
        return source
    return None


def seeds(
    count: int, weights: Tensor | None, scale: float | Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """[count] float32: the factor of each row's loss, and that times `scale`."""
    own = torch.ones(count, device=device)
    if weights is not None:
        own = weights.to(torch.float32)
    if isinstance(scale, Tensor):
        scale = scale.to(device, torch.float32)
    return own, own * scale


def found(
    source: LogitRows,
    total: Tensor,
    scale: float | Tensor,
    sums: Sequence[Tensor],
    gradient: GradientBuffer | None,
    checks: Tensor | None,
    params: int = 0,
) -> Found:
    """The answer of a pass.

    Args:
        total: scalar, the sum of weighted losses.
        sums: of the metrics.
        checks: finite where all of the gradient is; None without one.
        params: how many further tensors, which have no gradient.
    """
    slope = total.new_zeros(()) if checks is None else checks.sum()
    grad = None if gradient is None else gradient.flat.view(source.logits.shape)
    return total * scale, torch.stack([*sums, slope]), [grad, *(None for _ in range(params))]


def padded(number: int) -> int:
    """The power of two that holds it."""
    return 1 << max(number - 1, 0).bit_length()


def floats(like: Tensor, *shape: int) -> Tensor:
    """Uninitialized float32 beside `like`."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def cdiv(number: int, by: int) -> int:
    """The quotient rounded up."""
    return -(-number // by)
