"""What kernels are launched with: rows in memory, the gradient's buffer, the engine's answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xtoken.losses.engine.merge import ChunkRows
from xtoken.losses.engine.row_blocks import Later
from xtoken.losses.engine.shared_gradient import CrossEntropyRows
from xtoken.losses.engine.student_rows import LogitRows, StudentRows
from xtoken.losses.kernels.choice import on_device_of
from xtoken.losses.kernels.scaling import scale_in_place

# Columns that a program works on at a time, and that one program reads in all.
BLOCK = 1024
SPAN = 8 * BLOCK
# Numbers of scratch that a launch may take.
SCRATCH = 2**25

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
        joined: [n] targets, [n] log-sum-exps and the factor of the cross-entropy that the kernel
            writes with its own gradient, see `CrossEntropyRows`; None for none.
    """

    flat: Tensor
    rows: Tensor
    adds: bool
    joined: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def of(
        cls,
        source: LogitRows,
        index: Tensor,
        grads: list[Tensor | None] | None,
        beside: CrossEntropyRows | None = None,
    ) -> GradientBuffer:
        """The engine's buffer, or a new one: zeros where no row of `index` is, or what `beside`
        says there.

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
        if beside is not None:
            write_cross_entropy(source, beside, cls(flat, beside.index * width, False), touched)
            touched.index_fill_(0, beside.index, 1)
        if len(flat):
            clear_rows[(len(flat), cdiv(width, SPAN))](flat, touched, width, SPAN=SPAN, BLOCK=BLOCK)
        if beside is None:
            return cls(flat, index * width, False)
        targets = torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
        logs = torch.full((len(flat),), torch.inf, device=flat.device)
        targets.index_copy_(0, beside.index, beside.targets)
        logs.index_copy_(0, beside.index, beside.logs)
        joined = (targets[index], logs[index], beside.factor.reshape(1))
        return cls(flat, index * width, False, joined)

    @property
    def cross_entropy(self) -> tuple[Tensor, Tensor, Tensor]:
        """`joined`, or in its place what no kernel reads."""
        return (self.rows, self.flat, self.flat) if self.joined is None else self.joined

    @classmethod
    def made(cls, grad: Tensor, index: Tensor) -> GradientBuffer:
        """Rows `index` of a gradient that holds something already."""
        width = grad.shape[-1]
        return cls(grad.view(-1, width), index * width, True)

    def part(self, start: int, stop: int) -> GradientBuffer:
        """That of rows [start, stop)."""
        joined = self.joined
        if joined is not None:
            joined = (joined[0][start:stop], joined[1][start:stop], joined[2])
        return GradientBuffer(self.flat, self.rows[start:stop], self.adds, joined)


def write_cross_entropy(
    source: LogitRows,
    entropy: CrossEntropyRows,
    gradient: GradientBuffer,
    written: Tensor | None = None,
) -> Tensor:
    """Write or add the gradient of a cross-entropy, but in the rows [B * T_s] int8 that another
    loss has `written`; returns what is finite where all of it is."""
    from xtoken.losses.kernels.device.cross_entropy import gradient as write

    z, width = Rows.of(source.logits, entropy.index), gradient.flat.shape[1]
    count, blocks = len(z), cdiv(width, BLOCK)
    checks = torch.zeros((count, blocks), device=z.tensor.device)
    skipped = entropy.index if written is None else written[entropy.index]
    if count:
        write[(count, blocks)](
            z.tensor, z.offsets, z.step, entropy.targets, entropy.logs, entropy.factor.reshape(1),
            skipped, gradient.flat, gradient.rows, checks, source.vocab_size, width,
            SKIPS=written is not None, ADDS=gradient.adds, BLOCK=BLOCK,
        )  # fmt: skip
    return checks


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
    return own, times(own, scale)


def times(own: Tensor, scale: float | Tensor) -> Tensor:
    """[count] float32 times a number or a scalar tensor of another dtype."""
    return own * (scale.to(own) if isinstance(scale, Tensor) else scale)


@dataclass(frozen=True, eq=False)
class Compared:
    """What a pass knows before its gradient is written.

    Attributes:
        index: [n] the student's rows.
        total: scalar, the sum of weighted losses.
        sums: of the metrics.
        write: writes the gradient of `total` times the scale given, and returns what is finite
            where all of it is.
        params: how many further tensors the loss has, which get no gradient.
    """

    source: LogitRows
    index: Tensor
    total: Tensor
    sums: Sequence[Tensor]
    write: Callable[[float | Tensor, GradientBuffer], Tensor]
    params: int = 0

    def at_once(
        self, scale: float | Tensor, needed: tuple[bool, ...], grads: list[Tensor | None] | None
    ) -> Found:
        """The whole pass."""
        gradient, checks = None, None
        if any(needed):
            gradient = GradientBuffer.of(self.source, self.index, grads)
            checks = self.write(scale, gradient)
        return found(self.source, self.total, scale, self.sums, gradient, checks, self.params)

    def in_two(self, scale: float | Tensor) -> tuple[Tensor, Tensor, Later]:
        """The value, and the gradient when its factor is known, see `BlockLoss.in_two`."""

        def later(factor: Tensor, beside: CrossEntropyRows | None) -> Tensor:
            with on_device_of(self.source.logits):
                gradient = GradientBuffer.of(self.source, self.index, None, beside)
                checks = self.write(factor, gradient)
                made = gradient.flat.view(self.source.logits.shape)
                # The loss was told before: what is not finite must be seen in the gradient.
                good = torch.isfinite(checks.sum())
                scale_in_place(made, torch.where(good, 1.0, torch.nan))
            return made

        return *found(self.source, self.total, scale, self.sums, None, None)[:2], later


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
