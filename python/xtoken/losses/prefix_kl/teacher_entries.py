"""What the teacher says at single entries of single rows: full logits or a stored top-k alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from xtoken.losses.engine.teacher_rows import TeacherRows
from xtoken.losses.kernels.entries import read_entries
from xtoken.tensors.full_logits import FullLogits
from xtoken.tensors.host import readable
from xtoken.tensors.rows import taken, upcast
from xtoken.tensors.teacher_signal import Teacher, TeacherTopK, teacher_positions

# Where less than this is left, 1 - sum has lost its digits in float32.
_FAINT = 1e-3
# Numbers read at a time: twice the blocks of rows, as an entry is read once.
_BLOCK_NUMBERS = {"cpu": 2**21, "cuda": 2**25}


@dataclass(frozen=True, eq=False)
class TeacherEntries:
    """Log-probabilities at (row, column) pairs; without a graph.

    Attributes:
        signal: as passed by the caller.
        vocab_size: V_t; what lies beyond it has no mass.
        temperature: divides the logits; a stored top-k was taken at it.
        log_totals: [B * T_t] the log of each position's softmax denominator, NaN where unknown.
    """

    signal: Teacher
    vocab_size: int
    temperature: float
    log_totals: Tensor

    @classmethod
    def from_rows(cls, rows: TeacherRows) -> TeacherEntries:
        """Entries of the signal whose rows a loss reads, with the denominators it knows.

        Args:
            rows: one row per chunk.
        """
        positions = teacher_positions(rows.signal)
        device = rows.where.index.device
        totals = torch.full((positions[0] * positions[1],), torch.nan, device=device)
        if rows.log_totals is not None:
            totals = totals.to(rows.log_totals.dtype)
            totals[rows.where.index] = rows.log_totals
        return cls(rows.signal, rows.vocab_size, rows.temperature, totals)

    @property
    def dtype(self) -> torch.dtype:
        """That of what is read."""
        if isinstance(self.signal, TeacherTopK):
            return upcast(self.signal.log_probs[:0]).dtype
        return FullLogits(self.signal, self.vocab_size).dtype

    @property
    def is_stored(self) -> bool:
        """Whether entries may be unknown."""
        return isinstance(self.signal, TeacherTopK)

    @torch.no_grad()
    def read(
        self, rows: Tensor, entry_ends: list[int], entry_row: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of entries, of all else in each row, and each row's known mass.

        Args:
            rows: [N] int64 into the flattened positions.
            entry_ends: N + 1 ints, the range of each row's entries.
            entry_row: [S] int64, rising, into `rows`.
            columns: [S] int64 below V_t, distinct within a row; negative ones are no entry.

        Returns:
            [S], -inf where unknown or no entry; [N] log of the mass on other columns, unknown ones
            included; [N] mass that is known, 1 for full logits.
        """
        if not isinstance(self.signal, TeacherTopK):
            found = None
            if isinstance(self.signal, Tensor):
                found = read_entries(
                    self.signal, self.vocab_size, self.temperature, rows, entry_row, columns
                )
            if found is not None:
                return *found, torch.ones_like(found[1])
            if not readable(columns):
                return self._read_whole_rows(rows, entry_ends, entry_row, columns)
            return self._read_logits(rows, entry_row, columns)
        if not readable(columns):
            return _search_stored(self.signal, self.vocab_size, rows, entry_row, columns)
        # Only columns that somebody asks for have a place in the block.
        asked = torch.unique(columns.clamp(min=0))
        place = torch.full((self.vocab_size + 1,), len(asked), device=columns.device)
        place[asked] = torch.arange(len(asked), device=columns.device)
        columns = torch.where(columns < 0, len(asked), place[columns.clamp(min=0)])
        read = _StoredReader(self.signal, place, len(asked))
        parts = []
        for start, stop in _blocks(len(rows), len(asked), rows.device):
            entries = slice(entry_ends[start], entry_ends[stop])
            parts.append(read(rows[start:stop], entry_row[entries] - start, columns[entries]))
        found, rest, known = zip(*parts, strict=True)
        return torch.cat(found), torch.cat(rest), torch.cat(known)

    def _read_logits(
        self, rows: Tensor, entry_row: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        full = self._full
        total = self._totals(rows)  # [N]
        asked = full.entries(rows[entry_row], columns.clamp(min=0))
        entries = self._scaled(asked) - total[entry_row]
        entries = entries.masked_fill(columns < 0, -torch.inf)
        mass = torch.zeros_like(total).index_add(0, entry_row, torch.exp(entries))
        rest = torch.log1p(-mass.clamp(max=1.0))
        faint = (1.0 - mass < _FAINT).nonzero().flatten()
        for start, stop in _blocks(len(faint), self.vocab_size, rows.device):
            some = faint[start:stop]  # summed up column by column
            place = torch.full_like(rows, -1).index_copy(
                0, some, torch.arange(len(some), device=rows.device)
            )[entry_row]
            inside = (place >= 0) & (columns >= 0)
            others = self._scaled(full.rows(rows[some]))
            others[place[inside], columns[inside]] = -torch.inf
            rest[some] = torch.logsumexp(others, 1) - total[some]
        return entries, rest, torch.ones_like(total)

    def _read_whole_rows(
        self, rows: Tensor, entry_ends: list[int], entry_row: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `_read_logits`, with no look at which rows need what: all is summed for all."""
        full = self._full
        totals, rests = [], []
        for start, stop in _blocks(len(rows), self.vocab_size, rows.device):
            logits = self._scaled(full.rows(rows[start:stop]))
            totals.append(torch.logsumexp(logits, 1))
            some = slice(entry_ends[start], entry_ends[stop])
            column = columns[some].masked_fill(columns[some] < 0, self.vocab_size)
            # What is no entry has a column of its own past the last.
            others = torch.nn.functional.pad(logits, (0, 1), value=-torch.inf)
            others.index_put_((entry_row[some] - start, column), others.new_full((), -torch.inf))
            rests.append(torch.logsumexp(others, 1) - totals[-1])
        total = torch.cat(totals)
        asked = full.entries(rows[entry_row], columns.clamp(min=0))
        entries = self._scaled(asked) - total[entry_row]
        return (
            entries.masked_fill(columns < 0, -torch.inf),
            torch.cat(rests),
            torch.ones_like(total),
        )

    def _totals(self, rows: Tensor) -> Tensor:
        """[N] log of the softmax denominators of positions."""
        full = self._full
        total = self.log_totals[rows]
        unknown = torch.isnan(total).nonzero().flatten()
        if unknown.numel() == 0:
            return total
        parts = []
        for start, stop in _blocks(len(unknown), self.vocab_size, rows.device):
            logits = self._scaled(full.rows(rows[unknown[start:stop]]))
            # The largest over its probability: a softmax is faster than a log-sum-exp.
            largest = torch.softmax(logits, 1).amax(1)
            parts.append(logits.amax(1) - torch.log(largest))
        found = torch.cat(parts)
        return total.to(found.dtype).index_copy(0, unknown, found)

    @property
    def _full(self) -> FullLogits:
        assert not isinstance(self.signal, TeacherTopK)
        return FullLogits(self.signal, self.vocab_size)

    def _scaled(self, logits: Tensor) -> Tensor:
        return logits if self.temperature == 1.0 else logits / self.temperature


def _search_stored(
    signal: TeacherTopK, size: int, rows: Tensor, entry_row: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Each entry looked up among its row's sorted ids: shapes that no value decides."""
    ids = signal.ids.flatten(0, 1)[rows]  # [N, k]
    stored = upcast(signal.log_probs.detach().flatten(0, 1)[rows])
    stored = stored.masked_fill(ids >= size, -torch.inf)
    # A pad of a short row may repeat a stored id: it goes where nobody reads.
    ids, order = ids.masked_fill(torch.isneginf(stored), size).sort(1)
    stored = stored.gather(1, order)
    width = size + 1
    keys = (ids + torch.arange(len(rows), device=ids.device)[:, None] * width).flatten()
    wanted = entry_row * width + columns
    at = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    hit = (keys[at] == wanted) & (columns >= 0)
    entries = stored.flatten()[at].masked_fill(~hit, -torch.inf)
    asked = torch.zeros_like(keys).index_add(0, at, hit.to(keys.dtype)).view_as(stored)
    others = stored.masked_fill(asked > 0, -torch.inf)
    known = torch.exp(stored).sum(1)
    unknown = torch.log((1.0 - known).clamp(min=0.0))
    return entries, torch.logaddexp(torch.logsumexp(others, 1), unknown), known


@dataclass(frozen=True, eq=False)
class _StoredReader:
    """A stored top-k as a dense block of the `width` columns that are asked for, and one more.

    Attributes:
        place: [V_t + 1] int64, each teacher id's column, `width` where nobody asks for it.
    """

    signal: TeacherTopK
    place: Tensor
    width: int

    def __call__(
        self, rows: Tensor, entry_row: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ids = self.signal.ids.flatten(0, 1).index_select(0, rows)  # [N, k]
        stored = upcast(self.signal.log_probs.detach().flatten(0, 1).index_select(0, rows))
        size = len(self.place) - 1
        stored = stored.masked_fill(ids >= size, -torch.inf)
        # A pad of a short row may repeat a stored id: it goes where nobody reads.
        ids = taken(self.place, ids.clamp(max=size)).masked_fill(torch.isneginf(stored), self.width)
        table = stored.new_full((len(rows), self.width + 1), -torch.inf).scatter_(1, ids, stored)
        table[:, self.width] = -torch.inf
        entries = table[entry_row, columns]
        table[entry_row, columns] = -torch.inf
        others = torch.where(ids == self.width, stored, table.gather(1, ids))
        known = torch.exp(stored).sum(1)
        unknown = torch.log((1.0 - known).clamp(min=0.0))
        return entries, torch.logaddexp(torch.logsumexp(others, 1), unknown), known


def _blocks(count: int, width: int, device: torch.device) -> Iterator[tuple[int, int]]:
    numbers = _BLOCK_NUMBERS.get(device.type, _BLOCK_NUMBERS["cuda"])
    step = max(1, numbers // max(width, 1))
    for start in range(0, count, step):
        yield start, min(start + step, count)
