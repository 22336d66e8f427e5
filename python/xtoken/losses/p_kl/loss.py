"""P-KL: KL in the teacher's vocabulary, with the student projected there by W.

For a chunk with student distribution p and teacher distribution q, p~ = W^T p; the loss is a
divergence of q and p~, both renormalized on a set of teacher columns that W reaches. On other
columns p~ is 0 and the KL infinite, which an epsilon would only hide. (X-Token, arXiv 2605.21699.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from xtoken.errors import OptionError, PairError
from xtoken.losses.engine.boundaries import left_out
from xtoken.losses.engine.loss_spec import LossSpec
from xtoken.losses.engine.run import LossCall, run_loss
from xtoken.losses.engine.teacher_rows import TeacherRows, top_columns
from xtoken.losses.inputs import DEFAULT_OPTIONS, LossInputs, LossOptions
from xtoken.losses.output import LossOutput
from xtoken.losses.p_kl.block import PKLBlocks as PKLBlocks
from xtoken.losses.p_kl.native import takes_stored
from xtoken.tensors.cells import CellFold
from xtoken.tensors.host import readable
from xtoken.tensors.pair_parts import PairParts
from xtoken.tensors.projection import ColumnSlice, SparseProjection, places_of
from xtoken.tensors.rows import taken
from xtoken.tensors.teacher_signal import TeacherTopK


def p_kl(inputs: LossInputs, pair: PairParts, options: LossOptions = DEFAULT_OPTIONS) -> LossOutput:
    """Mean divergence over chunks in the teacher's vocabulary; forward KL by default.

    Args:
        pair: with `projection`, W; its learnable weights receive a gradient. With `cells` for the
            options of that name.
        options: `cells` maps each teacher column that W does not reach to the one that the student
            says first of it (the root map of `xtoken.targets`), on both sides, so that no text is
            dropped. `consistent` leaves out the teacher tokens that the student's tokenizer would
            have joined to its last token, so that its boundary would not be there, and scales the
            others to 1; it needs the ids. The student's mass on their columns counts, but with a
            `TeacherTopK` and no tail, where they are compared on neither side. A student equal to
            its teacher on one vocabulary then has a loss, as both put mass on such tokens.

    Returns: loss in nats per chunk, >= 0 up to rounding, 0 with a graph without chunks. Metrics:
        `kl`, `teacher_mass` (on the kept columns, of the full vocabulary), `empty_row_mass` (the
        student's on empty rows of W) where whole rows are read, and, with `full_metrics`,
        `top1_agreement` (within the kept columns).

    Raises:
        XTokenError: shapes, vocabularies or options that do not fit; NaN or +inf logits; a tail
            bucket that the student cannot put mass in; a reverse KL that is infinite on any batch,
            as where `consistent` leaves columns out that are compared.

    >>> from xtoken.tensors.chunks import ChunkBatch
    >>> pair = PairParts((3, 3), projection=SparseProjection.identity(3))
    >>> chunks = ChunkBatch.from_mask(torch.tensor([[False, True]]))
    >>> student = torch.zeros(1, 2, 3, requires_grad=True)
    >>> teacher = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    >>> output = p_kl(LossInputs(student, teacher, chunks), pair)
    >>> round(output.loss.item(), 3)
    0.433
    >>> output.loss.backward()
    """
    return run_loss(SPEC, _blocks, inputs, pair, options)


SPEC = LossSpec.of(
    "p-kl", p_kl, "merge", "top_k", "top_k_scope", "top_k_by", "tail_bucket", "full_metrics",
    prepare=left_out, on_cells=True,
)  # fmt: skip


def _blocks(call: LossCall) -> tuple[PKLBlocks, int]:
    projection = call.pair.projection
    assert projection is not None
    if call.options.cells:
        assert call.pair.cells is not None
        if projection.free is not None:
            raise OptionError("cells = True with a learnable W, whose columns are its own")
        projection = call.pair.cells.projection
    return p_kl_blocks(call, projection)


def p_kl_blocks(
    call: LossCall, projection: SparseProjection, spec: LossSpec = SPEC
) -> tuple[PKLBlocks, int]:
    """The loss by blocks, and its widest row; the root of prefix KL too."""
    options, teacher = call.options, call.teacher
    if len(projection.supported_ids) == 0:
        raise PairError("W reaches no teacher column: all its rows are empty; rebuild it")
    rows = call.root_rows(spec, options.merge, renormalized=not options.tail_bucket)
    widest = max(projection.shape)
    top_k, stored = options.top_k, isinstance(teacher, TeacherTopK)
    check_chooser(options)
    per_chunk = options.top_k_scope == "chunk" and (top_k is not None or stored)
    part, column_of = projection.full(), projection.column_of
    if top_k is not None and not per_chunk and len(call.chunks):
        kept = min(top_k, len(projection.supported_ids))
        columns, rows = top_columns(rows, projection.supported, kept, call.rows_per_block(widest))
        part = projection.columns(columns)
    has_tail, all_columns = _tail(call, projection, rows, part, per_chunk)
    _check_reverse(call, projection, rows, has_tail)
    named = teacher if per_chunk and isinstance(teacher, TeacherTopK) else None

    def made(part: ColumnSlice, column_of: Tensor, columns: Tensor | None) -> PKLBlocks:
        params = [part.weights_of(projection.values())]
        if has_tail:
            params.append(_mass_outside(projection, part))
        return PKLBlocks(
            student=call.student_chunks(options.merge),
            # Only what the kept columns can come from is read, where nothing asks for whole rows.
            columns=None if has_tail or options.full_metrics else columns,
            params=tuple(params),
            teacher=rows,
            projection=projection,
            part=part,
            column_of=column_of,
            empty_rows=projection.empty_ids,
            chunk_top_k=(top_k or projection.shape[1]) if per_chunk else None,
            tail_bucket=has_tail,
            by_student=options.top_k_by == "student",
            all_columns=all_columns,
            full_metrics=options.full_metrics,
            temperature=call.temperature,
            direction=options.direction,
            beta=options.beta,
        )

    def narrow() -> PKLBlocks:
        part, column_of = _stored_columns(projection, rows)
        every = torch.arange(projection.shape[0], device=column_of.device)
        return made(part, column_of, every if part.rows is None else part.rows)

    if named is not None and takes_stored(call, projection, rows):
        # The core reads what a chunk names of all of W.
        loss = made(part, column_of, projection.supported_ids[:0])
        loss.make_narrow = narrow
        return loss, widest
    if named is not None:
        part, column_of = _stored_columns(projection, rows)
        # No row of the teacher's vocabulary is ever made.
        widest = max(projection.shape[0], part.map.output_ptr.shape[0], named.ids.shape[-1])
    return made(part, column_of, part.rows), widest


def check_chooser(options: LossOptions) -> None:
    """Refuse a choice by the student where nothing is chosen, or for a batch at once."""
    if options.top_k_by == "teacher":
        return
    if options.top_k is None:
        raise OptionError("top_k_by = 'student' with top_k = None; say how many it chooses")
    if options.top_k_scope == "microbatch":
        raise OptionError(
            "top_k_by = 'student' with top_k_scope = 'microbatch'; the student chooses for each "
            "chunk: pass top_k_scope='chunk'"
        )


def _check_reverse(
    call: LossCall, projection: SparseProjection, rows: TeacherRows, has_tail: bool
) -> None:
    """Refuse a reverse KL that compares what the teacher gives no mass on any batch."""
    options, supported = call.options, len(projection.supported_ids)
    if options.direction != "reverse":
        return
    per_chunk, stored = options.top_k_scope == "chunk", isinstance(call.teacher, TeacherTopK)
    whole = options.top_k is None or options.top_k >= supported
    # The teacher's best columns of a chunk, or what is stored of it, are none that are left out.
    chosen = per_chunk and (stored or (not whole and options.top_k_by == "teacher"))
    if options.consistent and not chosen:
        raise OptionError(
            "direction = 'reverse' with consistent = True is infinite: the student has mass on the "
            "teacher tokens that are left out; pass direction='forward' or 'jsd', or a top_k below "
            f"{supported} with top_k_scope='chunk' and top_k_by='teacher'"
        )
    moved = len(rows.fold.sources) if isinstance(rows.fold, CellFold) else 0
    if has_tail and whole and not stored and supported == projection.shape[1] - moved:
        raise OptionError(
            "direction = 'reverse' with tail_bucket = True is infinite: W reaches all teacher "
            "columns, so the teacher has no mass in a tail where the student has some; pass "
            "tail_bucket='auto', or a smaller top_k"
        )


def _tail(
    call: LossCall,
    projection: SparseProjection,
    rows: TeacherRows,
    part: ColumnSlice,
    per_chunk: bool,
) -> tuple[bool, int | None]:
    """Whether there is a tail, and the number of kept columns that leaves none to a chunk.

    The student has mass in it where W reaches columns that are not kept, and, for True, on empty
    rows of W. A chunk without either has no tail; if no chunk has one, True is refused.
    """
    wanted = call.options.tail_bucket
    if not wanted:
        return False, None
    supported = len(projection.supported_ids)
    if wanted is True and len(projection.empty_ids):
        return True, None
    if not per_chunk:
        kept = part.map.output_ptr.shape[0] - 1
    else:
        kept = min(call.options.top_k or supported, supported)
        if isinstance(call.teacher, TeacherTopK):
            kept = min(kept, call.teacher.ids.shape[-1])
    if kept < supported:
        return True, None
    if per_chunk and isinstance(call.teacher, TeacherTopK) and len(call.chunks):
        # A chunk may hold ids that W does not reach, and so fewer columns.
        ids = rows.top_k(0, len(call.chunks))[0]
        reached = (taken(projection.column_of, ids) < supported).sum(1)
        if not readable(ids) or bool((reached < supported).any()):
            return True, supported
    if wanted is True and len(call.chunks):
        raise OptionError(
            "tail_bucket=True, but W sends no student token outside the kept columns: the KL "
            "of a teacher with any mass there is infinite; pass a smaller top_k, or "
            "tail_bucket='auto'"
        )
    return False, None


def _stored_columns(projection: SparseProjection, rows: TeacherRows) -> tuple[ColumnSlice, Tensor]:
    """The supported columns that a stored top-k names anywhere, and the place of each id among
    them: W is then read for some thousands of columns, and so is an lm_head."""
    if not readable(projection.supported):  # how many they are depends on the data
        return projection.full(), projection.column_of
    named = rows.stored_mask() & projection.supported
    if not bool(named.any()):
        return projection.full(), projection.column_of
    return projection.columns(named.nonzero().flatten()), places_of(named)


def _mass_outside(projection: SparseProjection, part: ColumnSlice) -> Tensor:
    """[V_s] the share of each student token that W sends outside of `part`; 1 on empty rows."""
    values = projection.values()
    inside = torch.zeros_like(values[:1]).expand(projection.shape[0])
    inside = inside.index_add(0, projection.row_of[part.entries], part.weights_of(values))
    outside = 1.0 - inside
    # A row wholly inside sums to 1 up to rounding; what is left there is no mass.
    return torch.where(outside > 1e-5, outside, torch.zeros_like(outside))
