"""Where prefix KL compares: the (chunk, depth) nodes of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.host import on_device
from xtoken.tensors.host_chunks import HostChunks
from xtoken.trie import PieceTrie

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PrefixItems:
    """The (chunk, depth) pairs at which a loss compares, by chunk and depth.

    Attributes:
        chunk, depth, node: [N] int64.
        ptr: C + 1 numbers on the host, each chunk's range in them.
        deepest: [C] on the host, the largest depth of each chunk, 0 where it has none.
        host_node: `node` on the host.
    """

    chunk: Tensor
    depth: Tensor
    node: Tensor
    ptr: Ints
    deepest: Ints
    host_node: Ints

    def __len__(self) -> int:
        return self.chunk.shape[0]

    def mapped(self, move: Callable[[Tensor], Tensor]) -> PrefixItems:
        """The same in tensors that `move` makes of these, of equal values."""
        return replace(self, chunk=move(self.chunk), depth=move(self.depth), node=move(self.node))


def prefix_items(
    trie: PieceTrie,
    chunks: ChunkBatch,
    ids: Ints,
    side: str,
    *,
    max_depth: int | None = None,
    last_depth: bool = True,
    device: torch.device | None = None,
) -> PrefixItems:
    """The nodes of the chunks whose other side is one token; one call into the core, on the host.

    Args:
        trie: whose pieces are the tokens of `side`.
        chunks: the chunks that the loss counts.
        ids: [B, T] of `side`, contiguous.
        side: "teacher" takes chunks of one student token and any number of teacher tokens,
            "student" those of one teacher token and several student tokens.
        max_depth: longest prefix; None for no limit.
        last_depth: whether the whole chunk counts as a prefix of what follows.
        device: where the tensors go; None leaves them on the CPU.
    """
    host = chunks.host
    sizes = {name: np.subtract(*host.range_of(name)[::-1]) for name in ("student", "teacher")}
    taken = sizes["student"] == 1
    if side == "student":
        taken = ~taken & (sizes["teacher"] == 1)
    selected = np.flatnonzero(taken)
    start = (host.sample * ids.shape[1] + host.range_of(side)[0])[selected]
    end = start + sizes[side][selected] - (0 if last_depth else 1)
    found = trie.lookup(ids.reshape(-1), start, end, max_depth=max_depth)
    chunk = selected[found.chunk]
    ptr = np.zeros(len(chunks) + 1, np.int64)
    np.cumsum(np.bincount(chunk, minlength=len(chunks)), out=ptr[1:])
    deepest = np.zeros(len(chunks), np.int64)
    np.maximum.at(deepest, chunk, found.depth)
    device = torch.device("cpu") if device is None else device
    tensors = [on_device(x, device) for x in (chunk, found.depth, found.node)]
    return PrefixItems(tensors[0], tensors[1], tensors[2], ptr, deepest, found.node)


@dataclass(frozen=True, eq=False)
class PreparedPrefixes:
    """What prefix KL looks up in the tries for a batch, made with the batch on the CPU.

    A loss that gets it waits for no device. It travels with the batch: `to`, `pin_memory`.

    Attributes:
        teacher: items of the chunks of one student token.
        student: the mirror; None where it was not asked for.
        max_depth, last_depth: as `prefix_items`.
        host: of the chunks that these are of.
    """

    teacher: PrefixItems
    student: PrefixItems | None
    host: HostChunks
    max_depth: int | None
    last_depth: bool

    def belong_to(self, chunks: ChunkBatch) -> bool:
        """Whether they were made of these very chunks, wherever both have moved since."""
        return self.host is chunks.host

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PreparedPrefixes:
        """The same on another device."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PreparedPrefixes:
        """The same in pinned memory, for a copy to a GPU that waits for nothing."""
        return self.mapped(Tensor.pin_memory)

    def mapped(self, move: Callable[[Tensor], Tensor]) -> PreparedPrefixes:
        """The same in tensors that `move` makes of these, of equal values."""
        student = None if self.student is None else self.student.mapped(move)
        return replace(self, teacher=self.teacher.mapped(move), student=student)


def prepare_prefixes(
    student_trie: PieceTrie,
    teacher_trie: PieceTrie | None,
    chunks: ChunkBatch,
    student_ids: Tensor,
    teacher_ids: Tensor,
    *,
    max_depth: int | None = None,
    last_depth: bool = True,
) -> PreparedPrefixes:
    """Look the chunks of a batch up; tensors on another device than the CPU are waited for.

    Args:
        student_trie: the student's tokens as teacher pieces.
        teacher_trie: the mirror; None leaves it out.
        chunks: the chunks that the loss will count.
        student_ids, teacher_ids: [B, T] int64.
        max_depth, last_depth: as `prefix_items`.
    """
    found = [
        None
        if trie is None
        else prefix_items(
            trie, chunks, np.ascontiguousarray(ids.cpu().numpy()), side,
            max_depth=max_depth, last_depth=last_depth, device=chunks.device,
        )
        for side, trie, ids in (
            ("teacher", student_trie, teacher_ids), ("student", teacher_trie, student_ids)
        )
    ]  # fmt: skip
    assert found[0] is not None
    return PreparedPrefixes(found[0], found[1], chunks.host, max_depth, last_depth)
