"""Logits whose vocabulary is cut over ranks (tensor parallel)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from xtoken.losses.engine.student_rows import zero_grads
from xtoken.tensors.rows import upcast


@dataclass(frozen=True, eq=False)
class VocabShard:
    """Logits of which this rank holds some columns (tensor parallel over the vocabulary).

    Attributes:
        logits: [B, T_s, V_r] float, this rank's columns; ranks hold consecutive ranges in order.
        group: the process group over which the vocabulary is cut.
    """

    logits: Tensor
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True, eq=False)
class ShardRows:
    """Rows whose columns come from all ranks, a block for each rank at a time: each computes the
    loss of its block, and sends every rank the gradient of the columns that it has."""

    logits: Tensor
    group: dist.ProcessGroup | None
    sizes: tuple[int, ...]
    vocab_size: int

    @classmethod
    def build(cls, shard: VocabShard, vocab_size: int | None) -> ShardRows:
        world, local = dist.get_world_size(shard.group), shard.logits.shape[-1]
        sizes: list[int] = [0] * world
        held = [torch.zeros(1, dtype=torch.int64, device=shard.logits.device) for _ in sizes]
        dist.all_gather(held, torch.full_like(held[0], local), group=shard.group)
        sizes = [int(size) for size in held]
        return cls(shard.logits, shard.group, tuple(sizes), vocab_size or sum(sizes))

    @property
    def shared(self) -> None:
        """Each loss has its own gradient."""
        return None

    @property
    def positions(self) -> tuple[int, int]:
        return self.logits.shape[0], self.logits.shape[1]

    def _mine(self, columns: Tensor | None) -> tuple[Tensor | slice, list[int]]:
        """This rank's local columns among those asked for, ascending ids (None: all of the
        vocabulary), and how many of them each rank has."""
        ends = torch.tensor(self.sizes, device="cpu").cumsum(0).clamp(max=self.vocab_size)
        if columns is not None:
            ends = torch.searchsorted(columns, ends.to(columns.device)).cpu()
        cuts = [0, *ends.tolist()]
        counts = [stop - start for start, stop in itertools.pairwise(cuts)]
        rank = dist.get_rank(self.group)
        if columns is None:
            return slice(0, counts[rank]), counts
        first = sum(self.sizes[:rank])
        return columns[cuts[rank] : cuts[rank + 1]] - first, counts

    @property
    def rank(self) -> int:
        """This one's place among the ranks."""
        return dist.get_rank(self.group)

    def deal(self, index: Sequence[Tensor], columns: Tensor | None) -> Tensor:
        """What `rows` gives for this rank's index among those of all ranks; no rows where there are
        fewer. All ranks call it together."""
        mine, counts = self._mine(columns)
        flat = self.logits.detach().flatten(0, 1)
        sent = [flat.index_select(0, rows)[:, mine] for rows in index]
        own = len(index[self.rank]) if self.rank < len(index) else 0
        parts = self._exchange(sent, [(own, count) for count in counts])
        return upcast(torch.cat(parts, 1))

    def add_dealt(
        self,
        grads: list[Tensor | None],
        index: Sequence[Tensor],
        columns: Tensor | None,
        grad: Tensor,
    ) -> None:
        """As `add_grads`, of what `deal` gave; all ranks call it together."""
        assert grads[0] is not None
        mine, counts = self._mine(columns)
        flat = grads[0].flatten(0, 1)
        sent = torch.split(grad.to(flat.dtype), counts, 1)
        width = counts[self.rank]
        shapes = [(len(rows), width) for rows in index]
        for rows, part in zip(index, self._exchange(sent, shapes), strict=False):
            _add(flat, rows, mine, part)

    def add_up(self, tensor: Tensor) -> None:
        """Sum over the ranks, in place."""
        dist.all_reduce(tensor, group=self.group)

    def _exchange(self, sent: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Send each rank its matrix; what each sent, of these shapes. What is missing is empty."""
        ranks = range(len(self.sizes))
        like = sent[0]
        flat = torch.cat([part.reshape(-1) for part in sent])
        gone = [sent[rank].numel() if rank < len(sent) else 0 for rank in ranks]
        come = [math.prod(shapes[rank]) if rank < len(shapes) else 0 for rank in ranks]
        found = like.new_empty(sum(come))
        dist.all_to_all_single(found, flat, come, gone, group=self.group)
        parts = torch.split(found, come)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=False)]

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.logits,)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> ShardRows:
        return replace(self, logits=tensors[0])

    def rows_at_once(self, width: int) -> int:
        return 1

    def rows(self, index: Tensor, columns: Tensor | None = None) -> Tensor:
        mine, counts = self._mine(columns)
        local = self.logits.detach().flatten(0, 1).index_select(0, index)[:, mine]
        # Every rank sends as much as the fullest, which is what all backends can gather.
        spare = max(counts) - local.shape[1]
        local = torch.nn.functional.pad(local, (0, spare)).contiguous()
        parts = [torch.empty_like(local) for _ in counts]
        dist.all_gather(parts, local, group=self.group)
        return upcast(torch.cat([p[:, :n] for p, n in zip(parts, counts, strict=True)], 1))

    def new_grads(self, needed: tuple[bool, ...]) -> list[Tensor | None]:
        return zero_grads(self.tensors(), needed)

    def add_grads(
        self, grads: list[Tensor | None], index: Tensor, columns: Tensor | None, grad: Tensor
    ) -> None:
        assert grads[0] is not None
        flat = grads[0].flatten(0, 1)
        mine, counts = self._mine(columns)
        rank = dist.get_rank(self.group)
        first = sum(counts[:rank])
        part = grad[:, first : first + counts[rank]].to(flat.dtype)
        _add(flat, index, mine, part)


def _add(flat: Tensor, rows: Tensor, mine: Tensor | slice, part: Tensor) -> None:
    """Add this rank's columns of the gradient of `rows`."""
    if isinstance(mine, slice):
        flat[:, mine].index_add_(0, rows, part)
    else:  # a loss reads a row in one block only, so a plain write is enough
        flat[rows[:, None], mine] = part
