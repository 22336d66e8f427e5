"""Partition KL of a block of chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xtoken.losses.engine.divergence import Direction, divergence
from xtoken.losses.engine.merge import ChunkRows
from xtoken.losses.engine.row_blocks import Block, BlockLoss
from xtoken.losses.engine.tail import safe_logsumexp
from xtoken.losses.engine.teacher_rows import TeacherRows
from xtoken.losses.partition_kl.places import ChainPlaces
from xtoken.tensors.host import on_device
from xtoken.tensors.pair_parts import CommonSet
from xtoken.tensors.piece_chains import PieceChains
from xtoken.tensors.segments import owners, ragged_arange
from xtoken.tensors.stop_fold import StopFold, folded_logits


@dataclass(frozen=True, eq=False)
class Ending:
    """One side of a block's chunks: how likely each is to be as it is but for its last token.

    Attributes:
        before: [R] log-probability of the tokens before the last; 0 for chunks of one.
        rows: [R, V] log-probabilities at the last.
        own: [R] int64 the last token itself, and `own_log_prob` [R].
        alone: [R] bool, chunks of one token.
        compared: [R, V] bool, the last tokens that have a slot of their own.
    """

    before: Tensor
    rows: Tensor
    own: Tensor
    own_log_prob: Tensor
    alone: Tensor
    compared: Tensor

    @classmethod
    def of(
        cls, rows: Tensor, tokens: Tensor, log_probs: Tensor, segments: Tensor, ends: Tensor
    ) -> Ending:
        """From the rows [n, V] of all tokens, the tokens and their log-probabilities [n], the chunk
        of each, and the place after each chunk's last."""
        last = ends - 1
        count = len(ends)
        is_last = torch.zeros_like(tokens, dtype=torch.bool).index_fill(0, last, True)
        before = log_probs.new_zeros(count).index_add(
            0, segments, log_probs.masked_fill(is_last, 0.0)
        )
        sizes = tokens.new_zeros(count).index_add(0, segments, torch.ones_like(tokens))
        own, at = tokens[last], rows.index_select(0, last)
        compared = torch.zeros_like(at, dtype=torch.bool).scatter(1, own[:, None], True)
        return cls(before, at, own, log_probs[last], sizes == 1, compared)

    def rest(self, at_last: Tensor) -> Tensor:
        """[R] log-probability of all that has no slot, from that at the last token alone."""
        eps = torch.finfo(self.before.dtype).eps
        before = torch.where(self.alone, -1.0, self.before.clamp(max=-eps))
        otherwise = torch.log(-torch.expm1(before))
        return torch.where(self.alone, at_last, torch.logaddexp(otherwise, self.before + at_last))


