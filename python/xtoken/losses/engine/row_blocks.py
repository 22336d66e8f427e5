"""The row-block engine: every loss is a sum over chunks, made a few chunks at a time.

The gradient of a block is taken as soon as its value is known, so what autograd keeps is one block
and never the batch: beside the logits, memory holds their gradient and a block. A `BlockLoss` is a
plain differentiable function of a block of rows; a kernel may replace the pass (`by_kernel`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xtoken.errors import OptionError
from xtoken.losses.engine.held import Held
from xtoken.losses.engine.merge import ChunkRows
from xtoken.losses.engine.places import Places
from xtoken.losses.engine.shared_gradient import CrossEntropyRows
from xtoken.losses.engine.student_rows import StudentRows
from xtoken.losses.engine.vocab_shard import ShardRows
from xtoken.losses.kernels.scaling import scale_in_place
from xtoken.losses.output import LossOutput, inverse_normalizer
from xtoken.tensors.host import readable
from xtoken.tensors.once import once_differentiable
from xtoken.tensors.rows import upcast_dtype

# The gradient of the logits, made when its factor is known, and in the same write what a
# cross-entropy adds to it.
Later = Callable[[Tensor, CrossEntropyRows | None], Tensor]


@dataclass(eq=False)
class Block:
    """Chunks [start, stop), with each student row's chunk counted from `start` (None: its own).

    `real` [len] bool are those that count, where some only fill the block up; None for all.
    """

    start: int
    stop: int
    segments: Tensor | None
    real: Tensor | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    def sum(self, values: Tensor) -> Tensor:
        """The sum of [len] values over the chunks that count."""
        return values.sum() if self.real is None else torch.where(self.real, values, 0).sum()

    def alone(self) -> Block:
        """The same, of rows one a chunk."""
        return Block(self.start, self.stop, None, self.real)


class BlockLoss:
    """One loss over a block of chunks. Subclasses set the attributes and write `forward`.

    Attributes:
        student: the rows each chunk reads.
        columns: [K] int64 student columns read, None for all.
        params: further differentiable tensors, such as learnable weights of W.
        weights: [C] float, a factor on each chunk's loss (not on metrics), None for 1.
        metric_names: what the second result of `forward` holds.
        late: where several losses share a gradient, this one adds to it in backward.
        params_of_any_length: places of the params whose length is another in every batch.
        has_items: whether a block has items of its own beside its rows, in any number.
        has_closed_form: whether `value_and_grad` is its own and needs no autograd.
    """

    student: ChunkRows
    columns: Tensor | None = None
    params: tuple[Tensor, ...] = ()
    weights: Tensor | None = None
    metric_names: tuple[str, ...] = ()
    late: bool = False
    params_of_any_length: tuple[int, ...] = ()
    has_items: bool = False
    has_closed_form: bool = False

    def narrowed(self, places: Places) -> BlockLoss:
        """The same loss of these chunks alone, in tensors of constant shapes; for `compiled`."""
        raise OptionError(
            f"compiled = True with {type(self).__name__}, which has no `narrowed`; write it, or "
            "pass compiled=False"
        )

    def forward(
        self, rows: Tensor, block: Block, params: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """[n, V_s] rows to the loss of each chunk [len(block)] and metric sums [M] (detached)."""
        raise NotImplementedError

    def total(self, rows: Tensor, block: Block, params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """`forward` with its losses weighted and summed."""
        losses, metrics = self.forward(rows, block, params)
        if self.weights is not None:
            losses = losses * self.weights[block.start : block.stop].to(losses.dtype)
        return block.sum(losses), metrics

    def value(self, rows: Tensor, block: Block, params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Loss sum and metric sums where no gradient is wanted: the value of `value_and_grad`."""
        return self.total(rows, block, params)

    def by_kernel(
        self,
        source: StudentRows,
        scale: float | Tensor,
        needed: tuple[bool, ...],
        grads: list[Tensor | None] | None,
    ) -> tuple[Tensor, Tensor, list[Tensor | None]] | None:
        """`run_blocks` of all chunks at once by a kernel; None where torch computes them."""
        return None

    def in_two(
        self, source: StudentRows, scale: float | Tensor
    ) -> tuple[Tensor, Tensor, Later] | None:
        """`run_blocks` by a kernel that waits with the gradient of the logits until backward; None
        where there is no such kernel."""
        return None

    def cross_entropy_rows(self, factor: Tensor) -> CrossEntropyRows | None:
        """What another loss's kernel needs to write this one's gradient too; None where it is no
        cross-entropy or no kernel computed it."""
        return None

    def in_torch(self) -> BlockLoss:
        """What torch computes: the loss with all that no kernel needs; of the same metrics."""
        return self

    def value_and_grad(
        self,
        rows: Tensor,
        block: Block,
        params: Sequence[Tensor],
        needed: Sequence[bool],
        scale: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
        """Loss sum, metric sums, `scale` times the gradient of `rows` and of each needed param."""
        with torch.enable_grad():
            rows = rows.detach().requires_grad_()
            leaves = [p.detach().requires_grad_(n) for p, n in zip(params, needed, strict=True)]
            total, metrics = self.total(rows, block, leaves)
            wanted = [rows, *(leaf for leaf in leaves if leaf.requires_grad)]
            seed = seed_like(total, scale)
            found = iter(torch.autograd.grad(total, wanted, seed, materialize_grads=True))
        grad_rows = next(found)
        grad_params = [next(found) if leaf.requires_grad else None for leaf in leaves]
        return total.detach(), metrics, grad_rows, grad_params


def seed_like(total: Tensor, scale: float | Tensor) -> Tensor:
    """The factor of a gradient as a scalar beside `total`, without a copy from the host."""
    if isinstance(scale, Tensor):
        return scale.to(total)
    return torch.full_like(total, scale)


def sum_over_chunks(
    loss: BlockLoss,
    source: StudentRows,
    scale: float | Tensor,
    rows_per_block: int,
    held: Held,
) -> tuple[Tensor, Tensor]:
    """`scale` times the sum of the loss over all chunks; and, detached, the metric sums with one
    more, which is finite where all of the gradient is: [M + 1]."""
    # Half precision is raised to float32 by the sources; autocast must not lower it again.
    with torch.autocast(source.tensors()[0].device.type, enabled=False):
        total, metrics = _RowBlocks.apply(
            loss, source, scale, rows_per_block, torch.is_grad_enabled(), held,
            *source.tensors(), *loss.params,
        )  # fmt: skip
    return total, metrics


def reduce_chunks(
    loss: BlockLoss,
    source: StudentRows,
    *,
    rows_per_block: int,
    normalizer: float | Tensor | None,
    weights: Tensor | None,
    held: Held,
    count: Tensor | None = None,
) -> tuple[LossOutput, Tensor]:
    """Sum a loss over its chunks, divided by the normalizer, with its metrics as means.

    Args:
        weights: [C] a factor on each chunk's loss.
        held: the caller's tensors that the loss reads, beside the source's and the weights.
        count: scalar, the chunks counted, where they are not all.

    Returns: the output, and a detached scalar that is finite where all of the gradient is.
    """
    device = source.tensors()[0].device
    if count is None:
        count = torch.full((), loss.student.count, device=device)
        shared: float | Tensor = max(loss.student.count, 1)
    else:
        shared = count.clamp(min=1)
    loss.weights = None if weights is None else weights.detach()
    scale = inverse_normalizer(shared if normalizer is None else normalizer)
    total, sums = sum_over_chunks(loss, source, scale, rows_per_block, held)
    *means, slope = (sums / shared).unbind()
    metrics = dict(zip(loss.metric_names, means, strict=True))
    return LossOutput(total, count, metrics), slope


class _RowBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        loss: BlockLoss,
        source: StudentRows,
        scale: float | Tensor,
        rows_per_block: int,
        wanted: bool,
        held: Held,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        # Under no_grad too a tensor says that it needs a gradient.
        needed = tuple(wanted and need for need in ctx.needs_input_grad[6:])
        ctx.held, ctx.write = held, None
        # A float16 gradient underflows unless it is made with the factor that a GradScaler puts
        # before it, which only backward knows.
        later = any(tensor.dtype == torch.float16 for tensor in tensors)
        shared = source.shared if any(needed) else None
        if shared is not None and not (loss.late or shared.taken or any(needed[1:])):
            found = loss.in_two(source, scale)
            if found is not None:
                total, metrics, ctx.write = found
                shared.taken, ctx.early, ctx.grads = True, False, None
                ctx.call = (loss, source, scale, rows_per_block, needed)
                ctx.save_for_backward(*tensors)
                ctx.mark_non_differentiable(metrics)
                return total, metrics
        # The buffer holds one gradient to be scaled in backward; the others are added there.
        later = later or (shared is not None and (loss.late or shared.taken))
        now = (False,) * len(needed) if later else needed
        total, metrics, grads = run_blocks(loss, source, scale, rows_per_block, now)
        ctx.call = (loss, source, scale, rows_per_block, needed)
        ctx.early = shared is not None and not later
        if shared is not None and not later:
            shared.taken, shared.early, grads = True, grads[0], [None, *grads[1:]]
        ctx.grads = None if later else grads
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(metrics)
        return total, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _metrics: Tensor) -> tuple[Any, ...]:
        loss, source, scale, rows_per_block, needed = ctx.call
        tensors = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        if source.shared is not None and any(needed):
            found = _into_shared(ctx, tensors[0], grads, grad_total)
            return (None, None, None, None, None, None, *found)
        if grads is None:  # float16, or a second backward: the first gave its buffer away
            ctx.held.check()
            source = source.with_tensors(tensors[: len(source.tensors())])
            with torch.autocast(tensors[0].device.type, enabled=False):
                grads = run_blocks(loss, source, scale * grad_total, rows_per_block, needed)[2]
            return (None, None, None, None, None, None, *grads)
        # On the CPU a look at the factor is free and saves a pass over the gradient.
        if not readable(grad_total) or float(grad_total) != 1.0:
            for grad in grads:
                if grad is not None:
                    scale_in_place(grad, grad_total)
        return (None, None, None, None, None, None, *grads)


