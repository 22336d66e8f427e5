"""The rows and columns of the teacher's signal that a loss reads, a block of chunks at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xtoken.losses.engine.merge import ChunkRows, Merge, chunk_rows, merge_rows
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.rows import upcast
from xtoken.tensors.teacher_signal import Teacher, TeacherTopK, teacher_positions


@dataclass(frozen=True, eq=False)
class TeacherRows:
    """Each chunk's teacher distribution, a block of chunks at a time; without a graph.

    Attributes:
        signal: as passed by the caller.
        where: the rows each chunk reads.
        vocab_size: V_t; what lies beyond it has no mass.
        temperature: divides the logits.
        log_totals: [C] the log of each chunk's softmax denominator, where it is known already.
    """

    signal: Teacher
    where: ChunkRows
    vocab_size: int
    temperature: float
    log_totals: Tensor | None = None

    @classmethod
    def of(
        cls,
        signal: Teacher,
        chunks: ChunkBatch,
        vocab_size: int | None,
        temperature: float,
        merge: Merge,
        *,
        renormalized: bool = False,
    ) -> TeacherRows:
        """
        Args:
            renormalized: the loss renormalizes over stored entries, so that a stored top-k may be
                read at another temperature than it was taken at.

        Raises:
            ValueError: V_t' < V_t; a top-k at another temperature, or under `mean`.
        """
        _, length = teacher_positions(signal)
        if isinstance(signal, TeacherTopK):
            if merge == "mean":
                raise ValueError(
                    "merge='mean' needs the teacher's full logits: the top-k of the positions "
                    "differ; use merge='chain' with a stored top-k"
                )
            if temperature != signal.temperature and not renormalized:
                raise ValueError(
                    f"the stored top-k was taken at temperature {signal.temperature}, the loss "
                    f"asks for {temperature}; store it at {temperature}, or pass full logits"
                )
            if signal.ids.numel() and int(signal.ids.min()) < 0:
                raise ValueError(
                    f"ids hold {int(signal.ids.min())}; pad a short row with log_probs = -inf"
                )
            if vocab_size is None:
                raise ValueError("a stored top-k does not tell V_t; pass teacher_vocab_size")
            size = vocab_size
        else:
            if vocab_size is not None and signal.shape[2] < vocab_size:
                raise ValueError(
                    f"teacher logits have {signal.shape[2]} columns, fewer than V_t = {vocab_size};"
                    " pass the teacher this W or common set was built for"
                )
            size = signal.shape[2] if vocab_size is None else vocab_size
        rows = chunk_rows(chunks, "teacher", length, merge)
        return cls(signal, rows, size, temperature)

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
            return self._logits(start, stop, columns) - self.log_totals[start:stop, None]
        else:
            found = torch.log_softmax(self._logits(start, stop), -1)
        return found if columns is None else found.index_select(1, columns)

    def _logits(self, start: int, stop: int, columns: Tensor | None = None) -> Tensor:
        """[stop - start, V_t] merged logits by temperature, or those at `columns`."""
        assert isinstance(self.signal, Tensor)
        index, segments = self.where.block(start, stop)
        flat = self.signal.detach().flatten(0, 1)[:, : self.vocab_size].index_select(0, index)
        if columns is not None:
            flat = flat.index_select(1, columns)
        rows = merge_rows(upcast(flat), segments, stop - start)
        return rows if self.temperature == 1.0 else rows / self.temperature

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
        ids = ids.masked_fill(torch.isneginf(stored), self.vocab_size)
        return ids, stored

    def stored_mask(self) -> Tensor:
        """[V_t] bool: the ids that a stored top-k names in any of the chunks."""
        assert isinstance(self.signal, TeacherTopK)
        ids = self.signal.ids.flatten(0, 1)[self.where.index].clamp(max=self.vocab_size)
        mask = torch.zeros(self.vocab_size + 1, dtype=torch.bool, device=ids.device)
        mask[ids.flatten()] = True
        return mask[:-1]


@torch.no_grad()
def top_columns(
    teacher: TeacherRows, supported: Tensor, k: int, rows_per_block: int
) -> tuple[Tensor, TeacherRows]:
    """The k supported columns that hold most of the teacher's mass over all chunks; ascending.

    One set for the whole micro-batch, as in NeMo-RL; by total mass, which keeps the most of it.

    Args:
        supported: [V_t] bool, the columns to choose from.
        k: at least 1; more than there are takes all of them.

    Returns: the columns; and the same rows, with the softmax denominators that were found.
    """
    mass = torch.zeros(teacher.vocab_size, dtype=torch.float32, device=supported.device)
    totals = []
    for start in range(0, teacher.where.count, rows_per_block):
        stop = min(start + rows_per_block, teacher.where.count)
        if isinstance(teacher.signal, TeacherTopK):
            log_probs = teacher.log_probs(start, stop)
        else:
            logits = teacher._logits(start, stop)
            log_probs = torch.log_softmax(logits, -1)
            # Their difference is the denominator in any column, best told where it is largest.
            best = log_probs.argmax(-1, keepdim=True)
            totals.append((logits.gather(1, best) - log_probs.gather(1, best))[:, 0])
        mass += torch.exp(log_probs).sum(0)
    # An unsupported column is below all others, not merely last among the empty ones.
    mass = mass.masked_fill(~supported, -1.0)
    best = torch.topk(mass, min(k, int(supported.sum()))).indices
    rows = replace(teacher, log_totals=torch.cat(totals)) if totals else teacher
    return torch.sort(best).values, rows