@dataclass(eq=False, kw_only=True)
class PartitionKLBlocks(BlockLoss):
    """The divergence of a block of chunks over the events that both sides name, and the rest.

    Attributes:
        teacher: a row for each teacher position of each chunk.
        token_log_probs: [M] of a stored top-k, that of the teacher's own tokens.
    """

    student: ChunkRows
    teacher: TeacherRows
    places: ChainPlaces
    chains: PieceChains
    common: CommonSet
    fold: StopFold | None
    token_log_probs: Tensor | None
    mismatch_weight: float
    temperature: float
    direction: Direction
    beta: float
    metric_names = ("kl", "teacher_rest", "student_rest", "single")

    def forward(
        self, rows: Tensor, block: Block, params: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        assert self.student.ends is not None
        assert block.segments is not None
        logits = folded_logits(rows, self.temperature, self.fold)
        log_student = torch.log_softmax(logits, -1)
        ends = self.student.ends[block.start : block.stop + 1]
        tokens = self.places.student_tokens[int(ends[0]) : int(ends[-1])]
        student = Ending.of(
            log_student, tokens, log_student.gather(1, tokens[:, None]).squeeze(1),
            block.segments, on_device(ends[1:] - ends[0], rows.device),
        )  # fmt: skip
        teacher = self._teacher(block)
        losses = self._difference(
            teacher.before + teacher.own_log_prob, student.before + student.own_log_prob
        )
        single = self.places.single[block.start : block.stop]
        losses = self._shared(student, teacher, np.flatnonzero(single), losses)
        losses = self._other_ends(student, teacher, block, losses)
        teacher_rest, student_rest = self._rests(student, teacher)
        losses = losses + self._difference(teacher_rest, student_rest)
        sums = [losses.detach(), torch.exp(teacher_rest), torch.exp(student_rest.detach())]
        ones = losses.new_full((1,), float(single.sum()))
        metrics = torch.cat([torch.stack([each.sum() for each in sums]), ones])
        if self.mismatch_weight != 1.0:
            weight = np.where(single, 1.0, self.mismatch_weight)
            losses = losses * on_device(weight, rows.device).to(losses.dtype)
        return losses * self.temperature**2, metrics

    def _difference(self, log_teacher: Tensor, log_student: Tensor) -> Tensor:
        """The term of each slot, of any shape."""
        pair = log_teacher.to(log_student.dtype)[..., None], log_student[..., None]
        return divergence(*pair, self.direction, self.beta)

    @torch.no_grad()
    def _teacher(self, block: Block) -> Ending:
        places = self.places
        ends = places.teacher_ends[block.start : block.stop + 1]
        start, stop = int(ends[0]), int(ends[-1])
        rows = self.teacher.log_probs(start, stop)
        tokens = places.teacher_tokens[start:stop]
        found = rows.gather(1, tokens[:, None]).squeeze(1)
        if self.token_log_probs is not None:
            known = self.token_log_probs[start:stop].to(found.dtype)
            found = torch.where(torch.isfinite(found), found, known)
        segments = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
        return Ending.of(
            rows, tokens, found, on_device(segments, rows.device),
            on_device(ends[1:] - start, rows.device),
        )  # fmt: skip

    def _shared(
        self,
        student: Ending,
        teacher: Ending,
        single: np.ndarray[tuple[int], np.dtype[np.int64]],
        losses: Tensor,
    ) -> Tensor:
        """Chunks of one token on both sides: the tokens that both vocabularies have."""
        if not len(single) or not len(self.common):
            return losses
        at = on_device(single, losses.device)
        own, other = self.common.student_ids, self.common.teacher_ids
        q = teacher.rows.index_select(0, at).index_select(1, other)
        p = student.rows.index_select(0, at).index_select(1, own)
        # The chunk's own tokens have a slot already.
        kept = (own != student.own[at, None]) & (other != teacher.own[at, None])
        if self.token_log_probs is not None:
            kept = kept & torch.isfinite(q)
        q, p = q.masked_fill(~kept, -torch.inf), p.masked_fill(~kept, -torch.inf)
        terms = divergence(q.to(p.dtype), p, self.direction, self.beta)
        for side, ids in ((student, own), (teacher, other)):
            side.compared[at[:, None], ids] |= kept
        return losses.index_add(0, at, terms)

    def _other_ends(self, student: Ending, teacher: Ending, block: Block, losses: Tensor) -> Tensor:
        """Chunks of several tokens on one side: what else they could have ended as."""
        support = self.places.support.of_rows(block.start, block.stop)
        if not len(support):
            return losses
        total = support.total("size")
        chunk = support.row[owners(support["size"], total)]
        pairs = ragged_arange(support["lo"], support["size"], total)
        own, other = self.chains.student_ids[pairs], self.chains.teacher_ids[pairs]
        q, p = teacher.rows[chunk, other], student.rows[chunk, own]
        kept = (own != student.own[chunk]) & (other != teacher.own[chunk])
        if self.token_log_probs is not None:
            kept = kept & torch.isfinite(q)
        q = (teacher.before[chunk] + q).masked_fill(~kept, -torch.inf)
        p = (student.before[chunk] + p).masked_fill(~kept, -torch.inf)
        for side, ids in ((student, own), (teacher, other)):
            side.compared[chunk, ids] = side.compared[chunk, ids] | kept
        return losses.index_add(0, chunk, self._difference(q, p))

    def _rests(self, student: Ending, teacher: Ending) -> tuple[Tensor, Tensor]:
        """[R] log masses of all that has no slot; where the student has none, the teacher's is left
        out."""
        own = student.rest(safe_logsumexp(student.rows.masked_fill(student.compared, -torch.inf)))
        with torch.no_grad():
            if self.token_log_probs is None:
                outside = safe_logsumexp(teacher.rows.masked_fill(teacher.compared, -torch.inf))
            else:
                named = teacher.compared.scatter(1, teacher.own[:, None], False)
                mass = torch.exp(teacher.rows.masked_fill(~named, -torch.inf)).sum(1)
                mass = mass + torch.exp(teacher.own_log_prob)
                # What is not stored is not known below one rounding, which is its floor.
                outside = torch.log((1 - mass).clamp(min=torch.finfo(mass.dtype).eps))
            other = teacher.rest(outside)
        return other.masked_fill(torch.isneginf(own.detach()), -torch.inf).to(own.dtype), own