def _into_shared(
    ctx: Any, logits: Tensor, grads: list[Tensor | None] | None, grad_total: Tensor
) -> list[Tensor | None]:
    """Tell the shared buffer what this loss adds; the gradients of the params, none of the logits'.

    Without params the loss runs once more when the buffer is collected; with them now, as they are
    wanted now.
    """
    loss, source, scale, rows_per_block, needed = ctx.call
    shared = source.shared
    # Where another loss was differentiated before, alone, the buffer is gone with its gradient.
    if grads is not None and not (ctx.early and shared.early is None):
        if ctx.early:
            shared.scale_early(grad_total)
        return [None if grad is None else grad.mul_(grad_total.to(grad.dtype)) for grad in grads]
    ctx.held.check()
    factor = scale * grad_total
    if ctx.write is not None:
        made, ctx.write = ctx.write, None
        shared.write_first(partial(made, factor), source.vocab_size)
        return [None for _ in needed]
    source = source.with_tensors((logits,))

    def write(buffer: Tensor) -> None:
        only = (True, *(False for _ in loss.params))
        with torch.no_grad(), torch.autocast(buffer.device.type, enabled=False):
            run_blocks(loss, source, factor, rows_per_block, only, [buffer])

    rows = loss.cross_entropy_rows(factor)
    if needed[0] and rows is not None:
        shared.join(rows, source.vocab_size, int(loss.late), write)
    elif needed[0]:
        shared.add_late(int(loss.late), write)
    params: list[Tensor | None] = [None for _ in loss.params]
    if any(needed[1:]):
        with torch.autocast(logits.device.type, enabled=False):
            params = run_blocks(loss, source, factor, rows_per_block, (False, *needed[1:]))[2][1:]
    return [None, *params]


