"""Partition KL of a block of chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from xtoken.losses.engine.divergence import Direction, divergence
from xtoken.losses.engine.merge import ChunkRows
from xtoken.losses.engine.places import Places
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

    def mapped(self, move: Callable[[Tensor], Tensor]) -> Ending:
        """The same in tensors that `move` makes of these."""
        return Ending(
            move(self.before),
            move(self.rows),
            move(self.own),
            move(self.own_log_prob),
            move(self.alone),
            move(self.compared),
        )

    def rest(self, at_last: Tensor) -> Tensor:
        """[R] log-probability of all that has no slot, from that at the last token alone."""
        eps = torch.finfo(self.before.dtype).eps
        before = torch.where(self.alone, -1.0, self.before.clamp(max=-eps))
        otherwise = torch.log(-torch.expm1(before))
        return torch.where(self.alone, at_last, torch.logaddexp(otherwise, self.before + at_last))


@dataclass(frozen=True, eq=False)
class Knowledge:
    """What is known of a block's chunks but the student's logits.

    Attributes:
        teacher: its side.
        tokens: [n] int64 the student's tokens, a row each.
        ends: [R] int64 the place after each chunk's last row.
        single: [R] bool, chunks of one token on both sides.
        chunk, own, other: [P] int64 the pairs of tokens that a chunk could have ended as.
    """

    teacher: Ending
    tokens: Tensor
    ends: Tensor
    single: Tensor
    chunk: Tensor
    own: Tensor
    other: Tensor


@dataclass(eq=False, kw_only=True)
class PartitionKLBlocks(BlockLoss):
    """The divergence of a block of chunks over the events that both sides name, and the rest.

    Attributes:
        teacher: a row for each teacher position of each chunk.
        token_log_probs: [M] of a stored top-k, that of the teacher's own tokens.
        ready: what `knowledge` gives, where it was made before.
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
    ready: Knowledge | None = None
    metric_names = ("kl", "teacher_rest", "student_rest", "single")

    def forward(
        self, rows: Tensor, block: Block, params: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        assert block.segments is not None
        logits = folded_logits(rows, self.temperature, self.fold)
        log_student = torch.log_softmax(logits, -1)
        known = self.knowledge(block.start, block.stop)
        tokens, single = known.tokens, known.single
        student = Ending.of(
            log_student, tokens, log_student.gather(1, tokens[:, None]).squeeze(1),
            block.segments, known.ends,
        )  # fmt: skip
        # Slots are marked there.
        teacher = replace(known.teacher, compared=known.teacher.compared.clone())
        losses = self._difference(
            teacher.before + teacher.own_log_prob, student.before + student.own_log_prob
        )
        losses = self._shared(student, teacher, single, losses)
        losses = self._other_ends(student, teacher, known, losses)
        teacher_rest, student_rest = self._rests(student, teacher)
        losses = losses + self._difference(teacher_rest, student_rest)
        rests = torch.exp(teacher_rest), torch.exp(student_rest.detach())
        sums = (losses.detach(), *rests, single.to(losses.dtype))
        metrics = torch.stack([block.sum(each) for each in sums])
        if self.mismatch_weight != 1.0:
            losses = torch.where(single, losses, losses * self.mismatch_weight)
        return losses * self.temperature**2, metrics

    def narrowed(self, places: Places) -> PartitionKLBlocks:
        """As `BlockLoss`; what the teacher says is made before."""
        known = self.knowledge(places.start, places.stop)
        spare = places.size - 1
        # What has no rows ends at the spare one.
        ends = torch.where(places.real, places.fill(known.ends), places.size)
        ready = Knowledge(
            known.teacher.mapped(places.fill),
            places.fill(known.tokens),
            ends,
            places.fill(known.single),
            places.item(known.chunk, spare),
            places.item(known.own, 0),
            places.item(known.other, 0),
        )
        # Of their numbers none is read any more, but that there are some.
        some = None if self.token_log_probs is None else self.token_log_probs[:0]
        return replace(self, student=places.student, ready=ready, token_log_probs=some)

    @torch.no_grad()
    def knowledge(self, start: int, stop: int) -> Knowledge:
        """What is known of chunks [start, stop) but the student's logits."""
        if self.ready is not None:
            return self.ready
        assert self.student.ends is not None
        device, rows = self.student.index.device, self.student.range_of(start, stop)
        support = self.places.support.of_rows(start, stop)
        total = support.total("size")
        pairs = ragged_arange(support["lo"], support["size"], total)
        return Knowledge(
            self._teacher(start, stop),
            self.places.student_tokens[rows],
            on_device(self.student.ends[start + 1 : stop + 1] - rows.start, device),
            on_device(self.places.single[start:stop], device),
            support.row[owners(support["size"], total)],
            self.chains.student_ids[pairs],
            self.chains.teacher_ids[pairs],
        )

    def _difference(self, log_teacher: Tensor, log_student: Tensor) -> Tensor:
        """The term of each slot, of any shape."""
        pair = log_teacher.to(log_student.dtype)[..., None], log_student[..., None]
        return divergence(*pair, self.direction, self.beta)

    def _teacher(self, first: int, last: int) -> Ending:
        places = self.places
        ends = places.teacher_ends[first : last + 1]
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

    def _shared(self, student: Ending, teacher: Ending, single: Tensor, losses: Tensor) -> Tensor:
        """Chunks of one token on both sides: the tokens that both vocabularies have."""
        if not len(self.common):
            return losses
        own, other = self.common.student_ids, self.common.teacher_ids
        q, p = teacher.rows.index_select(1, other), student.rows.index_select(1, own)
        # The chunk's own tokens have a slot already.
        kept = (own != student.own[:, None]) & (other != teacher.own[:, None]) & single[:, None]
        if self.token_log_probs is not None:
            kept = kept & torch.isfinite(q)
        q, p = q.masked_fill(~kept, -torch.inf), p.masked_fill(~kept, -torch.inf)
        terms = divergence(q.to(p.dtype), p, self.direction, self.beta)
        for side, ids in ((student, own), (teacher, other)):
            side.compared[:, ids] |= kept
        return losses + terms

    def _other_ends(
        self, student: Ending, teacher: Ending, known: Knowledge, losses: Tensor
    ) -> Tensor:
        """Chunks of several tokens on one side: what else they could have ended as."""
        chunk, own, other = known.chunk, known.own, known.other
        if not len(chunk):
            return losses
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
