"""P-KL: KL in the teacher's vocabulary, with the student projected there by W.

For a chunk with student distribution p and teacher distribution q, p~ = W^T p; the loss is a
divergence of q and p~, both renormalized on a set of teacher columns that W reaches. On other
columns p~ is 0 and the KL infinite, which an epsilon would only hide. (X-Token, arXiv 2605.21699.)
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from xtoken.losses.engine.checks import check_batch, check_finite, check_temperature
from xtoken.losses.engine.divergence import Direction, check_direction
from xtoken.losses.engine.merge import Merge, chunk_rows
from xtoken.losses.engine.module import LossModule
from xtoken.losses.engine.row_blocks import reduce_chunks
from xtoken.losses.engine.student_input import Student, student_rows
from xtoken.losses.engine.student_rows import StudentRows
from xtoken.losses.engine.teacher_rows import TeacherRows, top_columns
from xtoken.losses.output import LossOutput
from xtoken.losses.p_kl.block import PKLBlocks as PKLBlocks
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.projection import ColumnSlice, SparseProjection, places_of
from xtoken.tensors.rows import block_rows
from xtoken.tensors.teacher_signal import Teacher, TeacherTopK

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
        projection: W [V_s, V_t]; learnable weights receive a gradient. Its sizes are checked; a W
            of another pair of the same sizes is told by `Projection.load(path, student, teacher)`.
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
    if projection.indptr.device != chunks.device:
        raise ValueError(
            f"W is on {projection.indptr.device}, the student on {chunks.device}; "
            f"pass projection.to({str(chunks.device)!r})"
        )
    if not torch.compiler.is_compiling() and not bool(projection.supported.any()):
        raise ValueError("W reaches no teacher column: all its rows are empty; rebuild it")
    rows = TeacherRows.of(
        teacher, chunks, teacher_size, temperature, merge, renormalized=not tail_bucket
    )
    device = source.tensors()[0].device
    widest = max(student_size, teacher_size)
    per_chunk = top_k_scope == "chunk" and (top_k is not None or isinstance(teacher, TeacherTopK))
    part, column_of = projection.full(), projection.column_of
    if top_k is not None and not per_chunk and len(chunks):
        per_block = block_size or block_rows(widest, device)
        columns, rows = top_columns(rows, projection.supported, top_k, per_block)
        part = projection.columns(columns)
    elif per_chunk and isinstance(teacher, TeacherTopK):
        part, column_of = _stored_columns(projection, rows)
        # No row of the teacher's vocabulary is ever made.
        widest = max(student_size, part.map.output_ptr.shape[0], teacher.ids.shape[-1])
    per_block = block_size or block_rows(widest, device)
    params = [projection.values()[part.entries]]
    if tail_bucket:
        outside = _mass_outside(projection, part)
        if not per_chunk and not bool((outside > 0).any()):
            raise ValueError(
                "tail_bucket=True, but W sends no student token outside the kept columns: the KL "
                "of a teacher with any mass there is infinite; pass top_k, or tail_bucket=False"
            )
        params.append(outside)
    loss = PKLBlocks(
        student=chunk_rows(chunks, "student", source.positions[1], merge),
        # Only what the kept columns can come from is read, where nothing asks for whole rows.
        columns=None if tail_bucket or full_metrics else part.rows,
        params=tuple(params),
        teacher=rows,
        part=part,
        column_of=column_of,
        empty_rows=projection.empty_ids,
        chunk_top_k=(top_k or teacher_size) if per_chunk else None,
        tail_bucket=tail_bucket,
        temperature=temperature,
        direction=direction,
        beta=beta,
    )
    return loss, source, per_block


def _stored_columns(projection: SparseProjection, rows: TeacherRows) -> tuple[ColumnSlice, Tensor]:
    """The supported columns that a stored top-k names anywhere, and the place of each id among
    them: W is then read for some thousands of columns, and so is an lm_head."""
    if torch.compiler.is_compiling():  # how many they are depends on the data
        return projection.full(), projection.column_of
    named = rows.stored_mask() & projection.supported
    if not bool(named.any()):
        return projection.full(), projection.column_of
    return projection.columns(named.nonzero().flatten()), places_of(named)


def _mass_outside(projection: SparseProjection, part: ColumnSlice) -> Tensor:
    """[V_s] the share of each student token that W sends outside of `part`; 1 on empty rows."""
    values = projection.values()
    inside = torch.zeros_like(values[:1]).expand(projection.shape[0])
    inside = inside.index_add(0, projection.row_of[part.entries], values[part.entries])
    outside = 1.0 - inside
    # A row wholly inside sums to 1 up to rounding; what is left there is no mass.
    return torch.where(outside > 1e-5, outside, torch.zeros_like(outside))


class PKL(LossModule):
    """`p_kl` with W and its options held; W's learnable weights are this module's parameters."""

    def __init__(self, projection: SparseProjection, **options: Any) -> None:
        super().__init__(p_kl, options)
        self.projection = projection

    def held(self) -> dict[str, Any]:
        return {"projection": self.projection}
