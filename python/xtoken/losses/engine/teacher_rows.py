"""The rows and columns of the teacher's signal that a loss reads, a block of chunks at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xtoken import _core
from xtoken.errors import OptionError, PairError, ShapeError
from xtoken.losses.engine.boundaries import LeftOut, LeftOutMask
from xtoken.losses.engine.merge import ChunkRows, Merge, chunk_rows, merge_rows
from xtoken.losses.engine.places import Places
from xtoken.tensors.cells import CellFold
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.full_logits import FullLogits, columns_of
from xtoken.tensors.host import readable
from xtoken.tensors.rows import upcast
from xtoken.tensors.stop_fold import StopFold
from xtoken.tensors.teacher_signal import Teacher, TeacherTopK, teacher_positions

# Where less than this is left, 1 - sum has lost its digits in float32.
_FAINT = 1e-3


@dataclass(frozen=True, eq=False)
class TeacherRows:
    """Each chunk's teacher distribution, a block of chunks at a time; without a graph.

    Attributes:
        signal: as passed by the caller.
        where: the rows each chunk reads.
        vocab_size: V_t; what lies beyond it has no mass.
        temperature: divides the logits.
        fold: the columns that are added to another: stop tokens, or all by their cells.
        left_out: columns without mass at each chunk; the others are scaled to 1.
        log_totals: [C] the log of each chunk's softmax denominator, where it is known already.
    """

    signal: Teacher
    where: ChunkRows
    vocab_size: int
    temperature: float
    fold: StopFold | CellFold | None = None
    log_totals: Tensor | None = None
    left_out: LeftOut | LeftOutMask | None = None

    @classmethod
    def build(
        cls,
        signal: Teacher,
        chunks: ChunkBatch,
        vocab_size: int,
        temperature: float,
        merge: Merge,
        *,
        renormalized: bool = False,
        fold: StopFold | None = None,
    ) -> TeacherRows:
        """
        Args:
            fold: the teacher's stop tokens that are added to another.
            renormalized: the loss renormalizes over stored entries, so that a stored top-k may be
                read at another temperature than it was taken at.

        Raises:
            ShapeError: V_t' < V_t.
            OptionError: a top-k at another temperature, or under `mean`.
            PairError: a top-k of another vocabulary.
        """
        _, length = teacher_positions(signal)
        if isinstance(signal, TeacherTopK):
            if merge == "mean":
                raise OptionError(
                    "merge='mean' needs the teacher's full logits: the top-k of the positions "
                    "differ; use merge='chain' with a stored top-k"
                )
            if not renormalized:
                signal.require_temperature(temperature, "the loss asks for")
            if signal.vocab_size is not None and signal.vocab_size != vocab_size:
                raise PairError(
                    f"the stored top-k is of a teacher of {signal.vocab_size} tokens, the pair's "
                    f"teacher has V_t = {vocab_size}; pass the predictions of this pair's teacher"
                )
        elif columns_of(signal) < vocab_size:
            raise ShapeError(
                f"teacher logits have {columns_of(signal)} columns, fewer than V_t = {vocab_size};"
                " pass the teacher this pair was built for"
            )
        rows = chunk_rows(chunks, "teacher", length, merge)
        if isinstance(signal, TeacherTopK):
            _check_vocabulary(signal, rows.index, vocab_size)
        return cls(signal, rows, vocab_size, temperature, fold)

    @torch.no_grad()
    def narrowed(self, places: Places) -> TeacherRows:
        """The rows of these chunks alone, merged, one a place."""
        start, stop = places.start, places.stop
        index, segments = self.where.block(start, stop)
        signal: Teacher
        if isinstance(self.signal, TeacherTopK):
            index = places.fill(index)
            signal = TeacherTopK(
                self.signal.ids.flatten(0, 1).index_select(0, index)[:, None],
                self.signal.log_probs.detach().flatten(0, 1).index_select(0, index)[:, None],
                self.signal.temperature,
                validate=False,
            )
        elif segments is None and isinstance(self.signal, Tensor):
            flat = self.signal.detach().flatten(0, 1)
            signal = flat.index_select(0, places.fill(index))[:, None]
        else:
            full = FullLogits(self.signal, self.vocab_size)
            rows = merge_rows(full.rows(index), segments, stop - start)
            signal = places.fill(rows)[:, None]
        totals, gone = self.log_totals, None
        if self.left_out is not None:
            mask = self.left_out.mask(start, stop, self.vocab_size + 1)
            gone = LeftOutMask(places.fill(mask))
        return replace(
            self,
            signal=signal,
            where=ChunkRows(torch.arange(places.size, device=index.device), None, places.size),
            log_totals=None if totals is None else places.of_chunks(totals),
            left_out=gone,
        )

    @property
    def stored_power(self) -> float:
        """What turns `log_probs` back into those of the full vocabulary's softmax."""
        if isinstance(self.signal, TeacherTopK):
            return self.temperature / self.signal.temperature
        return 1.0

    @torch.no_grad()
    def log_probs(self, start: int, stop: int, columns: Tensor | None = None) -> Tensor:
        """[stop - start, V_t] log-probabilities, or those at `columns` [K] int64; a stored top-k
        leaves -inf outside of it."""
        if isinstance(self.signal, TeacherTopK):
            ids, stored = self.top_k(start, stop)
            dense = stored.new_full((len(ids), self.vocab_size + 1), -torch.inf)
            found = dense.scatter_(1, ids, stored)[:, : self.vocab_size]
        elif self.log_totals is not None:
            return self.logits(start, stop, columns) - self.log_totals[start:stop, None]
        else:
            found = torch.log_softmax(self.logits(start, stop), -1)
        return found if columns is None else found.index_select(1, columns)

    def outside_kept(self, start: int, stop: int, others: Tensor) -> Tensor:
        """[stop - start] log of the sum of exp over the columns `others`, in the logits' scale."""
        return torch.logsumexp(self.logits(start, stop, others), -1)

    def logits(
        self, start: int, stop: int, columns: Tensor | None = None, chosen: Tensor | None = None
    ) -> Tensor:
        """[stop - start, V_t] merged logits by temperature, or those at `columns`; of the `chosen`
        chunks alone where these are given, counted from `start`."""
        assert not isinstance(self.signal, TeacherTopK)
        full = FullLogits(self.signal, self.vocab_size)
        if self.left_out is not None:
            rows = self._consistent(self.left_out, full, start, stop)
            rows = rows if chosen is None else rows.index_select(0, chosen)
            return rows if columns is None else rows.index_select(1, columns)
        index, segments = self.where.block(start, stop)
        if chosen is not None:
            if segments is not None:
                return self.logits(start, stop, columns)[chosen]
            index = index[chosen]
        whole = self.fold is not None and columns is not None
        kept = full.rows(index, None if whole else columns)
        rows = merge_rows(kept, segments, stop - start)
        if self.temperature != 1.0:
            rows = rows / self.temperature
        if self.fold is None:
            return rows
        if columns is None:
            return self.fold.dense(rows)
        return self.fold.chosen(rows.index_select(1, columns), rows, columns)

    def _consistent(
        self, left_out: LeftOut | LeftOutMask, full: FullLogits, start: int, stop: int
    ) -> Tensor:
        """[stop - start, V_t] as `logits`, without what is left out."""
        index, _ = self.where.block(start, stop)
        rows = full.rows(index) / self.temperature
        rows = rows.masked_fill_(left_out.mask(start, stop, self.vocab_size), -torch.inf)
        return rows if self.fold is None else self.fold.dense(rows)

    @torch.no_grad()
    def log_outside(self, start: int, stop: int, mass: Tensor, kept: Tensor | None) -> Tensor:
        """[stop - start] log of the mass outside of the kept columns.

        Args:
            mass: [stop - start], that of the kept ones.
            kept: [K] int64 columns, or [stop - start, K] each row's own; None for all.
        """
        rest = 1.0 - mass
        if isinstance(self.signal, TeacherTopK):
            # What is not stored is not known below one rounding, which is its floor.
            return torch.log(rest.clamp(min=torch.finfo(rest.dtype).eps))
        log_rest = torch.log(rest.clamp(min=0.0))
        if kept is None:
            return log_rest.fill_(-torch.inf)
        if not readable(rest):  # told for every row, as nobody may ask which
            return self._log_rest(start, stop, kept, log_rest.dtype)
        faint = (rest < _FAINT).nonzero().flatten()  # 1 - mass has lost its digits
        if faint.numel() == 0:
            return log_rest
        own = kept[faint] if kept.dim() == 2 else kept
        found = self._log_rest(start, stop, own, log_rest.dtype, faint)
        return log_rest.index_copy(0, faint, found)

    def _log_rest(
        self, start: int, stop: int, kept: Tensor, dtype: torch.dtype, chosen: Tensor | None = None
    ) -> Tensor:
        """`log_outside`, summed without the kept columns."""
        logits = self.logits(start, stop, chosen=chosen)
        kept = kept if kept.dim() == 2 else kept.expand(len(logits), -1)
        others = torch.logsumexp(logits.scatter(1, kept, -torch.inf), -1)
        return (others - torch.logsumexp(logits, -1)).to(dtype)

    @torch.no_grad()
    def top_k(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Stored (ids, log-probs) [R, k] of the chunks, at this temperature up to a factor.

        Ids beyond the vocabulary and the pads of a short row, which may repeat a stored id, come as
        V_t, with log-prob -inf: one column past the last.
        """
        assert isinstance(self.signal, TeacherTopK)
        index, _ = self.where.block(start, stop)
        ids = self.signal.ids.flatten(0, 1).index_select(0, index)
        stored = upcast(self.signal.log_probs.detach().flatten(0, 1).index_select(0, index))
        if self.signal.temperature != self.temperature:
            stored = stored * (self.signal.temperature / self.temperature)
        stored = stored.masked_fill(ids >= self.vocab_size, -torch.inf)
        if self.left_out is not None:
            gone = self.left_out.mask(start, stop, self.vocab_size + 1)
            gone = gone.gather(1, ids.clamp(max=self.vocab_size))
            left = torch.exp(stored.masked_fill(~gone, -torch.inf)).sum(1, keepdim=True)
            eps = torch.finfo(stored.dtype).eps
            stored = stored.masked_fill(gone, -torch.inf) - torch.log((1 - left).clamp(min=eps))
        if self.fold is not None:
            ids, stored = self.fold.stored(ids, stored)
        ids = ids.masked_fill(torch.isneginf(stored), self.vocab_size)
        return ids, stored

    def stored_mask(self) -> Tensor:
        """[V_t] bool: the ids that a stored top-k names in any of the chunks."""
        assert isinstance(self.signal, TeacherTopK)
        ids = self.signal.ids.flatten(0, 1).index_select(0, self.where.index)
        ids = ids.clamp_(max=self.vocab_size).flatten()
        mask = torch.zeros(self.vocab_size + 1, dtype=torch.bool, device=ids.device)
        mask.index_fill_(0, ids, True)
        return mask[:-1] if self.fold is None else self.fold.named(mask[:-1])


@torch.no_grad()
def _check_vocabulary(signal: TeacherTopK, index: Tensor, vocab_size: int) -> None:
    """Raise PairError where most of the stored mass is on ids that the teacher does not have.

    Some may be on the padding of an lm_head, which is dropped; then it is little.
    """
    if not readable(signal.ids) or not len(index):
        return
    ids = signal.ids.flatten(0, 1).index_select(0, index)
    beyond = ids >= vocab_size
    if not bool(beyond.any()):
        return
    mass = torch.exp(upcast(signal.log_probs.detach().flatten(0, 1).index_select(0, index)))
    if bool(mass[beyond].sum() > 0.5 * mass.sum()):
        raise PairError(
            f"the stored top-k names token {int(ids.max())}, and most of its mass is beyond "
            f"V_t = {vocab_size}; pass the predictions of this pair's teacher"
        )


@torch.no_grad()
def top_columns(
    teacher: TeacherRows, supported: Tensor, k: int, rows_per_block: int
) -> tuple[Tensor, TeacherRows]:
    """The k supported columns that hold most of the teacher's mass over all chunks; ascending.

    One set for the whole micro-batch, as in NeMo-RL; by total mass, which keeps the most of it.

    Args:
        supported: [V_t] bool, the columns to choose from.
        k: at least 1, and no more than there are.

    Returns: the columns; and the same rows, with the softmax denominators that were found.
    """
    from xtoken.losses.kernels.p_kl import column_masses  # which reads what is defined here

    mass = torch.zeros(teacher.vocab_size, dtype=torch.float32, device=supported.device)
    totals = []
    known = column_masses(teacher) or _masses_by_core(teacher)
    if known is not None:
        mass, totals = known[0], [known[1]]
    starts = range(0, 0 if known else teacher.where.count, rows_per_block)
    for start in starts:
        stop = min(start + rows_per_block, teacher.where.count)
        if isinstance(teacher.signal, TeacherTopK):
            mass += torch.exp(teacher.log_probs(start, stop)).sum(0)
        else:
            logits = teacher.logits(start, stop)
            top = logits.amax(-1, keepdim=True)
            exps = logits.sub_(torch.where(torch.isneginf(top), 0.0, top)).exp_()
            sums = exps.sum(-1)
            totals.append(top[:, 0] + torch.log(sums))
            mass += (sums.reciprocal() @ exps).to(mass.dtype)
    # An unsupported column is below all others, not merely last among the empty ones.
    mass = mass.masked_fill(~supported, -1.0)
    best = torch.topk(mass, k).indices
    rows = replace(teacher, log_totals=torch.cat(totals)) if totals else teacher
    return torch.sort(best).values, rows


def _masses_by_core(teacher: TeacherRows) -> tuple[Tensor, Tensor] | None:
    """The mass of each column [V_t] float32 and the softmax denominators [C] by the core, a row in
    three passes; None where torch finds them."""
    signal = teacher.signal
    if (
        not isinstance(signal, Tensor)
        or not readable(signal)
        or signal.dtype not in (torch.float32, torch.float64)
        or not signal.is_contiguous()
        or teacher.where.owner is not None
        or teacher.left_out is not None
        or not (teacher.fold is None or isinstance(teacher.fold, StopFold))
    ):
        return None
    masses, totals = _core.column_masses(
        signal.detach().view(-1, signal.shape[-1]).numpy(), teacher.where.index.numpy(),
        size=teacher.vocab_size, temperature=teacher.temperature, threads=torch.get_num_threads(),
    )  # fmt: skip
    for source, target in () if teacher.fold is None else teacher.fold.pairs:
        masses[target] += masses[source]
        masses[source] = 0.0
    return torch.from_numpy(masses).float(), torch.from_numpy(totals).to(signal.dtype)
