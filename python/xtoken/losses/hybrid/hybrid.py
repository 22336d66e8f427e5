"""KL on a common set of token pairs plus sorted L1 on the rest: GOLD, H-KL and ULD share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xtoken.errors import OptionError
from xtoken.losses.engine.divergence import Direction, divergence
from xtoken.losses.engine.merge import ChunkRows, merge_rows
from xtoken.losses.engine.places import Places
from xtoken.losses.engine.row_blocks import Block, BlockLoss
from xtoken.losses.engine.run import LossCall
from xtoken.losses.engine.sorting import sorted_l1
from xtoken.losses.engine.teacher_rows import TeacherRows
from xtoken.tensors.once import once_differentiable
from xtoken.tensors.pair_parts import CommonSet
from xtoken.tensors.stop_fold import StopFold, folded_logits
from xtoken.tensors.teacher_signal import TeacherTopK


@dataclass(eq=False, kw_only=True)
class HybridBlocks(BlockLoss):
    """Partial KL over common pairs and sorted L1 over the uncommon tokens, a block of chunks.

    The common probabilities are those of the full softmax, not renormalized: the partial KL can
    be below 0, and its gradient on each uncommon student logit j is p[j] * (the teacher's mass on
    the common set), never below 0 (Proposition 1 of X-Token, arXiv 2605.21699).
    """

    student: ChunkRows
    teacher: TeacherRows
    student_common: Tensor
    teacher_common: Tensor
    student_rest: Tensor
    teacher_rest: Tensor
    fold: StopFold | None
    common_weight: float
    uld_weight: float
    temperature: float
    direction: Direction
    beta: float
    full_metrics: bool

    def __post_init__(self) -> None:
        agreement = ("top1_agreement",) if self.full_metrics else ()
        self.metric_names = ("kl", "uld", "teacher_mass", "student_mass", *agreement)

    def narrowed(self, places: Places) -> HybridBlocks:
        """As `BlockLoss`."""
        return replace(self, student=places.student, teacher=self.teacher.narrowed(places))

    def forward(
        self, rows: Tensor, block: Block, params: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        merged = merge_rows(rows, block.segments, len(block))
        logits = folded_logits(merged, self.temperature, self.fold)
        log_teacher = self.teacher.log_probs(block.start, block.stop)
        if len(self.student_common):
            log_student = torch.log_softmax(logits, -1)
            zero = log_student[:, :0].sum(1)  # with a graph, where neither term adds one
            kl, masses = self._on_common(log_student, log_teacher)
            student = torch.exp(log_student.index_select(1, self.student_rest))
            log_teacher = log_teacher.index_select(1, self.teacher_rest)
        else:
            student = _softmax(logits)
            kl = zero = student[:, :0].sum(1)
            masses = [zero] * (2 + self.full_metrics)
        uld = zero
        if self.uld_weight and len(self.student_rest) + len(self.teacher_rest):
            uld = sorted_l1(student, log_teacher.exp_())
        loss = (self.common_weight * kl + self.uld_weight * uld) * self.temperature**2
        return loss, torch.stack([block.sum(x.detach()) for x in (kl, uld, *masses)])

    def _on_common(self, log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[C] the partial KL, and the masses on the common set, with `full_metrics` the agreement
        within it; of [C, V_s] and [C, V_t] log-probabilities."""
        student = log_student.index_select(1, self.student_common)
        teacher = log_teacher.index_select(1, self.teacher_common)
        found = [torch.exp(teacher).sum(-1), torch.exp(student.detach()).sum(-1)]
        if self.full_metrics:
            best = teacher.argmax(-1) == student.detach().argmax(-1)
            found.append(best.to(student.dtype))
        return divergence(teacher, student, self.direction, self.beta), found


def _softmax(logits: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.softmax(logits, -1)
    probs: Tensor = _Softmax.apply(logits)
    return probs


class _Softmax(torch.autograd.Function):
    """Over the last dimension; the gradient of torch's own rounds otherwise on another number of
    threads, where rows are no multiple of 8."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        probs = torch.softmax(logits, -1)
        ctx.save_for_backward(probs)
        return probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor]:
        (probs,) = ctx.saved_tensors
        found = grad * probs
        return (found.addcmul_(probs, found.sum(-1, keepdim=True), value=-1),)


def hybrid_blocks(call: LossCall, common: CommonSet | None) -> tuple[HybridBlocks, int]:
    """The loss behind `gold`, `h_kl` and `uld`, which has no common set."""
    student_size, teacher_size = call.pair.sizes
    none = torch.zeros(0, dtype=torch.int64, device=call.device)
    student_common = none if common is None else common.student_ids
    teacher_common = none if common is None else common.teacher_ids
    options, teacher = call.options, call.teacher
    if options.direction == "reverse" and isinstance(teacher, TeacherTopK):
        stored = teacher.ids.shape[-1]
        if stored < teacher_size and len(student_common):  # of none there is no KL
            raise OptionError(
                f"direction = 'reverse' with a stored top-{stored} is infinite: the student has "
                "mass on tokens that are not stored; pass 'forward' or 'jsd', or full logits"
            )
    loss = HybridBlocks(
        student=call.student_chunks(options.merge),
        teacher=call.teacher_rows(options.merge),
        student_common=student_common,
        teacher_common=teacher_common,
        student_rest=_others(student_common, student_size),
        teacher_rest=_others(teacher_common, teacher_size),
        fold=None if common is None else call.pair.student_stop_fold,
        common_weight=options.common_weight,
        uld_weight=options.uld_weight,
        temperature=call.temperature,
        direction=options.direction,
        beta=options.beta,
        full_metrics=options.full_metrics,
    )
    return loss, max(student_size, teacher_size)


def _others(ids: Tensor, size: int) -> Tensor:
    """The ids below `size` that are not in `ids`, ascending; their number is known beforehand."""
    taken = torch.zeros(size, dtype=torch.int8, device=ids.device)
    taken.index_fill_(0, ids, 1)  # a number put at an index would wait for the device
    return torch.argsort(taken, stable=True)[: size - len(ids)]
