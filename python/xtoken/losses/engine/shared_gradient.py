"""One gradient of the logits for several losses of them.

Each loss would make a gradient as large as the logits, and autograd would add them. Losses of a
`SharedLogits` write into one buffer: the first of them with its value, the others, such as the
cross-entropy, when backward says with which factor. So the buffer serves a weight too that is known
only after all values.

Where a kernel computes the first, it too waits for backward, and writes the cross-entropy's
gradient of a row with its own: then every factor is known and each row is written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xtoken.losses.kernels.scaling import scale_in_place
from xtoken.tensors.host import readable
from xtoken.tensors.once import once_differentiable


@dataclass(frozen=True, eq=False)
class CrossEntropyRows:
    """What the gradient of a cross-entropy is made from: `factor` (softmax less 1 at the target).

    Attributes:
        index, targets: [N] int64, the flattened positions, each once, and their tokens.
        logs: [N] float32, the log-sum-exp of each row; inf where it does not count.
        factor: scalar float32.
    """

    index: Tensor
    targets: Tensor
    logs: Tensor
    factor: Tensor


# Makes the buffer of the first loss, with a cross-entropy's gradient in it.
WriteFirst = Callable[[CrossEntropyRows | None], Tensor]
Write = Callable[[Tensor], None]


@dataclass(eq=False)
class SharedGradient:
    """The buffer and what is still to be added to it.

    What one run of autograd has told and not collected, as that run was of W's weights alone, is
    none of the next run's.

    Attributes:
        early: the gradient of the first loss, made with its value; None once it is given away.
        taken: whether some loss is the first.
    """

    early: Tensor | None = None
    taken: bool = False
    _factor: Tensor | None = None
    _first: tuple[WriteFirst, int] | None = None
    _joined: list[tuple[CrossEntropyRows, int, int, Write]] = field(default_factory=list)
    _late: list[tuple[int, Write]] = field(default_factory=list)
    _run: int = -1

    def scale_early(self, factor: Tensor) -> None:
        """The first loss's gradient counts, times `factor`."""
        self._begin()
        self._factor = factor

    def write_first(self, write: WriteFirst, size: int) -> None:
        """The first loss, of the first `size` columns, makes the buffer, in place of `early`."""
        self._begin()
        self._first = write, size

    def join(self, rows: CrossEntropyRows, size: int, order: int, write: Write) -> None:
        """The first loss may write this with its own, where it is of as many columns; where it does
        not, `write` adds it."""
        self._begin()
        self._joined.append((rows, size, order, write))

    def add_late(self, order: int, write: Write) -> None:
        """`write` adds to the buffer, after those of a lower order."""
        self._begin()
        self._late.append((order, write))

    def collect(self, like: Tensor) -> Tensor:
        """The whole gradient of the losses that backward has reached."""
        self._begin()
        buffer, factor, late = self.early, self._factor, self._late
        first, joined = self._first, self._joined
        self.early = None
        self._forget()
        if first is not None:
            write_first, size = first
            beside = next((each for each in joined if each[1] == size), None)
            buffer = write_first(None if beside is None else beside[0])
            joined = [each for each in joined if each is not beside]
        elif buffer is None:
            buffer = torch.zeros_like(like, memory_format=torch.contiguous_format)
        elif factor is None:
            buffer.zero_()
        elif not readable(factor) or float(factor) != 1.0:
            scale_in_place(buffer, factor)
        late += [(order, write) for _, _, order, write in joined]
        for _, write in sorted(late, key=lambda entry: entry[0]):
            write(buffer)
        return buffer

    def _begin(self) -> None:
        """Forget what another run of autograd has left."""
        run = torch._C._current_graph_task_id()
        if run != self._run:
            self._forget()
            self._run = run

    def _forget(self) -> None:
        self._factor, self._late, self._first, self._joined = None, [], None, []


@dataclass(frozen=True, eq=False)
class SharedLogits:
    """Logits [B, T_s, V_s'] of which several losses make one gradient."""

    logits: Tensor
    gradient: SharedGradient

    @classmethod
    def of(cls, logits: Tensor) -> SharedLogits:
        """For the losses of one step; the tensor has a graph that leads to `logits`."""
        gradient = SharedGradient()
        shared: Tensor = _Collect.apply(logits, gradient)
        return cls(shared, gradient)


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, gradient: SharedGradient) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradient = gradient
        ctx.save_for_backward(logits)
        return logits.view_as(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        found = ctx.gradient.collect(logits)
        return found if grad is None else found + grad, None
