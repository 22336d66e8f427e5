"""What the teacher says at single entries of single rows: full logits or a stored top-k alike."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .student import upcast
from .teacher_signal import Teacher, TeacherTopK

# Where less than this is left, 1 - sum has lost its digits in float32.
_FAINT = 1e-3


@dataclass(eq=False)
class TeacherEntries:
    """Log-probabilities at (row, column) pairs; without a graph.

    Attributes:
        signal: as passed by the caller.
        vocab_size: V_t; what lies beyond it has no mass.
        temperature: divides the logits; a stored top-k was taken at it.
    """

    signal: Teacher
    vocab_size: int
    temperature: float
    _table: Tensor | None = field(default=None, repr=False)

    @property
    def is_stored(self) -> bool:
        """Whether entries may be unknown."""
        return isinstance(self.signal, TeacherTopK)

    @torch.no_grad()
    def read(
        self, rows: Tensor, entry_row: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of entries, of all else in each row, and each row's known mass.

        Args:
            rows: [N] int64 into the flattened positions.
            entry_row: [S] int64 into `rows`.
            columns: [S] int64 below V_t, distinct within a row; negative ones are no entry.

        Returns:
            [S], -inf where unknown or no entry; [N] log of the mass on other columns, unknown ones
            included; [N] mass that is known, 1 for full logits.
        """
        if isinstance(self.signal, TeacherTopK):
            return self._read_stored(self.signal, rows, entry_row, columns)
        assert isinstance(self.signal, Tensor)
        logits = upcast(self.signal.detach().flatten(0, 1)[:, : self.vocab_size][rows])
        if self.temperature != 1.0:
            logits = logits / self.temperature
        total = torch.logsumexp(logits, 1)  # [N]
        entries = logits[entry_row, columns.clamp(min=0)] - total[entry_row]
        entries = entries.masked_fill(columns < 0, -torch.inf)
        mass = torch.zeros_like(total).index_add(0, entry_row, torch.exp(entries))
        rest = torch.log1p(-mass.clamp(max=1.0))
        faint = (1.0 - mass < _FAINT).nonzero().flatten()
        if faint.numel():  # summed up column by column
            is_faint = torch.zeros_like(mass, dtype=torch.bool)
            is_faint[faint] = True
            place = is_faint.cumsum(0) - 1
            inside = is_faint[entry_row] & (columns >= 0)
            others = logits[faint].index_put(
                (place[entry_row[inside]], columns[inside]), logits.new_tensor(-torch.inf)
            )
            rest[faint] = torch.logsumexp(others, 1) - total[faint]
        return entries, rest, torch.ones_like(total)

    def _read_stored(
        self, signal: TeacherTopK, rows: Tensor, entry_row: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ids = signal.ids.flatten(0, 1)[rows]  # [N, k]
        stored = upcast(signal.log_probs.detach().flatten(0, 1)[rows])
        # A pad of a short row may repeat a stored id: it goes to the column that nobody reads.
        nowhere = torch.isneginf(stored) | (ids >= self.vocab_size)
        ids = ids.masked_fill(nowhere, self.vocab_size)
        stored = stored.masked_fill(nowhere, -torch.inf)
        table = self._empty_table(len(rows), stored)
        table.scatter_(1, ids, stored)
        columns = columns.masked_fill(columns < 0, self.vocab_size)
        entries = table[entry_row, columns]
        table[entry_row, columns] = -torch.inf
        others = torch.logsumexp(table.gather(1, ids), 1)
        table.scatter_(1, ids, -torch.inf)
        known = torch.exp(stored).sum(1)
        unknown = torch.log((1.0 - known).clamp(min=0.0))
        return entries, torch.logaddexp(others, unknown), known

    def _empty_table(self, count: int, like: Tensor) -> Tensor:
        """[count, V_t + 1] of -inf; kept from block to block, as every reader cleans up."""
        table = self._table
        if table is None or len(table) < count or table.dtype != like.dtype:
            table = like.new_full((count, self.vocab_size + 1), -torch.inf)
            self._table = table
        return table[:count]