def run_blocks(
    loss: BlockLoss,
    source: StudentRows,
    scale: float | Tensor,
    rows_per_block: int,
    needed: tuple[bool, ...],
    grads: list[Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """One pass over the blocks: scaled loss, metric sums, scaled gradients (None: not needed).

    Args:
        grads: of the source's tensors, to be added to; None makes new ones.
    """
    found = loss.by_kernel(source, scale, needed, grads)
    if found is not None:
        return found
    loss = loss.in_torch()
    split = len(source.tensors())
    if grads is None and not any(needed[:split]):
        grads = [None] * split
    elif grads is None:
        grads = source.new_grads(needed[:split])
    param_grads = [
        torch.zeros_like(p) if n else None for p, n in zip(loss.params, needed[split:], strict=True)
    ]
    total: Tensor | None = None
    sums: Tensor | None = None
    slopes: list[Tensor] = []
    width = source.vocab_size if loss.columns is None else len(loss.columns)
    if isinstance(source, ShardRows):
        return _run_dealt(loss, source, scale, rows_per_block, needed, grads, param_grads)
    for first, last in loss.student.blocks(max(rows_per_block, source.rows_at_once(width))):
        value, metrics = run_rows(
            loss, source, scale, rows_per_block, needed, (first, last), grads, param_grads, slopes
        )
        total = value if total is None else total + value
        sums = metrics if sums is None else sums + metrics
    if total is None or sums is None:
        first_tensor = source.tensors()[0]
        dtype = upcast_dtype(first_tensor.dtype)
        total = torch.zeros((), dtype=dtype, device=first_tensor.device)
        sums = total.new_zeros(len(loss.metric_names))
    slope = torch.stack(slopes).sum()[None] if slopes else sums.new_zeros(1)
    return total * scale, torch.cat([sums, slope.to(sums.dtype)]), [*grads, *param_grads]


def run_rows(
    loss: BlockLoss,
    source: StudentRows,
    scale: float | Tensor,
    rows_per_block: int,
    needed: tuple[bool, ...],
    chunks: tuple[int, int],
    grads: list[Tensor | None],
    param_grads: list[Tensor | None],
    slopes: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Loss and metric sums of the chunks whose rows are made together; adds to the gradients.

    A function of its own, so that its rows are gone before the next ones are made.
    """
    split = len(source.tensors())
    index, _ = loss.student.block(*chunks)
    rows, value, sums = _through(
        loss, source.rows(index, loss.columns), scale, rows_per_block, needed, split, chunks,
        param_grads, slopes,
    )  # fmt: skip
    if any(needed[:split]):
        source.add_grads(grads, index, loss.columns, rows)
    return value, sums


def _through(
    loss: BlockLoss,
    rows: Tensor,
    scale: float | Tensor,
    rows_per_block: int,
    needed: tuple[bool, ...],
    split: int,
    chunks: tuple[int, int],
    param_grads: list[Tensor | None],
    slopes: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the rows of some chunks, in their place where one is needed; their loss and
    metric sums."""
    done = 0
    values, sums = [], []
    for start, stop in loss.student.blocks(rows_per_block, *chunks):
        inner, segments = loss.student.block(start, stop)
        part = rows[done : done + len(inner)]
        done += len(inner)
        block = Block(start, stop, segments)
        if any(needed):
            value, metrics, grad_rows, more = loss.value_and_grad(
                part, block, loss.params, needed[split:], scale
            )
            # A sum over what was just written costs little, and NaN or inf come through.
            slopes.append(grad_rows.sum())
            if len(part) == len(rows):
                rows = grad_rows
            else:  # these rows are done with: their gradient takes their place
                part.copy_(grad_rows)
            for mine, found in zip(param_grads, more, strict=True):
                if mine is not None and found is not None:
                    mine.add_(found)
        else:
            value, metrics = loss.value(part, block, loss.params)
        values.append(value)
        sums.append(metrics)
    return rows, torch.stack(values).sum(), torch.stack(sums).sum(0)


def _run_dealt(
    loss: BlockLoss,
    source: ShardRows,
    scale: float | Tensor,
    rows_per_block: int,
    needed: tuple[bool, ...],
    grads: list[Tensor | None],
    param_grads: list[Tensor | None],
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """`run_blocks` where the vocabulary is cut over ranks: each computes some of the blocks, and
    all have the sums."""
    dtype = upcast_dtype(source.logits.dtype)
    total = torch.zeros((), dtype=dtype, device=source.logits.device)
    sums = total.new_zeros(len(loss.metric_names) + 1)
    ranks, rows_in_all = len(source.sizes), len(loss.student.index)
    # No rank idles while another has a whole block.
    blocks = loss.student.blocks(max(1, min(rows_per_block, -(-rows_in_all // ranks))))
    for start in range(0, len(blocks), ranks):
        some = blocks[start : start + ranks]
        index = [loss.student.block(*chunks)[0] for chunks in some]
        rows = source.deal(index, loss.columns)
        if source.rank < len(some):
            slopes: list[Tensor] = []
            rows, value, metrics = _through(
                loss, rows, scale, rows_per_block, needed, 1, some[source.rank], param_grads, slopes
            )
            total = total + value
            slope = torch.stack(slopes).sum() if slopes else metrics.new_zeros(())
            sums = sums + torch.cat([metrics, slope[None]]).to(sums.dtype)
        if needed[0]:
            source.add_dealt(grads, index, loss.columns, rows)
    for tensor in (total, sums, *param_grads):
        if tensor is not None:
            source.add_up(tensor)
    return total * scale, sums, [*grads, *param_grads]
