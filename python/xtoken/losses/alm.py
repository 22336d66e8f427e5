"""ALM: the likelihoods of aligned chunks, each made a coin toss (arXiv 2503.20083).

A chunk's probability is the product of its tokens', on both sides, and the same bytes have one on
both. The loss compares the two tosses p^(1/temperature): it needs no correspondence of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xtoken.errors import OptionError
from xtoken.losses.engine.checks import check_token_ids, inside
from xtoken.losses.engine.divergence import Direction, divergence
from xtoken.losses.engine.loss_spec import LossSpec
from xtoken.losses.engine.merge import ChunkRows, chunk_rows
from xtoken.losses.engine.places import Places
from xtoken.losses.engine.row_blocks import Block, BlockLoss
from xtoken.losses.engine.run import LossCall, run_loss
from xtoken.losses.engine.tail import safe_logsumexp
from xtoken.losses.inputs import DEFAULT_OPTIONS, LossInputs, LossOptions
from xtoken.losses.output import LossOutput
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.full_logits import FullLogits
from xtoken.tensors.pair_parts import PairParts
from xtoken.tensors.rows import block_rows, upcast
from xtoken.tensors.teacher_signal import Teacher, TeacherTopK, teacher_positions


def alm(inputs: LossInputs, pair: PairParts, options: LossOptions = DEFAULT_OPTIONS) -> LossOutput:
    """Mean over chunks of the divergence between two binarised chunk likelihoods.

    Args:
        inputs: with both sides' ids; a `TeacherTopK` needs `token_log_probs`.
        pair: its sizes alone.
        options: `temperature` is the root taken of the likelihoods, 100 as in the paper; the
            softmax itself stays at 1 and the loss is not rescaled. `direction` and `beta` are those
            of the divergence between (p, 1 - p) and (q, 1 - q).

    Returns: loss in nats per chunk, >= 0. Metrics: `kl` (the same divergence), and the mean chunk
        log-likelihoods `student_log_prob` and `teacher_log_prob`.

    Raises:
        XTokenError: as `p_kl`; a token outside its vocabulary; a top-k without `token_log_probs`.

    Source: Minixhofer et al. 2025, arXiv 2503.20083, without its outcome debiasing and thresholds.
    """
    return run_loss(SPEC, _blocks, inputs, pair, options)


SPEC = LossSpec.of("alm", alm, needs_ids=True, temperature=100.0)


def _blocks(call: LossCall) -> tuple[AlmBlocks, int]:
    student_ids, teacher_ids = call.ids()
    where = call.student_chunks(None)
    targets = student_ids.flatten()[where.index + 1]
    check_token_ids(targets, call.source.vocab_size, "student")
    loss = AlmBlocks(
        student=where,
        targets=targets,
        teacher=teacher_chunk_log_probs(call.teacher, teacher_ids, call.chunks, call.pair.sizes[1]),
        temperature=call.temperature,
        direction=call.options.direction,
        beta=call.options.beta,
    )
    return loss, call.source.vocab_size


@torch.no_grad()
def teacher_chunk_log_probs(
    teacher: Teacher, teacher_ids: Tensor, chunks: ChunkBatch, vocab_size: int
) -> Tensor:
    """[C] the teacher's log-likelihood of each chunk's tokens."""
    where = chunk_rows(chunks, "teacher", teacher_positions(teacher)[1], None)
    tokens = teacher_token_log_probs(teacher, teacher_ids, where.index, vocab_size)
    assert where.owner is not None
    return tokens.new_zeros(where.count).index_add_(0, where.owner, tokens)


@torch.no_grad()
def teacher_token_log_probs(
    teacher: Teacher, teacher_ids: Tensor, index: Tensor, vocab_size: int
) -> Tensor:
    """[N] log-probability of the token after each of the flattened positions `index`."""
    if isinstance(teacher, TeacherTopK):
        teacher.require_temperature(1.0, "the likelihood of a text is at")
        if teacher.token_log_probs is None:
            raise OptionError(
                "the stored top-k lacks token_log_probs, the teacher's log-probability of each "
                "next token; make it with TeacherTopK.from_logits(logits, k, ids=teacher_ids)"
            )
        return upcast(teacher.token_log_probs.flatten()[index])
    full = FullLogits.of(teacher, vocab_size)
    targets = teacher_ids.flatten()[index + 1]
    check_token_ids(targets, full.width, "teacher")
    step = block_rows(full.width, full.device)
    parts = [torch.zeros(0, dtype=full.dtype, device=full.device)]
    for start in range(0, len(index), step):
        rows = full.rows(index[start : start + step])
        parts.append(_token_log_probs(rows, targets[start : start + step]))
    return torch.cat(parts)


def _token_log_probs(rows: Tensor, targets: Tensor) -> Tensor:
    targets, outside = inside(targets, rows.shape[1])
    own = rows.gather(1, targets[:, None]).squeeze(1)
    # From the sum of all others, as 1 - p must keep its digits where p is nearly 1.
    others = safe_logsumexp(rows.scatter(1, targets[:, None], -torch.inf))
    found = -torch.nn.functional.softplus(others - own)
    return found if outside is None else found.masked_fill(outside, torch.nan)


@dataclass(eq=False, kw_only=True)
class AlmBlocks(BlockLoss):
    """The binarised divergence of a block of chunks.

    `targets` [N] are the tokens that the student's rows predict, `teacher` [C] the teacher's
    log-likelihood of each chunk.
    """

    student: ChunkRows
    targets: Tensor
    teacher: Tensor
    temperature: float
    direction: Direction
    beta: float
    metric_names = ("kl", "student_log_prob", "teacher_log_prob")

    def narrowed(self, places: Places) -> AlmBlocks:
        """As `BlockLoss`."""
        rows = self.student.range_of(places.start, places.stop)
        return replace(
            self,
            student=places.student,
            targets=places.fill(self.targets[rows]),
            teacher=places.of_chunks(self.teacher),
        )

    def forward(
        self, rows: Tensor, block: Block, params: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        assert block.segments is not None
        targets = self.targets[self.student.range_of(block.start, block.stop)]
        tokens = _token_log_probs(rows, targets)
        student = tokens.new_zeros(len(block)).index_add(0, block.segments, tokens)
        teacher = self.teacher[block.start : block.stop].to(student.dtype)
        loss = divergence(
            _toss(teacher / self.temperature), _toss(student / self.temperature),
            self.direction, self.beta,
        )  # fmt: skip
        sums = (loss.detach(), student.detach(), teacher)
        return loss, torch.stack([block.sum(each) for each in sums])


def _toss(log_prob: Tensor) -> Tensor:
    """[R] log p to [R, 2] log (p, 1 - p).

    Rounding can put a certain chunk's log p at 0 or above, and 1 - p at no mass at all, where a
    divergence is infinite; 1 - p is not known below one rounding, which is its floor.
    """
    log_prob = log_prob.clamp(max=-torch.finfo(log_prob.dtype).eps)
    return torch.stack([log_prob, torch.log(-torch.expm1(log_prob))], -1)
