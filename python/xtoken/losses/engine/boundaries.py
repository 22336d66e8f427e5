"""What the student's own tokenizer would have joined to its last token before each chunk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xtoken.losses.engine.prepared import Items, Prepared
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.pair_parts import PairParts


@dataclass(frozen=True, eq=False)
class LeftOut(Prepared):
    """Teacher tokens that do not count at a chunk's root: the student would have joined them.

    Attributes:
        items: by chunk, with `token`, the teacher's.
    """

    items: Items

    def mask(self, start: int, stop: int, size: int) -> Tensor:
        """[stop - start, size] bool, those of chunks [start, stop)."""
        items = self.items.of_rows(start, stop)
        mask = torch.zeros(stop - start, size, dtype=torch.bool, device=items.row.device)
        return mask.index_put((items.row, items["token"]), mask.new_ones(()))


@dataclass(frozen=True, eq=False)
class LeftOutMask:
    """The same of a block alone, as a mask [n, V_t + 1] bool."""

    dense: Tensor

    def mask(self, start: int, stop: int, size: int) -> Tensor:
        """As `LeftOut`."""
        return self.dense[start:stop, :size].clone()


def left_out(
    pair: PairParts, chunks: ChunkBatch, student_ids: Tensor, teacher_ids: Tensor
) -> LeftOut:
    """Those of a batch; ids on another device than the CPU are waited for."""
    assert pair.cells is not None
    host = chunks.host
    last = student_ids.cpu().numpy()[host.sample, host.student_start - 1]
    found = pair.cells.swallowing(last)
    rows = np.repeat(np.arange(len(found)), [len(each) for each in found])
    tokens = np.concatenate([np.zeros(0, np.int64), *found])
    return LeftOut(host, Items.of(rows, {"token": tokens}, chunks.device))
