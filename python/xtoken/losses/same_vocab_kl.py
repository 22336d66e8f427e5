"""KL to a teacher that shares the student's tokenizer: no alignment, no W."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xtoken.errors import OptionError, PairError
from xtoken.losses.engine.divergence import Direction, divergence
from xtoken.losses.engine.loss_spec import LossSpec
from xtoken.losses.engine.merge import ChunkRows, merge_rows, unmerge_rows
from xtoken.losses.engine.places import Places
from xtoken.losses.engine.row_blocks import Block, BlockLoss, Later
from xtoken.losses.engine.run import LossCall, run_loss
from xtoken.losses.engine.sorting import top_k as best_of
from xtoken.losses.engine.student_rows import StudentRows
from xtoken.losses.engine.tail import safe_logsumexp, with_tail
from xtoken.losses.engine.teacher_rows import TeacherRows
from xtoken.losses.inputs import DEFAULT_OPTIONS, LossInputs, LossOptions
from xtoken.losses.kernels.same_vocab import same_vocab_in_two, same_vocab_pass
from xtoken.losses.output import LossOutput
from xtoken.losses.p_kl.loss import check_chooser
from xtoken.tensors.pair_parts import PairParts
from xtoken.tensors.teacher_signal import TeacherTopK


def same_vocab_kl(
    inputs: LossInputs, pair: PairParts, options: LossOptions = DEFAULT_OPTIONS
) -> LossOutput:
    """Mean divergence over tokens; forward KL by default.

    Args:
        inputs: `chunks` from `ChunkBatch.from_mask(mask)`, or of an alignment. With a
            `TeacherTopK` or a `top_k` both sides are renormalized over each row's stored or chosen
            entries, or given a tail bucket for all that is not kept.
        pair: of equal sizes; no further part.

    Returns: loss in nats per chunk, >= 0 up to rounding. Metrics: `kl`, `teacher_mass` (stored),
        and, with `full_metrics`, `top1_agreement`.

    Raises:
        XTokenError: as `p_kl`; sides of different sizes; `tail_bucket=True` with full logits, which
            leave no tail.
    """
    return run_loss(SPEC, _blocks, inputs, pair, options)


SPEC = LossSpec.of(
    "same-vocab-kl", same_vocab_kl, "merge", "top_k", "top_k_by", "tail_bucket", "full_metrics"
)


def _blocks(call: LossCall) -> tuple[SameVocabBlocks, int]:
    student_size, teacher_size = call.pair.sizes
    if student_size != teacher_size:
        raise PairError(
            f"the student has {student_size} tokens, the teacher {teacher_size}; pass a pair of "
            "one tokenizer, or another loss"
        )
    options, stored = call.options, isinstance(call.teacher, TeacherTopK)
    check_chooser(options)
    kept = options.top_k if options.top_k is not None and options.top_k < teacher_size else None
    if options.tail_bucket is True and not stored and kept is None:
        raise OptionError(
            "tail_bucket=True, but full logits leave no tail; pass a TeacherTopK, or a top_k below "
            f"{teacher_size}"
        )
    loss = SameVocabBlocks(
        student=call.student_chunks(options.merge),
        teacher=call.teacher_rows(options.merge, renormalized=not options.tail_bucket),
        top_k=kept,
        by_student=options.top_k_by == "student",
        tail_bucket=bool(options.tail_bucket) and (stored or kept is not None),
        full_metrics=options.full_metrics,
        temperature=call.temperature,
        direction=options.direction,
        beta=options.beta,
    )
    return loss, student_size


@dataclass(eq=False, kw_only=True)
class SameVocabBlocks(BlockLoss):
    """The divergence of a block of chunks over one vocabulary.

    Attributes:
        top_k: columns that each chunk keeps; None for all, or all that are stored.
        by_student: whether they are the student's likeliest, not the teacher's.
    """

    student: ChunkRows
    teacher: TeacherRows
    top_k: int | None
    by_student: bool
    tail_bucket: bool
    full_metrics: bool
    temperature: float
    direction: Direction
    beta: float

    def __post_init__(self) -> None:
        agreement = ("top1_agreement",) if self.full_metrics else ()
        self.metric_names = ("kl", "teacher_mass", *agreement)
        self.has_closed_form = (
            self.direction == "forward"
            and self.top_k is None
            and not isinstance(self.teacher.signal, TeacherTopK)
        )

    def narrowed(self, places: Places) -> SameVocabBlocks:
        """As `BlockLoss`."""
        return replace(self, student=places.student, teacher=self.teacher.narrowed(places))

    def forward(
        self, rows: Tensor, block: Block, params: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        logits = merge_rows(rows, block.segments, len(block))
        if self.temperature != 1.0:
            logits = logits / self.temperature
        log_student = torch.log_softmax(logits, -1)
        found = self._kept(block, log_student)
        if found is None:
            log_teacher = self.teacher.log_probs(block.start, block.stop)
            mass = log_teacher.new_ones(len(block))
        else:
            columns, log_teacher = found
            mass = torch.logsumexp(log_teacher * self.teacher.stored_power, -1).exp()
            # One column past the last, for stored ids beyond V.
            every = torch.nn.functional.pad(log_student, (0, 1), value=-torch.inf)
            log_student = every.gather(1, columns)
            if self.tail_bucket:
                size = self.teacher.vocab_size
                log_teacher, log_student = with_tail(
                    log_teacher, log_student,
                    self.teacher.log_outside(block.start, block.stop, mass, columns),
                    safe_logsumexp(every.scatter(1, columns, -torch.inf)),
                    (columns < size).sum(1) < size,
                )  # fmt: skip
            log_teacher = torch.log_softmax(log_teacher, -1)
            log_student = torch.log_softmax(log_student, -1)
        loss = divergence(log_teacher, log_student, self.direction, self.beta)
        sums = [block.sum(loss.detach()), block.sum(mass)]
        if self.full_metrics:
            best = log_teacher.argmax(-1) == log_student.detach().argmax(-1)
            sums.append(block.sum(best).to(loss.dtype))
        return loss * self.temperature**2, torch.stack(sums)

    def _kept(self, block: Block, log_student: Tensor) -> tuple[Tensor, Tensor] | None:
        """[R, k] the columns of each chunk and the teacher's log-probabilities there; V for a pad.
        None where all columns are compared."""
        start, stop = block.start, block.stop
        if isinstance(self.teacher.signal, TeacherTopK):
            columns, log_teacher = self.teacher.top_k(start, stop)
            if self.top_k is None:
                return columns, log_teacher
            likely = log_teacher
            if self.by_student:
                every = torch.nn.functional.pad(log_student.detach(), (0, 1), value=-torch.inf)
                likely = every.gather(1, columns)
            _, order = best_of(likely, self.top_k)
            return columns.gather(1, order), log_teacher.gather(1, order)
        if self.top_k is None:
            return None
        log_teacher = self.teacher.log_probs(start, stop)
        _, columns = best_of(log_student.detach() if self.by_student else log_teacher, self.top_k)
        return columns, log_teacher.gather(1, columns)

    def by_kernel(
        self,
        source: StudentRows,
        scale: float | Tensor,
        needed: tuple[bool, ...],
        grads: list[Tensor | None] | None,
    ) -> tuple[Tensor, Tensor, list[Tensor | None]] | None:
        """As `BlockLoss`."""
        return same_vocab_pass(self, source, scale, needed, grads)

    def in_two(
        self, source: StudentRows, scale: float | Tensor
    ) -> tuple[Tensor, Tensor, Later] | None:
        """As `BlockLoss`."""
        return same_vocab_in_two(self, source, scale)

    def value(self, rows: Tensor, block: Block, params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As `BlockLoss`, by the closed form as `value_and_grad`."""
        if not self.has_closed_form:
            return super().value(rows, block, params)
        return self.value_and_grad(rows, block, params, [], 1.0)[:2]

    def value_and_grad(
        self,
        rows: Tensor,
        block: Block,
        params: Sequence[Tensor],
        needed: Sequence[bool],
        scale: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
        """As `BlockLoss`; the forward KL to full logits in closed form: p - q."""
        if not self.has_closed_form:
            return super().value_and_grad(rows, block, params, needed, scale)
        with torch.no_grad():
            tau = self.temperature
            logits = merge_rows(rows, block.segments, len(block))
            log_student = torch.log_softmax(logits if tau == 1.0 else logits / tau, -1)
            log_teacher = torch.log_softmax(self.teacher.logits(block.start, block.stop), -1)
            sums = []
            if self.full_metrics:
                best = log_teacher.argmax(-1) == log_student.argmax(-1)
                sums = [block.sum(best).to(log_student.dtype)]
            teacher = torch.exp(log_teacher).to(log_student.dtype)
            # In the log-probabilities' places; 0 where the teacher has none, whatever the student.
            terms = log_teacher.to(log_student.dtype).sub_(log_student).mul_(teacher)
            loss = terms.masked_fill_(teacher == 0, 0.0).sum(1)
            weight = loss.new_full((len(block),), tau**2)
            if self.weights is not None:
                weight = weight * self.weights[block.start : block.stop].to(loss.dtype)
            grad = log_student.exp_().sub_(teacher).mul_((weight * (scale / tau))[:, None])
            metrics = torch.stack([block.sum(loss), block.sum(torch.ones_like(loss)), *sums])
            return block.sum(loss * weight), metrics, unmerge_rows(grad, block.segments), []
