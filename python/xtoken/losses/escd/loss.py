"""ESCD: BPM's root, and the total probability of what completes a teacher token that was begun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xtoken.losses.bpm.block import RootProjection, compared
from xtoken.losses.engine.divergence import kl_sum
from xtoken.losses.engine.loss_spec import LossSpec
from xtoken.losses.engine.merge import ChunkRows
from xtoken.losses.engine.places import Places
from xtoken.losses.engine.row_blocks import Block, BlockLoss
from xtoken.losses.engine.run import LossCall, run_loss
from xtoken.losses.engine.teacher_rows import TeacherRows
from xtoken.losses.escd.places import EventPlaces, event_places
from xtoken.losses.inputs import DEFAULT_OPTIONS, LossInputs, LossOptions
from xtoken.losses.output import LossOutput
from xtoken.tensors.completions import Completions
from xtoken.tensors.host import on_device
from xtoken.tensors.pair_parts import PairParts
from xtoken.tensors.segments import owners, ragged_arange, segment_logsumexp
from xtoken.tensors.sparse_ops import log_project
from xtoken.tensors.stop_fold import StopFold, folded_logits
from xtoken.tensors.teacher_signal import TeacherTopK


def escd(inputs: LossInputs, pair: PairParts, options: LossOptions = DEFAULT_OPTIONS) -> LossOutput:
    """Mean over chunks of a forward KL at the root and the completion of what was begun there.

    Root: each teacher token's probability goes to the longest student token that its bytes begin
    with; those tokens one by one and a complement, nothing renormalized, as in `bpm`.

    Completion: teacher tokens without a student token of the same bytes, in groups; two are in one
    group where one's bytes begin the other's, and the group's event is its shortest member. Where
    the text's student token at the root begins an event but does not end it, the position after it
    has the loss `-M log P` for each such event: M the group's probability at the root, P the
    student's of all tokens that start with the rest of the event's bytes. Events that no one token
    completes have none.

    The position after a root is that of the chunk's second token; after a chunk of one token that
    of the next chunk's first, if the next chunk counts. So a chunk's loss depends on whether the
    one before it counts.

    Args:
        inputs: with both sides' ids. A `TeacherTopK` leaves what is not stored in the complement.
        pair: with `byte_prefixes` and `completions`.
        options: no direction: the completion is a cross-entropy of the teacher's events.

    Returns: loss in nats per chunk; 0 for a student equal to its teacher on one vocabulary, but
        never on two, as the completion is no divergence: it is at its least where all completions
        are certain. Metrics, per chunk: `kl` (the root's), `complement`, `completion`, `events`
        (their number) and `event_mass` (the sum of their M).

    Raises:
        XTokenError: as `p_kl`; a token outside its vocabulary.

    Source: Liu et al. 2026, arXiv 2609.34738, sections 3.1 to 3.3 and B.4. With stored predictions
        the paper makes groups of the retained tokens; here they are those of the whole vocabulary.
    """
    return run_loss(SPEC, _blocks, inputs, pair, options)


SPEC = LossSpec.of(
    "escd", escd, needs_ids=True, prepare=event_places, without=frozenset({"direction", "beta"})
)


def _blocks(call: LossCall) -> tuple[EscdBlocks, int]:
    pair = call.pair
    assert pair.byte_prefixes is not None
    assert pair.completions is not None
    places = call.prepared(SPEC, EventPlaces)
    where = ChunkRows(places.teacher_index, None, len(places.teacher_index))
    loss = EscdBlocks(
        student=ChunkRows.ragged(places.row_first, places.row_count, call.device),
        teacher=replace(call.teacher_rows("chain"), where=where),
        places=places,
        root=RootProjection(pair.byte_prefixes, isinstance(call.teacher, TeacherTopK)),
        completions=pair.completions,
        fold=pair.student_stop_fold,
        temperature=call.temperature,
    )
    return loss, max(pair.sizes)


@dataclass(frozen=True, eq=False)
class BlockEvents:
    """What the teacher says of a block's chunks, and which student tokens complete what it began.

    Attributes:
        target, entries: [R, V_s + 1] and [R, V_s], of `RootProjection`.
        first: [R] int64, each chunk's first row in the block.
        mass, row: [E] of each event begun: the teacher's mass of it, and the row after it.
        event_of, tokens: [K] the student tokens that complete an event.
        number: [1] E; of a scalar in float64 the compiler reads the value, and traces twice.
    """

    target: Tensor
    entries: Tensor
    first: Tensor
    mass: Tensor
    row: Tensor
    event_of: Tensor
    tokens: Tensor
    number: Tensor


@dataclass(eq=False, kw_only=True)
class EscdBlocks(BlockLoss):
    """Roots and completions of a block of chunks.

    Attributes:
        teacher: a row for each of `places.teacher_index`.
        ready: what `events` gives, where it was made before.
    """

    student: ChunkRows
    teacher: TeacherRows
    places: EventPlaces
    root: RootProjection
    completions: Completions
    fold: StopFold | None
    temperature: float
    ready: BlockEvents | None = None
    metric_names = ("kl", "complement", "completion", "events", "event_mass")

    def forward(
        self, rows: Tensor, block: Block, params: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        assert block.segments is not None
        logits = folded_logits(rows, self.temperature, self.fold)
        log_student = torch.log_softmax(logits, -1)
        events = self.events(block.start, block.stop)
        firsts = events.first
        counted = torch.ones_like(firsts, dtype=torch.bool)
        pair = compared(events.target, events.entries, counted, log_student.index_select(0, firsts))
        losses = kl_sum(*pair)
        sums = [block.sum(losses.detach()), block.sum(torch.exp(pair[0][:, -1]))]
        more = [losses.new_zeros(()), events.number[0].to(losses.dtype), events.mass.sum()]
        if len(events.mass):
            read = log_student[events.row[events.event_of], events.tokens]
            log_completed = segment_logsumexp(read, events.event_of, len(events.mass))
            terms = -events.mass * log_completed.masked_fill(events.mass == 0, 0.0)
            losses = losses.index_add(0, block.segments[events.row], terms)
            more[0] = terms.detach().sum()
        return losses * self.temperature**2, torch.stack([*sums, *more])

    def narrowed(self, places: Places) -> EscdBlocks:
        """As `BlockLoss`; what the teacher says is made before."""
        events = self.events(places.start, places.stop)
        spare = places.size - 1
        more = replace(
            events,
            target=places.fill(events.target),
            entries=places.fill(events.entries),
            first=places.fill(events.first),
            mass=places.item(events.mass, 0),
            row=places.item(events.row, spare),
            event_of=places.item(events.event_of, len(events.mass)),
            tokens=places.item(events.tokens, 0),
        )
        return replace(self, student=places.student, ready=more)

    @torch.no_grad()
    def events(self, first_chunk: int, last_chunk: int) -> BlockEvents:
        """What the teacher says of chunks [first_chunk, last_chunk)."""
        if self.ready is not None:
            return self.ready
        assert self.student.ends is not None
        rows, ends = self.student.range_of(first_chunk, last_chunk), self.places.teacher_ends
        first, device = int(ends[first_chunk]), self.student.index.device
        log_teacher = self.teacher.log_probs(first, int(ends[last_chunk]))
        own = self.student.ends[first_chunk:last_chunk] - rows.start
        at = on_device(ends[first_chunk:last_chunk] - first, device)
        target, entries = self.root(log_teacher.index_select(0, at))
        children = self.places.children.of_rows(rows.start, rows.stop)
        tables = self.completions
        total, tokens_total = children.total("groups"), children.total("tokens")
        owner = owners(children["groups"], total)
        entry = ragged_arange(tables.ptr[children["token"]], children["groups"], total)
        mass = target.new_zeros(0)
        if len(children):
            roots = log_teacher.index_select(0, children["item"] - first)
            events = log_project(roots, torch.ones_like(tables.members), tables.events)
            mass = torch.exp(events[owner, tables.group[entry]])
        return BlockEvents(
            target,
            entries,
            on_device(own, device),
            mass,
            children.row[owner],
            owners(tables.size[entry], tokens_total),
            tables.order[ragged_arange(tables.lo[entry], tables.size[entry], tokens_total)],
            target.new_full((1,), float(total)),
        )
