"""Piece tries as tensors, and the W of first pieces that belongs to them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xtoken._checks import expect
from xtoken.errors import PairError
from xtoken.tensors.projection import SparseProjection
from xtoken.tensors.segments import offsets_of, ragged_arange
from xtoken.trie import PieceTrie
from xtoken.vocab.fingerprints import PairFingerprint


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

    def __init__(self, trie: PieceTrie) -> None:
        """
        Args:
            trie: the tokens of one vocabulary as pieces of the other.

        Raises:
            ArgumentTypeError: not a `PieceTrie`.
        """
        super().__init__()
        self.trie = expect(
            trie, PieceTrie, "trie", "pass PairTries.build(student, teacher).student or .teacher"
        )
        slots = trie.slots
        self._host_counts = np.diff(slots.slot_ptr)
        self._host_sizes = np.diff(np.concatenate([[0], slots.slot_sizes.cumsum()])[slots.slot_ptr])
        for name, array in slots._asdict().items():
            # A copy: torch cannot hold a read-only array.
            self.register_buffer(name, torch.tensor(array), persistent=False)
        below = offsets_of(self.slot_sizes)[self.slot_ptr]
        self.register_buffer("node_sizes", below.diff(), persistent=False)

    @property
    def fingerprint(self) -> PairFingerprint | None:
        """The pair of vocabularies, where known."""
        return self.trie.pair

    @property
    def token_count(self) -> int:
        """Size of the vocabulary whose tokens are sorted here."""
        return self.trie.token_count

    @property
    def piece_count(self) -> int:
        """Size of the vocabulary that spells them."""
        return self.trie.piece_count

    def below(self, node: Tensor, total: int | None = None) -> Tensor:
        """The tokens below each of `node` [N] int64, one after the other; `total` of them, where
        that is known."""
        return self.tokens[ragged_arange(self.node_starts[node], self.node_sizes[node], total)]

    def ends(self, node: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """On the host, for nodes [N]: N + 1 ends each of their slots and of the tokens below."""
        counts = self._host_counts[node], self._host_sizes[node]
        slots, tokens = (np.concatenate([[0], x.cumsum()]) for x in counts)
        return slots, tokens

    def extra_repr(self) -> str:
        return repr(self.trie)


def first_pieces(projection: SparseProjection, slots: TrieSlots) -> SparseProjection:
    """W with `decay = 0`: each token of the trie on its first piece, all others on their heaviest
    column in W (special tokens are in no trie; rows of W are sorted by falling weight).

    Args:
        projection: W [V_s, V_t] of the same pair, with any decay.
        slots: the trie of the student's tokens.

    Raises:
        PairError: W and the trie are of different vocabularies.
    """
    sizes = (slots.token_count, slots.piece_count)
    if projection.shape != sizes:
        raise PairError(
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
    indptr = offsets_of(kept)
    weights = torch.ones(int(indptr[-1]), dtype=projection.weights.dtype, device=first.device)
    return SparseProjection(
        indptr, first[kept], weights, projection.shape, fingerprint=projection.fingerprint
    )
