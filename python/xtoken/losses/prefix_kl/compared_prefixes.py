"""Where prefix KL compares: tries as tensors, and the (chunk, depth) nodes of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.projection import SparseProjection, ragged_arange


class TrieSlots(nn.Module):
    """A trie (`xtoken.trie.PieceTrie`) with its arrays as buffers, so that it moves with a model.

    The `node_sizes[u]` tokens below node `u` are `tokens[node_starts[u]:]`, cut into the slots
    `slot_ptr[u]:slot_ptr[u + 1]`; piece -1 marks the tokens that end at `u`.
    """

    tokens: Tensor
    node_starts: Tensor
    slot_ptr: Tensor
    slot_sizes: Tensor
    slot_pieces: Tensor
    node_sizes: Tensor

    def __init__(self, trie: Any) -> None:
        """
        Args:
            trie: has `slots`, `lookup`, `token_count` and `piece_count` as `PieceTrie` does.
        """
        super().__init__()
        self.trie = trie
        for name, array in trie.slots._asdict().items():
            # A copy: torch cannot hold a read-only array.
            self.register_buffer(name, torch.tensor(array), persistent=False)
        below = torch.nn.functional.pad(self.slot_sizes.cumsum(0), (1, 0))[self.slot_ptr]
        self.register_buffer("node_sizes", below.diff(), persistent=False)

    @property
    def token_count(self) -> int:
        """Size of the vocabulary whose tokens are sorted here."""
        return int(self.trie.token_count)

    @property
    def piece_count(self) -> int:
        """Size of the vocabulary that spells them."""
        return int(self.trie.piece_count)

    def below(self, node: Tensor) -> Tensor:
        """The tokens below each of `node` [N] int64, one after the other."""
        return self.tokens[ragged_arange(self.node_starts[node], self.node_sizes[node])]

    def extra_repr(self) -> str:
        return repr(self.trie)


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


def first_pieces(projection: SparseProjection, slots: TrieSlots) -> SparseProjection:
    """W with `decay = 0`: each token of the trie on its first piece, all others on their heaviest
    column in W (special tokens are in no trie; rows of W are sorted by falling weight).

    Args:
        projection: W [V_s, V_t] of the same pair, with any decay.
        slots: the trie of the student's tokens.

    Raises:
        ValueError: W and the trie are of different vocabularies.
    """
    sizes = (slots.token_count, slots.piece_count)
    if projection.shape != sizes:
        raise ValueError(
            f"W is {projection.shape[0]} x {projection.shape[1]}, the trie of {sizes[0]} student "
            f"tokens in {sizes[1]} pieces; build both from the same two tokenizers"
        )
    starts, counts = projection.indptr[:-1], projection.indptr.diff()
    first = torch.full_like(counts, -1)
    rows = counts > 0
    first[rows] = projection.indices[starts[rows]]
    root = slice(0, int(slots.slot_ptr[1]))
    pieces = torch.repeat_interleave(slots.slot_pieces[root], slots.slot_sizes[root])
    first[slots.tokens] = pieces
    kept = first >= 0
    indptr = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
    weights = torch.ones(int(indptr[-1]), dtype=projection.weights.dtype, device=first.device)
    return SparseProjection(indptr, first[kept], weights, projection.shape)
