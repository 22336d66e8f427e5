"""Next-token cross-entropy of the student, by row blocks like every other loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from xtoken._checks import expect
from xtoken.errors import ShapeError
from xtoken.losses.engine.checks import check_token_ids, finite_or_nan, inside
from xtoken.losses.engine.compiled import with_compiled
from xtoken.losses.engine.held import Held
from xtoken.losses.engine.merge import ChunkRows
from xtoken.losses.engine.native_cross_entropy import native_pass
from xtoken.losses.engine.places import Places
from xtoken.losses.engine.row_blocks import Block, BlockLoss, reduce_chunks
from xtoken.losses.engine.shared_gradient import CrossEntropyRows
from xtoken.losses.engine.student_input import Student, student_rows
from xtoken.losses.engine.student_rows import StudentRows
from xtoken.losses.inputs import LossOptions, check_normalizer
from xtoken.losses.kernels.cross_entropy import cross_entropy_pass
from xtoken.losses.output import LossOutput
from xtoken.tensors.host import readable
from xtoken.tensors.rows import block_rows


def cross_entropy(
    student_logits: Student,
    student_ids: Tensor,
    mask: Tensor,
    normalizer: float | Tensor | None = None,
    *,
    vocab_size: int | None = None,
    block_size: int | None = None,
    positions: Tensor | None = None,
    full_metrics: bool = False,
    compiled: bool | str = False,
) -> LossOutput:
    """Mean negative log-likelihood of the tokens in `mask`.

    Args:
        student_logits: [B, T_s, V_s'] float, raw; or an `LmHead` or `VocabShard`.
        student_ids: [B, T_s] int64.
        mask: [B, T_s] bool, the token counts; the first column never does, nothing predicts it.
        normalizer: what the sum over tokens is divided by, their number where None.
        positions: [N] int64, the flat positions before the tokens of `mask`, where they are known
            from the CPU: on another device all rows are computed without them.
        full_metrics: whether `top1_accuracy` is told, which costs a pass over the rows.
        compiled: as that of `LossOptions`.
        vocab_size: V_s, so that a padded lm_head's excess is dropped; None takes all columns.

    Returns: loss in nats per token; metrics `ce` (the same, always per counted token) and,
        with `full_metrics`, `top1_accuracy`.

    Raises:
        ShapeError: shapes that do not fit.
        TokenIdError: a counted id outside the vocabulary.

    >>> ids = torch.tensor([[0, 1]])
    >>> cross_entropy(torch.zeros(1, 2, 4), ids, ids >= 0).metrics["ce"].item()
    1.3862943649291992
    """
    if torch.compiler.is_compiling():
        eager: LossOutput = torch.compiler.disable(cross_entropy)(  # type: ignore[no-untyped-call]
            student_logits, student_ids, mask, normalizer, vocab_size=vocab_size,
            block_size=block_size, positions=positions, full_metrics=full_metrics,
            compiled=compiled,
        )  # fmt: skip
        return eager
    source = student_rows(student_logits, vocab_size)
    for name, value in (("student_ids", student_ids), ("mask", mask)):
        expect(value, Tensor, name, f"pass {name} as a tensor [B, T_s]")
        if tuple(value.shape) != source.positions:
            raise ShapeError(
                f"{name} has shape {tuple(value.shape)}, expected {source.positions} like the "
                "logits"
            )
    if mask.dtype != torch.bool:
        raise ShapeError(f"mask is {mask.dtype}, expected torch.bool")
    if normalizer is not None:
        check_normalizer(normalizer)
    samples, length = source.positions
    counted = None
    if positions is not None:
        index = positions
    elif readable(mask):
        sample, token = mask[:, 1:].nonzero(as_tuple=True)  # token t + 1 is predicted at t
        index = sample * length + token
    else:  # which ones are counted nobody asks: all are computed
        index = torch.arange(samples * length, device=mask.device).view(samples, length)[:, :-1]
        index, counted = index.flatten(), mask[:, 1:].flatten()
    targets = student_ids.flatten()[index + 1]
    check_token_ids(targets, source.vocab_size, "student")
    loss = CrossEntropyBlocks(
        student=ChunkRows(index, None, len(index)),
        targets=targets,
        counted=counted,
        full_metrics=full_metrics,
    )
    rows_per_block = block_size or block_rows(source.vocab_size, index.device)
    result, slope = reduce_chunks(
        with_compiled(loss, LossOptions(compiled=compiled).backend, rows_per_block),
        source,
        rows_per_block=rows_per_block,
        normalizer=normalizer,
        weights=None,
        held=Held.of(positions=positions),
        count=None if counted is None else counted.sum(),
    )
    return replace(result, loss=finite_or_nan(result.loss, slope))


@dataclass(eq=False, kw_only=True)
class CrossEntropyBlocks(BlockLoss):
    """Cross-entropy of a block of rows against `targets` [N] int64."""

    student: ChunkRows
    targets: Tensor
    counted: Tensor | None = None  # [N] bool, the rows that count; None for all
    full_metrics: bool = False
    # [N] log-sum-exp and loss of each row, once a kernel has computed them.
    by_row: tuple[Tensor, Tensor] | None = field(default=None, init=False)
    late = True
    has_closed_form = True

    def __post_init__(self) -> None:
        self.metric_names = ("ce", *(("top1_accuracy",) if self.full_metrics else ()))

    def narrowed(self, places: Places) -> CrossEntropyBlocks:
        """As `BlockLoss`."""
        return replace(
            self,
            student=places.student,
            targets=places.of_chunks(self.targets),
            counted=None if self.counted is None else places.of_chunks(self.counted),
        )

    def forward(
        self, rows: Tensor, block: Block, params: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        targets, outside = inside(self.targets[block.start : block.stop], rows.shape[1])
        if self.counted is not None:
            counted = self.counted[block.start : block.stop]
            # Padding may hold anything: no NaN of it may reach the gradient.
            rows = rows.masked_fill(~counted[:, None], 0.0)
        loss = torch.nn.functional.cross_entropy(rows, targets, reduction="none")
        if outside is not None:
            loss = loss.masked_fill(outside, torch.nan)
        if self.counted is not None:
            loss = loss.masked_fill(~counted, 0.0)
        return loss, self._metrics(rows.detach(), loss.detach(), targets, block)

    def _metrics(self, rows: Tensor, loss: Tensor, targets: Tensor, block: Block) -> Tensor:
        sums = [block.sum(loss)]
        if self.full_metrics:
            hit = rows.argmax(-1) == targets
            if self.counted is not None:
                hit = hit & self.counted[block.start : block.stop]
            sums.append(block.sum(hit).to(loss.dtype))
        return torch.stack(sums)

    def by_kernel(
        self,
        source: StudentRows,
        scale: float | Tensor,
        needed: tuple[bool, ...],
        grads: list[Tensor | None] | None,
    ) -> tuple[Tensor, Tensor, list[Tensor | None]] | None:
        """As `BlockLoss`: by a kernel on a GPU, by the core on the CPU."""
        given = (self, source, scale, needed, grads)
        found = cross_entropy_pass(*given)
        return native_pass(*given) if found is None else found

    def cross_entropy_rows(self, factor: Tensor) -> CrossEntropyRows | None:
        """As `BlockLoss`."""
        if self.by_row is None:
            return None
        factor = factor.to(torch.float32)
        return CrossEntropyRows(self.student.index, self.targets, self.by_row[0], factor)

    @torch.no_grad()
    def value_and_grad(
        self,
        rows: Tensor,
        block: Block,
        params: Sequence[Tensor],
        needed: Sequence[bool],
        scale: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
        """As `BlockLoss`; the gradient, p less 1 at the target, in the log-probabilities' place."""
        targets, outside = inside(self.targets[block.start : block.stop], rows.shape[1])
        counted = None if self.counted is None else self.counted[block.start : block.stop]
        if counted is not None:
            rows = rows.masked_fill(~counted[:, None], 0.0)
        log_probs = torch.log_softmax(rows, 1)
        loss = log_probs.gather(1, targets[:, None]).squeeze(1).neg_()
        if outside is not None:
            loss = loss.masked_fill(outside, torch.nan)
        grad = log_probs.exp_()
        grad.scatter_add_(1, targets[:, None], grad.new_full((), -1.0).expand(len(grad), 1))
        if counted is not None:
            loss = loss.masked_fill(~counted, 0.0)
            grad.mul_(counted[:, None])
        grad.mul_(scale)
        return block.sum(loss), self._metrics(rows, loss, targets, block), grad, []
