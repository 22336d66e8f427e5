"""Strict top-k: reverse KL at 1:1 chunks, on the shared tokens that the student likes best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xtoken.losses.engine.checks import zero_or_nan
from xtoken.losses.engine.divergence import kl_sum
from xtoken.losses.engine.loss_spec import LossSpec
from xtoken.losses.engine.merge import ChunkRows
from xtoken.losses.engine.places import Places
from xtoken.losses.engine.row_blocks import Block, BlockLoss
from xtoken.losses.engine.run import LossCall, run_loss
from xtoken.losses.engine.sorting import top_k as best_of
from xtoken.losses.engine.teacher_rows import TeacherRows
from xtoken.losses.inputs import DEFAULT_OPTIONS, LossInputs, LossOptions
from xtoken.losses.output import LossOutput
from xtoken.tensors.pair_parts import CommonSet, PairParts
from xtoken.tensors.stop_fold import StopFold, folded_logits
from xtoken.tensors.teacher_signal import TeacherTopK


def strict_top_k(
    inputs: LossInputs, pair: PairParts, options: LossOptions = DEFAULT_OPTIONS
) -> LossOutput:
    """Mean over chunks of KL(student || teacher) at chunks of one token on both sides.

    The support of each chunk is the student's own `student_top_k` likeliest among the tokens that
    both vocabularies have; both sides are renormalized on it. Other chunks are counted with 0.

    Args:
        inputs: of a `TeacherTopK` the support is chosen among the stored tokens.
        pair: with `strict_common`: the tokens of equal bytes.
        options: `student_top_k`; None for all shared tokens. The direction is the reverse one.

    Returns: loss in nats per chunk, >= 0 up to rounding; 0 for a student equal to its teacher.
        Metrics: `kl`, `strict` (the share of chunks that are compared), and per chunk compared or
        not `teacher_mass` and `student_mass` on the support.

    Raises:
        XTokenError: as `p_kl`.

    Source: Hou et al. 2026, arXiv 2610.08448, its strict loss with student-selected support. The
        paper divides by the number of strict positions, this by that of chunks.
    """
    return run_loss(SPEC, _blocks, inputs, pair, options)


SPEC = LossSpec.of(
    "strict-top-k", strict_top_k, "student_top_k", without=frozenset({"direction", "beta"})
)


def _blocks(call: LossCall) -> tuple[StrictTopKBlocks, int]:
    common = call.pair.strict_common
    assert common is not None
    chunks = call.chunks
    sizes = chunks.student_end - chunks.student_start, chunks.teacher_end - chunks.teacher_start
    loss = StrictTopKBlocks(
        student=call.student_chunks("chain"),
        teacher=call.teacher_rows("chain", renormalized=True),
        strict=(sizes[0] == 1) & (sizes[1] == 1),
        common=common,
        fold=call.pair.student_stop_fold,
        kept=min(call.options.student_top_k or len(common), len(common)),
        temperature=call.temperature,
    )
    return loss, max(call.pair.sizes)


@dataclass(eq=False, kw_only=True)
class StrictTopKBlocks(BlockLoss):
    """The reverse KL of a block of chunks.

    Attributes:
        strict: [C] bool, the chunks of one token on both sides.
        kept: size of the support, at most that of `common`.
    """

    student: ChunkRows
    teacher: TeacherRows
    strict: Tensor
    common: CommonSet
    fold: StopFold | None
    kept: int
    temperature: float
    metric_names = ("kl", "strict", "teacher_mass", "student_mass")

    def narrowed(self, places: Places) -> StrictTopKBlocks:
        """As `BlockLoss`."""
        return replace(
            self,
            student=places.student,
            teacher=self.teacher.narrowed(places),
            strict=places.of_chunks(self.strict),
        )

    def forward(
        self, rows: Tensor, block: Block, params: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        logits = folded_logits(rows, self.temperature, self.fold)
        strict = self.strict[block.start : block.stop]
        shared = logits.index_select(1, self.common.student_ids)
        log_teacher = self.teacher.log_probs(block.start, block.stop, self.common.teacher_ids)
        log_all, known = log_teacher, None
        if isinstance(self.teacher.signal, TeacherTopK):
            known = torch.isfinite(log_teacher)
            shared = shared.masked_fill(~known, -torch.inf)
        if self.kept == 0:  # nothing is shared
            zero = shared.sum(1) + logits[:, :0].sum(1)
            return zero, torch.stack([block.sum(zero.detach())] * 4)
        _, places = best_of(shared.detach(), self.kept)
        log_student, log_teacher = shared.gather(1, places), log_teacher.gather(1, places)
        silent = ~strict[:, None]
        if known is not None:
            silent = silent | torch.isneginf(log_teacher).all(1, keepdim=True)
        power = self.teacher.stored_power
        teacher_mass = torch.logsumexp(log_teacher * power, 1).exp()
        student_mass = torch.logsumexp(log_student.detach(), 1) - torch.logsumexp(
            logits.detach(), 1
        )
        student = torch.log_softmax(log_student.masked_fill(silent, 0.0), 1)
        teacher = torch.log_softmax(log_teacher.masked_fill(silent, 0.0), 1)
        losses = kl_sum(student, teacher) + zero_or_nan(logits) + zero_or_nan(log_all)
        sums = (losses.detach(), strict.to(losses.dtype), teacher_mass, student_mass.exp())
        return losses * self.temperature**2, torch.stack([block.sum(each) for each in sums])
