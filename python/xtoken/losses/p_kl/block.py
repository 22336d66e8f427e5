"""P-KL of a block of chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from xtoken.losses.engine.divergence import Direction, divergence
from xtoken.losses.engine.merge import ChunkRows, merge_rows, unmerge_rows
from xtoken.losses.engine.places import Places, of_any_length
from xtoken.losses.engine.row_blocks import Block, BlockLoss, Later
from xtoken.losses.engine.sorting import top_k as best_of
from xtoken.losses.engine.student_rows import StudentRows
from xtoken.losses.engine.tail import log_shares, safe_logsumexp, with_tail
from xtoken.losses.engine.teacher_rows import TeacherRows
from xtoken.losses.kernels.p_kl import p_kl_compared, p_kl_pass
from xtoken.losses.p_kl.closed_form import LogTail, Tail, forward_kl, forward_kl_in_log_space
from xtoken.losses.p_kl.native import native_pass
from xtoken.tensors.host import readable
from xtoken.tensors.projection import ColumnSlice, SparseProjection
from xtoken.tensors.rows import taken
from xtoken.tensors.sparse_ops import log_project
from xtoken.tensors.teacher_signal import TeacherTopK


@dataclass(eq=False, kw_only=True)
class PKLBlocks(BlockLoss):
    """P-KL of a block of chunks.

    Attributes:
        projection: W on all columns.
        part: W on the columns that are kept in any chunk.
        column_of: [V_t + 1] int64, the place of each teacher id among them.
        chunk_top_k: columns that each chunk keeps of them; None keeps them all.
        by_student: whether they are the student's likeliest, not the teacher's.
        tail_bucket: whether there is a tail at all.
        full_metrics: whether `top1_agreement` is told.
        all_columns: a chunk that keeps this many columns has nothing left for a tail; None where
            each chunk has something left.
        tells_empty: whether `empty_row_mass` is told; None for where whole rows are read anyway.
        make_narrow: the same loss over the columns that the batch names, which torch reads and the
            core does not; None where it is this one. `columns` may be empty until then.
    """

    student: ChunkRows
    columns: Tensor | None
    params: tuple[Tensor, ...]
    teacher: TeacherRows
    projection: SparseProjection
    part: ColumnSlice
    column_of: Tensor
    empty_rows: Tensor
    chunk_top_k: int | None
    by_student: bool
    tail_bucket: bool
    all_columns: int | None
    full_metrics: bool
    temperature: float
    direction: Direction
    beta: float
    make_narrow: Callable[[], PKLBlocks] | None = None
    tells_empty: bool | None = None
    # W's non-zeros by input, which every block asks for.
    _values_by_input: Tensor | None = field(default=None, init=False, repr=False)
    _others: Tensor | None = field(default=None, init=False, repr=False)
    _narrow: PKLBlocks | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        agreement = ("top1_agreement",) if self.full_metrics else ()
        if self.tells_empty is None:
            self.tells_empty = self.columns is None
        whole = ("empty_row_mass",) if self.tells_empty else ()
        self.metric_names = ("kl", "teacher_mass", *agreement, *whole)
        self.params_of_any_length = () if self.part.rows is None else (0,)
        self.has_closed_form = self.direction == "forward" and not self.by_student

    def narrowed(self, places: Places) -> PKLBlocks:
        """As `BlockLoss`; the columns that a batch chose may be of any number."""
        part = self.part
        if self.params_of_any_length:
            part = part.mapped(of_any_length)
        return replace(
            self,
            student=places.student,
            # Of another length in every batch, and nobody reads them any more.
            columns=None if self.columns is None else self.columns[:0],
            teacher=self.teacher.narrowed(places),
            part=part,
        )

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
        columns, log_teacher = self.teacher_columns(block, log_student if self.by_student else None)
        if columns is not None:
            # One column past the last, for stored ids that W does not reach.
            every = torch.nn.functional.pad(log_student, (0, 1), value=-torch.inf)
            log_student = every.gather(1, columns)
        mass = torch.logsumexp(log_teacher * self.teacher.stored_power, -1).exp()
        agreement = []
        if self.full_metrics:
            best = log_teacher.argmax(-1) == log_student.detach().argmax(-1)
            agreement = [block.sum(best).to(mass.dtype)]
        if self.tail_bucket:
            others = logits + log_shares(params[1].to(logits.dtype))
            if columns is not None:
                others = torch.cat([others, every.scatter(1, columns, -torch.inf)], 1)
            log_teacher, log_student = with_tail(
                log_teacher, log_student, self._teacher_tail(block, columns, mass),
                safe_logsumexp(others), self._has_tail(columns),
            )  # fmt: skip
        loss = divergence(*_renormalized(log_teacher, log_student), self.direction, self.beta)
        sums = [block.sum(loss.detach()), block.sum(mass), *agreement]
        if self.tells_empty:
            sums.append(block.sum(self._empty_mass(logits.detach())))
        return loss * self.temperature**2, torch.stack(sums)

    def by_kernel(
        self,
        source: StudentRows,
        scale: float | Tensor,
        needed: tuple[bool, ...],
        grads: list[Tensor | None] | None,
    ) -> tuple[Tensor, Tensor, list[Tensor | None]] | None:
        """As `BlockLoss`: by a kernel on a GPU, by the core on the CPU."""
        found = p_kl_pass(self, source, scale, needed, grads)
        return native_pass(self, source, scale, needed, grads) if found is None else found

    def in_two(
        self, source: StudentRows, scale: float | Tensor
    ) -> tuple[Tensor, Tensor, Later] | None:
        """As `BlockLoss`."""
        compared = p_kl_compared(self, source)
        return None if compared is None else compared.in_two(scale)

    def in_torch(self) -> PKLBlocks:
        """As `BlockLoss`."""
        if self.make_narrow is None:
            return self
        if self._narrow is None:
            self._narrow = self.make_narrow()
        self._narrow.weights = self.weights
        return self._narrow

    def value_and_grad(
        self,
        rows: Tensor,
        block: Block,
        params: Sequence[Tensor],
        needed: Sequence[bool],
        scale: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
        """As `BlockLoss`; the forward KL in closed form."""
        found = None
        if self.has_closed_form:
            closed_form = self._closed_form if readable(rows) else self._closed_form_in_log_space
            found = closed_form(rows, block, params, needed, scale)
        return found or super().value_and_grad(rows, block, params, needed, scale)

    def value(self, rows: Tensor, block: Block, params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As `BlockLoss`, by the closed form as `value_and_grad`."""
        found = None
        if self.has_closed_form and readable(rows):
            none = [False for _ in params]
            found = self._closed_form(rows, block, params, none, 1.0, want_grad=False)
        return super().value(rows, block, params) if found is None else found[:2]

    @torch.no_grad()
    def _closed_form(
        self,
        rows: Tensor,
        block: Block,
        params: Sequence[Tensor],
        needed: Sequence[bool],
        scale: float | Tensor,
        *,
        want_grad: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]] | None:
        logits = merge_rows(rows, block.segments, len(block))
        if self.temperature != 1.0:
            logits = logits / self.temperature
        probs = torch.softmax(logits, 1)
        empty = probs.index_select(1, self.empty_rows).sum() if self.tells_empty else None
        chosen = self.part.rows if self.columns is None else None
        table = (probs if chosen is None else probs.index_select(1, chosen)).t().contiguous()
        rest = None
        if self._reads_kept_logits():
            places, log_teacher, rest = self._kept_logits(block)
            if not bool((rest < torch.inf).all()):
                return None  # a logit that is no number, which the loss itself does not see
        else:
            places, log_teacher = self.teacher_columns(block)
        mass = log_teacher.new_zeros(0)
        if self.tail_bucket or self.teacher.stored_power != 1.0:
            mass = torch.logsumexp(log_teacher * self.teacher.stored_power, -1).exp()
        tail = None
        if self.tail_bucket:
            outside = params[1].to(probs.dtype)
            inside = outside if chosen is None else outside[chosen]
            log_tail = self._teacher_tail(block, places, mass)
            has_tail = self._has_tail(places)
            if has_tail is not None and not bool(has_tail.all()):
                return None
            tail = Tail(log_tail, probs @ outside, inside)
        elif chosen is None:
            del probs  # as large as the table
        weights = logits.new_ones(len(block))
        if self.weights is not None:
            weights = self.weights[block.start : block.stop].to(logits.dtype)
        factor = weights * self.temperature**2
        if self._values_by_input is None:
            self._values_by_input = params[0][self.part.map.transposed]
        found = forward_kl(
            table,
            log_teacher,
            places,
            params[0],
            self._values_by_input,
            self.part.map,
            factor * scale,
            tail=tail,
            want_values=needed[0],
            want_best=self.full_metrics,
            want_grad=want_grad,
        )
        if found is None:
            return None
        if rest is not None:  # kept over kept and rest
            mass = torch.sigmoid(found.log_mass - rest)
        elif len(mass) == 0:
            mass = torch.exp(found.log_mass)
        sums = [found.loss.sum(), mass.sum()]
        if found.best is not None:
            sums.append((log_teacher.argmax(-1) == found.best).sum().to(mass.dtype))
        if empty is not None:
            sums.append(empty)
        if found.grad is None:  # none is wanted
            return (found.loss * factor).sum(), torch.stack(sums), rows, []
        slope = found.tail_slope
        grad_params = [found.grad_values]
        if slope is not None:
            grad_params.append(slope @ probs if needed[1] else None)
        # Turned by itself: a scatter from a turned source takes twice as long.
        grad = found.grad.t().contiguous()
        if chosen is not None:
            # W's part holds nothing of the other tokens: they are wholly in the tail, or nowhere.
            others = probs.zero_() if slope is None else probs.mul_(slope[:, None])
            grad = others.scatter_(1, chosen.expand(len(others), -1), grad)
        if self.temperature != 1.0:
            grad.div_(self.temperature)
        grad = unmerge_rows(grad, block.segments)
        return (found.loss * factor).sum(), torch.stack(sums), grad, grad_params

    @torch.no_grad()
    def _closed_form_in_log_space(
        self,
        rows: Tensor,
        block: Block,
        params: Sequence[Tensor],
        needed: Sequence[bool],
        scale: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
        """As `_closed_form`, on a device: at no value does anybody look."""
        logits = merge_rows(rows, block.segments, len(block))
        if self.temperature != 1.0:
            logits = logits / self.temperature
        chosen = self.part.rows if self.columns is None else None
        every = logits.t().contiguous()
        places, log_teacher = self.teacher_columns(block)
        mass = torch.logsumexp(log_teacher * self.teacher.stored_power, -1).exp()
        tail = None
        if self.tail_bucket:
            tail = LogTail(
                self._teacher_tail(block, places, mass), log_shares(params[1].to(logits.dtype)),
                every, self._has_tail(places),
            )  # fmt: skip
        weights = logits.new_ones(len(block))
        if self.weights is not None:
            weights = self.weights[block.start : block.stop].to(logits.dtype)
        factor = weights * self.temperature**2
        found = forward_kl_in_log_space(
            every if chosen is None else every.index_select(0, chosen),
            log_teacher, places, params[0], self.part.map, factor * scale,
            tail=tail, want_values=needed[0], want_best=self.full_metrics,
        )  # fmt: skip
        sums = [block.sum(found.loss), block.sum(mass)]
        if found.best is not None:
            sums.append(block.sum(log_teacher.argmax(-1) == found.best).to(mass.dtype))
        if self.tells_empty:
            sums.append(block.sum(self._empty_mass(logits)))
        grad = found.grad
        if chosen is not None:
            grad = torch.zeros_like(every).index_copy(0, chosen, grad)
        grad_params = [found.grad_values]
        if found.tail is not None:
            slope, log_tail = found.tail
            # What each token has of the tail's mass; a row without one has no slope.
            shares = torch.exp(every - torch.where(torch.isneginf(log_tail), 0.0, log_tail))
            shares = torch.where(slope == 0, 0.0, shares * slope)
            grad = grad + shares * params[1].to(grad.dtype)[:, None]
            grad_params.append(shares.sum(1) if needed[1] else None)
        grad = grad.t().contiguous()
        if self.temperature != 1.0:
            grad = grad / self.temperature
        grad = unmerge_rows(grad, block.segments)
        return block.sum(found.loss * factor), torch.stack(sums), grad, grad_params

    def _reads_kept_logits(self) -> bool:
        """Whether the teacher's kept logits are enough: the loss does not see their denominator,
        and what is not kept is wanted as one sum alone."""
        teacher = self.teacher
        return (
            not isinstance(teacher.signal, TeacherTopK)
            and teacher.log_totals is None
            and not self.tail_bucket
        )

    def _kept_logits(self, block: Block) -> tuple[Tensor | None, Tensor, Tensor]:
        """As `_teacher` with logits in place of log-probs, and [R] the log of the sum of exp of all
        that is not kept."""
        columns = self.part.columns
        logits = self.teacher.logits(block.start, block.stop, columns)
        rest = logits.new_full((len(logits),), -torch.inf)
        if columns is not None:
            rest = self.teacher.outside_kept(block.start, block.stop, self._other_columns())
        if self.chunk_top_k is None or self.chunk_top_k >= logits.shape[1]:
            return None, logits, rest
        kept, places = best_of(logits, self.chunk_top_k)
        # In place: the block is this one's own.
        others = logits.scatter_(1, places, -torch.inf)
        return places, kept, torch.logaddexp(rest, torch.logsumexp(others, -1))

    def _other_columns(self) -> Tensor:
        """The teacher's columns that are not in `part`."""
        if self._others is None:
            device = self.part.entries.device
            mask = torch.ones(self.teacher.vocab_size, dtype=torch.int8, device=device)
            mask[self.part.columns] = 0
            self._others = mask.nonzero().flatten()
        return self._others

    def teacher_columns(
        self, block: Block, log_student: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Each chunk's own places in the shared columns (None: all of them), and log-probs there.

        [R, k] each; a stored entry that W does not reach has the place past the last, and -inf.
        Where the student chooses, `log_student` [R, K] is what it chooses by.
        """
        if self.chunk_top_k is not None and isinstance(self.teacher.signal, TeacherTopK):
            ids, log_teacher = self.teacher.top_k(block.start, block.stop)
            columns = taken(self.column_of, ids)
            reached = columns < self.part.map.output_ptr.shape[0] - 1
            log_teacher = log_teacher.masked_fill(~reached, -torch.inf)
            if log_student is not None:
                every = torch.nn.functional.pad(log_student.detach(), (0, 1), value=-torch.inf)
                likely = every.gather(1, columns).masked_fill(~reached, -torch.inf)
                _, order = best_of(likely, self.chunk_top_k)
                return columns.gather(1, order), log_teacher.gather(1, order)
            if self.chunk_top_k >= log_teacher.shape[1]:
                return columns, log_teacher
            log_teacher, order = best_of(log_teacher, self.chunk_top_k)
            return columns.gather(1, order), log_teacher
        log_teacher = self.teacher.log_probs(block.start, block.stop, self.part.columns)
        if self.chunk_top_k is None:
            return None, log_teacher
        if log_student is not None:
            _, columns = best_of(log_student.detach(), self.chunk_top_k)
            return columns, log_teacher.gather(1, columns)
        log_teacher, columns = best_of(log_teacher, self.chunk_top_k)
        return columns, log_teacher

    def _teacher_tail(self, block: Block, places: Tensor | None, mass: Tensor) -> Tensor:
        """[R] log of what the kept columns leave of the teacher's mass."""
        ids = self.part.columns
        if places is not None and not isinstance(self.teacher.signal, TeacherTopK):
            ids = places if ids is None else ids[places]
        return self.teacher.log_outside(block.start, block.stop, mass, ids)

    def _has_tail(self, places: Tensor | None) -> Tensor | None:
        """[R] bool, whether W reaches columns outside of those that a chunk keeps; None for yes."""
        if self.all_columns is None or places is None:
            return None
        kept = places < self.part.map.output_ptr.shape[0] - 1
        return kept.sum(1) < self.all_columns

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
