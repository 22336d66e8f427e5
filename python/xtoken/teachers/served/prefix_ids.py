"""The teacher ids that prefix KL asks for, known before the server is: its END is then exact."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.errors import OptionError
from xtoken.losses.prefix_kl.compared_prefixes import prefix_items
from xtoken.losses.prefix_kl.slots import SlotLayout
from xtoken.teachers.served.api import ChosenIds
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.pair_parts import PairParts

Ids = NDArray[np.int64]


class AlignedBatch(Protocol):
    """What is read of a `xtoken.distillation.Batch`."""

    @property
    def chunks(self) -> ChunkBatch:
        """The chunks that count."""

    @property
    def student_ids(self) -> Tensor:
        """[B, T_s] int64."""

    @property
    def teacher_ids(self) -> Tensor:
        """[B, T_t] int64."""

    @property
    def teacher(self) -> dict[str, Tensor]:
        """With the `attention_mask` of the teacher's side."""


def prefix_ids(
    parts: PairParts, batches: Iterable[AlignedBatch], *, mirror: bool = False
) -> ChosenIds:
    """The children of the prefixes at which prefix KL compares, for all sequences of some batches.

    With them beside the K best, what prefix KL says beyond its root is that of full logits.

    Args:
        parts: of `Distiller.parts`, made for `prefix-kl`.
        batches: of the distiller's `collate`, with the examples that training will see.
        mirror: also the teacher tokens below the prefixes of chunks of several student tokens,
            which the option `mirror` compares; they may be many.

    Raises:
        OptionError: the parts hold no trie.
    """
    if parts.student_trie is None or (mirror and parts.teacher_trie is None):
        raise OptionError(
            "parts hold no trie; make them with PairParts.from_projection(needs='prefix-kl')"
        )
    wanted: dict[bytes, Ids] = {}
    for batch in batches:
        wanted |= _of_batch(parts, batch, mirror)
    width = max((len(row) for table in wanted.values() for row in _rows(table)), default=1)
    name = hashlib.blake2b(f"{parts.fingerprint} {mirror}".encode(), digest_size=4).hexdigest()

    def choose(ids: Ids) -> Ids:
        chosen = np.full((len(ids), width), -1, np.int64)
        table = wanted.get(np.asarray(ids, np.int64).tobytes())
        if table is not None:
            for row in _rows(table):
                chosen[row[0, 0], : len(row)] = row[:, 1]
        return chosen

    return ChosenIds(choose, width, f"prefix-{name}")


def _rows(table: Ids) -> list[Ids]:
    """A table of (position, id), by position, cut where the position changes."""
    if len(table) == 0:
        return []
    return np.split(table, np.flatnonzero(np.diff(table[:, 0])) + 1)


def _of_batch(parts: PairParts, batch: AlignedBatch, mirror: bool) -> dict[bytes, Ids]:
    """By sequence, the distinct (position, id) that are read, by position."""
    chunks = batch.chunks.to("cpu")
    teacher_ids, mask = batch.teacher_ids.cpu(), batch.teacher["attention_mask"].bool().cpu()
    length = teacher_ids.shape[1]
    at = chunks.sample * length + chunks.teacher_start - 1
    assert parts.student_trie is not None
    trie = parts.student_trie.to("cpu")
    items = prefix_items(trie.trie, chunks, teacher_ids.numpy(), "teacher")
    layout = SlotLayout.build(trie, items.node, items.host_node)
    rows = (at[items.chunk] + items.depth)[layout.item[layout.child]]
    pairs = [torch.stack([rows, layout.piece[layout.child]], 1)]
    if mirror and parts.teacher_trie is not None:
        trie = parts.teacher_trie.to("cpu")
        items = prefix_items(trie.trie, chunks, batch.student_ids.cpu().numpy(), "student")
        layout = SlotLayout.build(trie, items.node, items.host_node)
        pairs.append(torch.stack([at[items.chunk][layout.token_item], layout.tokens], 1))
    table = np.unique(torch.cat(pairs).numpy(), axis=0)  # by row, then by id
    found: dict[bytes, Ids] = {}
    for sample in range(len(teacher_ids)):
        first = sample * length + int(mask[sample].int().argmax())
        low, high = np.searchsorted(table[:, 0], (sample * length, (sample + 1) * length))
        sequence = teacher_ids[sample][mask[sample]].numpy()
        found[sequence.tobytes()] = table[low:high] - [first, 0]
    return found
