"""BPM of a block of chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xtoken.losses.bpm.places import BytePlaces
from xtoken.losses.engine.checks import zero_or_nan
from xtoken.losses.engine.divergence import Direction, divergence
from xtoken.losses.engine.merge import ChunkRows
from xtoken.losses.engine.places import Places
from xtoken.losses.engine.prepared import Items
from xtoken.losses.engine.row_blocks import Block, BlockLoss
from xtoken.losses.engine.tail import log_shares, safe_logsumexp
from xtoken.losses.engine.teacher_rows import TeacherRows
from xtoken.tensors.byte_prefixes import BytePrefixes
from xtoken.tensors.segments import owners, ragged_arange, segment_logsumexp
from xtoken.tensors.sparse_ops import log_project
from xtoken.tensors.stop_fold import StopFold, folded_logits
from xtoken.tensors.teacher_signal import TeacherTopK


@dataclass(frozen=True, eq=False)
class RootProjection:
    """Teacher rows to distributions over student tokens and one complement.

    Attributes:
        tables: what each teacher token begins with.
        stored: whether only some of the teacher's columns are known.
    """

    tables: BytePrefixes
    stored: bool

    @torch.no_grad()
    def __call__(self, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
        """[R, V_t] log-probabilities to those [R, V_s + 1] of what they begin with, all that has
        no such token or is not stored in the last column; and [R, V_s] bool, the tokens that are
        compared one by one."""
        roots = self.tables.roots
        target = log_project(log_teacher, torch.ones_like(log_teacher[0]), roots)
        if not self.stored:
            return target, self.tables.reached.expand(len(target), -1)
        known = torch.logsumexp(log_teacher, 1).exp()
        # What is not stored is not known below one rounding, which is its floor.
        rest = torch.log((1 - known).clamp(min=torch.finfo(known.dtype).eps))
        last = torch.logaddexp(target[:, -1], rest)
        return torch.cat([target[:, :-1], last[:, None]], 1), torch.isfinite(target[:, :-1])


def compared(
    target: Tensor, entries: Tensor, counted: Tensor, log_student: Tensor
) -> tuple[Tensor, Tensor]:
    """Both sides of a comparison over single tokens and the complement of all others.

    Args:
        target: [n, V_s + 1] the teacher's log masses, the last column the complement's.
        entries: [n, V_s] bool, the tokens that are compared one by one.
        counted: [n] bool, the rows that are compared at all; the others are made equal.
        log_student: [n, V_s] log-probabilities.

    Returns: [n, V_s + 1] each. Where every token is an entry the student has no complement, and
        the teacher's rest is left out.
    """
    outside = safe_logsumexp(log_student.masked_fill(entries, -torch.inf))
    student = torch.cat([log_student.masked_fill(~entries, -torch.inf), outside[:, None]], 1)
    kept = torch.cat([entries, ~entries.all(1, keepdim=True)], 1)
    target = target.masked_fill(~kept, -torch.inf)
    silent = (~counted | torch.isneginf(target).all(1))[:, None]
    target = torch.log_softmax(target.masked_fill(silent, 0.0), 1)
    return target, torch.where(silent, target, student)


@dataclass(eq=False, kw_only=True)
class BPMBlocks(BlockLoss):
    """The divergence of a block of chunks, summed over their student positions.

    Attributes:
        teacher: a row for each teacher position of each chunk.
        mask_spaces: whether positions at spaces and tabs are left out.
        ready: what `targets` gives, where it was made before.
    """

    student: ChunkRows
    teacher: TeacherRows
    places: BytePlaces
    tables: BytePrefixes
    fold: StopFold | None
    mask_spaces: bool
    temperature: float
    direction: Direction
    beta: float
    ready: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    metric_names = ("kl", "complement", "positions", "spaces")

    def forward(
        self, rows: Tensor, block: Block, params: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        assert block.segments is not None
        logits = folded_logits(rows, self.temperature, self.fold)
        target, entries, counted, space = self.targets(block.start, block.stop)
        if self.mask_spaces:
            counted = counted & ~space
        log_teacher, log_student = compared(target, entries, counted, torch.log_softmax(logits, -1))
        losses = divergence(log_teacher, log_student, self.direction, self.beta)
        losses = losses + zero_or_nan(logits) + zero_or_nan(target)
        chunks = losses.new_zeros(len(block)).index_add(0, block.segments, losses)
        rest = torch.exp(log_teacher[:, -1]).masked_fill(~counted, 0.0)
        kl = block.sum(chunks.detach())
        sums = torch.stack([kl, rest.sum(), counted.sum(), space.sum()])
        return chunks * self.temperature**2, sums.to(losses.dtype)

    def narrowed(self, places: Places) -> BPMBlocks:
        """As `BlockLoss`; what the teacher says is made before."""
        ready = self.targets(places.start, places.stop)
        target, entries, counted, space = map(places.fill, ready)
        kept = (target, entries, counted & places.real_rows, space & places.real_rows)
        return replace(self, student=places.student, ready=kept)

    def targets(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the positions of chunks [start, stop): [n, V_s + 1] log masses of the tokens and the
        complement, and the entries; [n] bool, which are counted and which of these are spaces."""
        if self.ready is not None:
            return self.ready
        part = self.student.range_of(start, stop)
        counted = self.places.counted[part]
        return *self._targets(start, stop), counted, self.places.space[part] & counted

    @torch.no_grad()
    def _targets(self, first_chunk: int, last_chunk: int) -> tuple[Tensor, Tensor]:
        places, rows = self.places, self.student.range_of(first_chunk, last_chunk)
        start, stop = rows.start, rows.stop
        first = int(places.teacher_ends[first_chunk])
        log_teacher = self.teacher.log_probs(first, int(places.teacher_ends[last_chunk]))
        stored = isinstance(self.teacher.signal, TeacherTopK)
        item = places.item[start:stop] - first
        target, entries = RootProjection(self.tables, stored)(log_teacher.index_select(0, item))
        inner = places.inner.of_rows(start, stop)
        totals = target.new_zeros(len(target))
        if len(inner):
            target, entries, totals = self._inside(
                inner, log_teacher, first, target, entries, totals, stored
            )
        longer = places.longer.of_rows(start, stop)
        if len(longer):
            heads, spelled = places.heads.of_rows(start, stop), places.spelled.of_rows(start, stop)
            target, entries = self._running_on(
                longer, heads, spelled, log_teacher, first, target, entries, totals, stored
            )
        return target, entries

    def _inside(
        self,
        inner: Items,
        log_teacher: Tensor,
        first: int,
        target: Tensor,
        entries: Tensor,
        totals: Tensor,
        stored: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Positions inside a teacher token: the tokens that begin with the bytes so far, by what
        they go on with; and the log of the mass of those tokens."""
        tables, width = self.tables, target.shape[1]
        total = inner.total("size")
        owner = owners(inner["size"], total)
        tokens = tables.order[ragged_arange(inner["lo"], inner["size"], total)]
        mass = log_teacher[inner["item"][owner] - first, tokens]
        begins = self._after(tokens, inner["before"][owner])
        sums = segment_logsumexp(mass, owner, len(inner))
        flat = segment_logsumexp(mass, owner * width + begins, len(inner) * width)
        # Several teacher tokens may go on with the same one: one that is known is enough.
        named = torch.isfinite(mass) if stored else torch.ones_like(mass, dtype=torch.bool)
        known = torch.zeros(len(inner) * width, dtype=torch.int64, device=mass.device)
        known = known.index_add(0, owner * width + begins, named.to(known.dtype)) > 0
        own = flat.view(-1, width) - torch.where(torch.isneginf(sums), 0.0, sums)[:, None]
        entries = entries.index_copy(0, inner.row, known.view(-1, width)[:, :-1])
        return (
            target.index_copy(0, inner.row, own),
            entries,
            totals.index_copy(0, inner.row, sums),
        )

    def _after(self, tokens: Tensor, before: Tensor) -> Tensor:
        """What each teacher token goes on with after some bytes; V_s where it has no more."""
        tables = self.tables
        none = tables.sizes[0]
        if len(tables.suffix_begins) == 0:
            return torch.full_like(tokens, none)
        place = tables.suffix_ptr[tokens] + before
        ends = tables.suffix_ptr[1:]
        ends = torch.nn.functional.pad(ends, (0, 1), value=len(tables.suffix_begins))
        over = place >= ends[tokens]
        return tables.suffix_begins[place.masked_fill(over, 0)].masked_fill(over, none)

    def _running_on(
        self,
        longer: Items,
        heads: Items,
        spelled: Items,
        log_teacher: Tensor,
        first: int,
        target: Tensor,
        entries: Tensor,
        totals: Tensor,
        stored: bool,
    ) -> tuple[Tensor, Tensor]:
        """Move to each longer student token the probability that the teacher goes on so far."""
        base = int(heads.host["first"][0])
        total = longer.total("size")
        owner = owners(longer["size"], total)
        tokens = self.tables.order[ragged_arange(longer["lo"], longer["size"], total)]
        chain = segment_logsumexp(
            log_teacher[longer["item"][owner] - first, tokens], owner, len(longer)
        )
        total = spelled.total("size")
        owner = owners(spelled["size"], total)
        tokens = self.tables.order[ragged_arange(spelled["lo"], spelled["size"], total)]
        own = segment_logsumexp(
            log_teacher[spelled["item"][owner] - first, tokens], owner, len(spelled)
        )
        chain = chain.index_add(0, spelled["longer"] - base, own)
        # Inside a teacher token all is given the bytes so far.
        chain = torch.exp(chain - totals.nan_to_num(neginf=0.0)[longer.row])
        further = torch.where(longer["next"] >= 0, longer["next"] - base, len(longer))
        gain = (chain - torch.cat([chain, chain.new_zeros(1)])[further]).clamp(min=0.0)
        row, token = heads.row, heads["token"]
        left = torch.exp(target[row, token]) - chain[heads["first"] - base]
        target = target.index_put((row, token), log_shares(left))
        row, token = longer.row, longer["token"]
        target = target.index_put(
            (row, token), torch.logaddexp(target[row, token], log_shares(gain))
        )
        known = entries[row, token]
        known = known | (chain > 0) if stored else torch.ones_like(known)
        return target, entries.index_put((row, token), known)
