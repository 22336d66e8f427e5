"""Where prefix KL compares: the (chunk, depth) nodes of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.trie import TrieSlots


@dataclass(frozen=True, eq=False)
class PrefixItems:
    """The (chunk, depth) pairs at which a loss compares, by chunk and depth.

    Attributes:
        chunk, depth, node: [N] int64.
        ptr: C + 1 ints, each chunk's range in them.
        deepest: [C] int64, the largest depth of each chunk, 0 where it has none.
    """

    chunk: Tensor
    depth: Tensor
    node: Tensor
    ptr: list[int]
    deepest: Tensor

    def __len__(self) -> int:
        return self.chunk.shape[0]


def prefix_items(
    slots: TrieSlots,
    chunks: ChunkBatch,
    ids: Tensor,
    side: str,
    *,
    max_depth: int | None = None,
    last_depth: bool = True,
) -> PrefixItems:
    """The nodes of the chunks whose other side is one token; one call into the core, on the CPU.

    Args:
        slots: the trie whose pieces are the tokens of `side`.
        chunks: the chunks that the loss counts.
        ids: [B, T] int64 of `side`.
        side: "teacher" takes chunks of one student token and any number of teacher tokens,
            "student" those of one teacher token and several student tokens.
        max_depth: longest prefix; None for no limit.
        last_depth: whether the whole chunk counts as a prefix of what follows.
    """
    sizes = {name: _sizes(chunks, name) for name in ("student", "teacher")}
    taken = sizes["student"] == 1
    if side == "student":
        taken = ~taken & (sizes["teacher"] == 1)
    selected = taken.nonzero().flatten()
    start = (chunks.sample * ids.shape[1] + getattr(chunks, f"{side}_start"))[selected]
    end = start + sizes[side][selected] - (0 if last_depth else 1)
    found = slots.trie.lookup(
        *(x.contiguous().cpu().numpy() for x in (ids.flatten(), start, end)), max_depth=max_depth
    )
    device = chunks.device
    index, depth, node = (torch.from_numpy(array).to(device) for array in found)
    chunk = selected[index]
    counts = torch.bincount(chunk, minlength=len(chunks))
    deepest = torch.zeros_like(counts).scatter_reduce(0, chunk, depth, "amax")
    return PrefixItems(chunk, depth, node, [0, *counts.cumsum(0).tolist()], deepest)


def _sizes(chunks: ChunkBatch, side: str) -> Tensor:
    sizes: Tensor = getattr(chunks, f"{side}_end") - getattr(chunks, f"{side}_start")
    return sizes
