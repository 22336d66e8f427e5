"""The tokens of a batch's chunks, and what else each chunk could have ended as."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xtoken.losses.engine.checks import check_token_ids
from xtoken.losses.engine.merge import ChunkRows
from xtoken.losses.engine.prepared import Ints, Items, Prepared
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.host import on_device
from xtoken.tensors.pair_parts import PairParts
from xtoken.tensors.stop_fold import StopFold


@dataclass(frozen=True, eq=False)
class ChainPlaces(Prepared):
    """The tokens of all chunks, in their order.

    Attributes:
        student_tokens: [N] int64 the tokens of each chunk; of several stop tokens that mean one,
            the preferred one.
        teacher_index, teacher_tokens: [M] int64 the rows of the flattened teacher positions that
            predict each chunk's teacher tokens, and those tokens.
        teacher_ends: C + 1 numbers on the host, each chunk's range in them.
        support: of chunks of several tokens on one side and one on the other, the pairs `lo`,
            `size` of `PieceChains` that end otherwise.
        single: on the host, [C] whether a chunk has one token on both sides.
    """

    student_tokens: Tensor
    teacher_index: Tensor
    teacher_tokens: Tensor
    teacher_ends: Ints
    support: Items
    single: np.ndarray[tuple[int], np.dtype[np.bool_]]


def chain_places(
    pair: PairParts, chunks: ChunkBatch, student_ids: Tensor, teacher_ids: Tensor
) -> ChainPlaces:
    """The places of a batch; ids on another device than the CPU are waited for.

    Raises:
        TokenIdError: an id inside a chunk is outside its vocabulary.
    """
    chains = pair.piece_chains
    assert chains is not None
    host, device = chunks.host, chunks.device
    sides = []
    for side, ids, size, fold in (
        ("student", student_ids, pair.sizes[0], pair.student_stop_fold),
        ("teacher", teacher_ids, pair.sizes[1], pair.stop_fold),
    ):
        first, last = host.range_of(side)
        rows = ChunkRows.ragged(
            host.sample * ids.shape[1] + first, last - first, torch.device("cpu")
        )
        tokens = ids.cpu().flatten()[rows.index]
        check_token_ids(tokens, size, side)
        assert rows.ends is not None
        sides.append((rows.index.numpy() - 1, rows.ends, _folded(tokens.numpy(), fold)))
    (_, ends, own), (index, other_ends, other) = sides
    counts, other_counts = np.diff(ends), np.diff(other_ends)
    chunk, lo, size_of = [], [], []
    for at in np.flatnonzero((counts > 1) != (other_counts > 1)).tolist():
        if counts[at] == 1:
            before, twins = other[other_ends[at] : other_ends[at + 1] - 1], chains.teacher_twins
            groups = chains.forward_groups
        else:
            before, twins = own[ends[at] : ends[at + 1] - 1], chains.student_twins
            groups = chains.backward_groups
        found = groups.get(tuple(twins.get(token, token) for token in before.tolist()))
        if found is not None:
            chunk.append(at)
            lo.append(found[0])
            size_of.append(found[1] - found[0])
    return ChainPlaces(
        host,
        on_device(own, device),
        on_device(index, device),
        on_device(other, device),
        other_ends,
        Items.of(chunk, {"lo": lo, "size": size_of}, device),
        (counts == 1) & (other_counts == 1),
    )


def _folded(tokens: Ints, fold: StopFold | None) -> Ints:
    for source, target in () if fold is None else fold.pairs:
        tokens = np.where(tokens == source, target, tokens)
    return tokens
