"""P-KL: KL in the teacher's vocabulary, with the student projected there by W.

For a chunk with student distribution p and teacher distribution q, p~ = W^T p; the loss is a
divergence of q and p~, both renormalized on a set of teacher columns that W reaches. On other
columns p~ is 0 and the KL infinite, which an epsilon would only hide. (X-Token, arXiv 2605.21699.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..chunks import ChunkBatch
from ..sparse import ColumnSlice, SparseProjection, log_project
from .checks import check_batch, check_finite, check_temperature
from .divergence import Direction, check_direction, divergence
from .merge import ChunkRows, Merge, chunk_rows, merge_rows, unmerge_rows
from .module import LossModule
from .output import LossOutput
from .p_kl_forward import forward_kl
from .row_blocks import Block, BlockLoss, block_rows, reduce_chunks
from .student import Student, StudentRows, student_rows
from .teacher_signal import Teacher, TeacherRows, TeacherTopK, top_columns
from .top_k import top_k as best_of

Scope = Literal["chunk", "microbatch"]


def p_kl(
    student_logits: Student,
    teacher: Teacher,
    projection: SparseProjection,
    chunks: ChunkBatch,
    *,
    student_ids: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    top_k: int | None = None,
    top_k_scope: Scope = "chunk",
    tail_bucket: bool = False,
    merge: Merge = "chain",
    temperature: float = 1.0,
    direction: Direction = "forward",
    beta: float = 0.5,
    normalizer: float | Tensor | None = None,
    chunk_weights: Tensor | None = None,
    full_metrics: bool = False,
    block_size: int | None = None,
) -> LossOutput:
    """Mean divergence over chunks in the teacher's vocabulary; forward KL by default.

    Args:
        student_logits: [B, T_s, V_s'] float, raw; carries the gradient. Or an `LmHead` (fused) or
            `VocabShard`. Columns from V_s on are dropped.
        teacher: [B, T_t, V_t'] float raw logits, detached here, columns from V_t on dropped; or a
            `TeacherTopK`.
        projection: W [V_s, V_t]; learnable weights receive a gradient.
        chunks: the chunks to count, from `ChunkBatch.usable`.
        student_ids, teacher_ids: [B, T_s], [B, T_t] int64; only checked against the batch here.
        top_k: teacher columns kept among the supported ones; None or more than there are keeps all.
            With a `TeacherTopK` in chunk scope the columns are the stored ones, `top_k` the best.
        top_k_scope: "chunk", each chunk's own best columns; "microbatch", one set for the batch by
            total teacher mass (sparser work, and the cheapest path).
        tail_bucket: one more column on each side for all mass outside the kept ones, the student's
            mass on empty rows of W included.
        temperature: > 0, divides both sides' logits; the loss is multiplied by its square.
        direction, beta: see `divergence`.
        normalizer: what the sum over chunks is divided by, len(chunks) where None.
        chunk_weights: [C] float, a factor on each chunk's loss, not on metrics or normalizer.
        full_metrics: read whole student rows where the loss needs only some columns, so that
            `empty_row_mass` is known.
        block_size: chunks worked on at a time; None chooses by cache size.

    Returns: loss in nats per chunk, >= 0 up to rounding, 0 with a graph without chunks. Metrics:
        `kl`, `teacher_mass` (on the kept columns, of the full vocabulary), `top1_agreement` (within
        the kept columns), and `empty_row_mass` (the student's on empty rows of W) where whole rows
        are read.

    Raises:
        ValueError: shapes, vocabulary sizes or options that do not fit; NaN or +inf logits; the
            chunks of another batch; a tail bucket that the student cannot put mass in.
    """
    loss, source, per_block = p_kl_blocks(
        student_logits,
        teacher,
        projection,
        chunks,
        student_ids=student_ids,
        teacher_ids=teacher_ids,
        top_k=top_k,
        top_k_scope=top_k_scope,
        tail_bucket=tail_bucket,
        merge=merge,
        temperature=temperature,
        direction=direction,
        beta=beta,
        full_metrics=full_metrics,
        block_size=block_size,
    )
    result = reduce_chunks(
        loss,
        source,
        normalizer=normalizer,
        weights=chunk_weights,
        rows_per_block=per_block,
    )
    check_finite(result.loss, source, teacher, chunks, merge)
    return result


def p_kl_blocks(
    student_logits: Student,
    teacher: Teacher,
    projection: SparseProjection,
    chunks: ChunkBatch,
    *,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    top_k: int | None,
    top_k_scope: Scope,
    tail_bucket: bool,
    merge: Merge,
    temperature: float,
    direction: Direction,
    beta: float,
    full_metrics: bool,
    block_size: int | None,
) -> tuple[PKLBlocks, StudentRows, int]:
    """Check the arguments of `p_kl`; return the loss by blocks, its rows and chunks a block."""
    check_temperature(temperature)
    check_direction(direction, beta)
    if top_k_scope not in get_args(Scope):
        raise ValueError(f"top_k_scope = {top_k_scope!r}, expected 'chunk' or 'microbatch'")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k} must be at least 1, or None for all columns")
    student_size, teacher_size = projection.shape
    source = student_rows(student_logits, student_size)
    check_batch(source, teacher, chunks, student_ids, teacher_ids)
    if not torch.compiler.is_compiling() and not bool(projection.supported.any()):
        raise ValueError("W reaches no teacher column: all its rows are empty; rebuild it")
    rows = TeacherRows.of(
        teacher, chunks, teacher_size, temperature, merge, renormalized=not tail_bucket
    )
    device = source.tensors()[0].device
    per_block = block_size or block_rows(max(student_size, teacher_size), device)
    per_chunk = top_k_scope == "chunk" and (top_k is not None or isinstance(teacher, TeacherTopK))
    part = projection.full()
    if top_k is not None and not per_chunk and len(chunks):
        part = projection.columns(top_columns(rows, projection.supported, top_k, per_block))
    params = [projection.values()[part.entries]]
    if tail_bucket and not per_chunk:
        params.append(_mass_outside(projection, part))
    loss = PKLBlocks(
        student=chunk_rows(chunks, "student", source.positions[1], merge),
        # Only what the kept columns can come from is read, where nothing asks for whole rows.
        columns=None if tail_bucket or full_metrics else part.rows,
        params=tuple(params),
        teacher=rows,
        part=part,
        column_of=projection.column_of,
        empty_rows=projection.empty_ids,
        chunk_top_k=(top_k or teacher_size) if per_chunk else None,
        tail_bucket=tail_bucket,
        temperature=temperature,
        direction=direction,
        beta=beta,
    )
    return loss, source, per_block


@dataclass(eq=False, kw_only=True)
class PKLBlocks(BlockLoss):
    """P-KL of a block of chunks; the function a kernel would replace."""

    student: ChunkRows
    columns: Tensor | None
    params: tuple[Tensor, ...]
    teacher: TeacherRows
    part: ColumnSlice
    column_of: Tensor
    empty_rows: Tensor
    chunk_top_k: int | None
    tail_bucket: bool
    temperature: float
    direction: Direction
    beta: float

    def __post_init__(self) -> None:
        whole = ("empty_row_mass",) if self.columns is None else ()
        self.metric_names = ("kl", "teacher_mass", "top1_agreement", *whole)

    def forward(
        self, rows: Tensor, block: Block, params: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        logits = merge_rows(rows, block.segments, len(block))
        if self.temperature != 1.0:
            logits = logits / self.temperature
        inputs = logits
        if self.part.rows is not None and self.columns is None:
            inputs = logits.index_select(1, self.part.rows)
        log_student = log_project(inputs, params[0], self.part.map)  # [R, K], unnormalized
        columns, log_teacher = self._teacher(block)
        if columns is not None:
            # One column past the last, for stored ids that W does not reach.
            every = torch.nn.functional.pad(log_student, (0, 1), value=-torch.inf)
            log_student = every.gather(1, columns)
        mass = torch.logsumexp(log_teacher * self.teacher.stored_power, -1).exp()
        best = log_teacher.argmax(-1) == log_student.detach().argmax(-1)
        if self.tail_bucket:
            if columns is None:
                rest = self._rest(logits, params[1])
            else:
                rest = self._rest_of(logits, every, columns)
            log_teacher = torch.cat([log_teacher, torch.log1p(-mass.clamp(max=1.0))[:, None]], 1)
            log_student = torch.cat([log_student, rest[:, None]], 1)
        loss = divergence(*_renormalized(log_teacher, log_student), self.direction, self.beta)
        sums = [loss.detach().sum(), mass.sum(), best.sum().to(loss.dtype)]
        if self.columns is None:
            sums.append(self._empty_mass(logits.detach()).sum())
        return loss * self.temperature**2, torch.stack(sums)

    def value_and_grad(
        self,
        rows: Tensor,
        block: Block,
        params: Sequence[Tensor],
        needed: Sequence[bool],
        scale: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
        """As `BlockLoss`; the forward KL without a tail bucket in closed form."""
        plain = self.direction == "forward" and not self.tail_bucket
        found = self._closed_form(rows, block, params, needed, scale) if plain else None
        return found or super().value_and_grad(rows, block, params, needed, scale)

    @torch.no_grad()
    def _closed_form(
        self,
        rows: Tensor,
        block: Block,
        params: Sequence[Tensor],
        needed: Sequence[bool],
        scale: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]] | None:
        logits = merge_rows(rows, block.segments, len(block))
        if self.temperature != 1.0:
            logits = logits / self.temperature
        chosen = self.part.rows if self.columns is None else None
        inputs = logits if chosen is None else logits.index_select(1, chosen)
        places, log_teacher = self._teacher(block)
        weights = logits.new_ones(len(block))
        if self.weights is not None:
            weights = self.weights[block.start : block.stop].to(logits.dtype)
        factor = weights * self.temperature**2
        found = forward_kl(
            inputs,
            log_teacher,
            places,
            params[0],
            self.part.map,
            factor * scale,
            unread_rows=self.empty_rows if self.part.rows is None else self.empty_rows[:0],
            want_values=needed[0],
        )
        if found is None:
            return None
        log_mass = found.log_mass
        if self.teacher.stored_power != 1.0:
            log_mass = torch.logsumexp(log_teacher * self.teacher.stored_power, -1)
        best = log_teacher.argmax(-1) == found.best
        sums = [found.loss.sum(), torch.exp(log_mass).sum(), best.sum().to(log_mass.dtype)]
        if self.columns is None:
            whole = self.part.rows is None
            sums.append((found.unread if whole else self._empty_mass(logits)).sum())
        grad = found.grad
        if chosen is not None:
            grad = torch.zeros_like(logits).index_copy_(1, chosen, grad)
        if self.temperature != 1.0:
            grad.div_(self.temperature)
        grad = unmerge_rows(grad, block.segments)
        return (found.loss * factor).sum(), torch.stack(sums), grad, [found.grad_values]

    def _teacher(self, block: Block) -> tuple[Tensor | None, Tensor]:
        """Each chunk's own places in the shared columns (None: all of them), and log-probs there.

        [R, k] each; a stored entry that W does not reach has the place past the last, and -inf.
        """
        if self.chunk_top_k is not None and isinstance(self.teacher.signal, TeacherTopK):
            ids, log_teacher = self.teacher.top_k(block.start, block.stop)
            columns = self.column_of[ids]
            reached = columns < self.part.map.output_ptr.shape[0] - 1
            log_teacher = log_teacher.masked_fill(~reached, -torch.inf)
            log_teacher, order = best_of(log_teacher, self.chunk_top_k)
            return columns.gather(1, order), log_teacher
        log_teacher = self.teacher.log_probs(block.start, block.stop)
        if self.part.columns is not None:
            log_teacher = log_teacher.index_select(1, self.part.columns)
        if self.chunk_top_k is None:
            return None, log_teacher
        log_teacher, columns = best_of(log_teacher, self.chunk_top_k)
        return columns, log_teacher

    def _rest(self, logits: Tensor, outside: Tensor) -> Tensor:
        """[R] log of the student's mass outside the shared columns, in the scale of `logits`."""
        return torch.logsumexp(logits + torch.log(outside.to(logits.dtype)), -1)

    def _rest_of(self, logits: Tensor, every: Tensor, columns: Tensor) -> Tensor:
        """[R] the same outside each chunk's own columns; `every` [R, K + 1] holds all of W's."""
        outside = every.scatter(1, columns, -torch.inf)
        empty = logits.index_select(1, self.empty_rows)
        return torch.logsumexp(torch.cat([outside, empty], 1), -1)

    def _empty_mass(self, logits: Tensor) -> Tensor:
        empty = torch.logsumexp(logits.index_select(1, self.empty_rows), -1)
        return torch.exp(empty - torch.logsumexp(logits, -1))


def _renormalized(log_teacher: Tensor, log_student: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides summing to 1 over the kept columns, those without teacher mass anywhere off.

    A chunk none of whose stored columns W reaches says nothing: both sides are made equal.
    """
    silent = torch.isneginf(log_teacher).all(-1, keepdim=True)
    log_student = log_student.masked_fill(silent, 0.0)
    log_teacher = log_teacher.masked_fill(silent, 0.0)
    return torch.log_softmax(log_teacher, -1), torch.log_softmax(log_student, -1)


def _mass_outside(projection: SparseProjection, part: ColumnSlice) -> Tensor:
    """[V_s] the share of each student token that W sends outside of `part`; 1 on empty rows."""
    values = projection.values()
    inside = torch.zeros_like(values[:1]).expand(projection.shape[0])
    inside = inside.index_add(0, projection.row_of[part.entries], values[part.entries])
    outside = 1.0 - inside
    # A row wholly inside sums to 1 up to rounding; what is left there is no mass.
    outside = torch.where(outside > 1e-5, outside, torch.zeros_like(outside))
    if not bool((outside > 0).any()):
        raise ValueError(
            "tail_bucket=True, but W sends no student token outside the kept columns: the KL of a "
            "teacher with any mass there is infinite; pass top_k, or tail_bucket=False"
        )
    return outside


class PKL(LossModule):
    """`p_kl` with W and its options held; W's learnable weights are this module's parameters."""

    def __init__(self, projection: SparseProjection, **options: Any) -> None:
        super().__init__(p_kl, options)
        self.projection = projection

    def held(self) -> dict[str, Any]:
        return {"projection": self.projection}
