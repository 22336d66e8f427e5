"""What losses read of a pair: made as needed, moved together, never of two pairs."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from tokenizer_zoo import byte_level_bpe

from xtoken import Projection
from xtoken.errors import OptionError, PairError, ShapeError
from xtoken.losses import LOSSES, PairParts, SparseProjection
from xtoken.tensors.pair_parts import PARTS_OF_LOSS

NAMES = {
    "projection": ["projection"],
    "tries": ["student_trie", "teacher_trie"],
    "strict_common": ["strict_common"],
    "relaxed_common": ["relaxed_common"],
    "targets": ["targets"],
    "byte_prefixes": ["byte_prefixes"],
    "completions": ["completions"],
    "piece_chains": ["piece_chains"],
    "cells": ["cells"],
}


@pytest.fixture(scope="module")
def projection() -> Projection:
    return Projection.build(
        byte_level_bpe(900, digits=3), byte_level_bpe(700, digits=1), cache_dir=False
    )


@pytest.mark.parametrize("name", LOSSES)
def test_a_pair_has_the_parts_that_a_loss_needs_and_no_other(
    name: str, projection: Projection
) -> None:
    pair = PairParts.from_projection(projection, needs=name)
    assert pair.sizes == projection.shape
    assert pair.fingerprint == projection.pair
    wanted = {attribute for part in PARTS_OF_LOSS[name] for attribute in NAMES[part]}
    every = {attribute for attributes in NAMES.values() for attribute in attributes}
    assert {one for one in every if getattr(pair, one) is not None} == wanted
    assert LOSSES[name].parts == PARTS_OF_LOSS[name]


def test_all_parts_move_together(projection: Projection) -> None:
    pair = PairParts.from_projection(projection, needs=set(NAMES)).to("meta")
    tensors = [*pair.buffers(), *pair.parameters()]
    assert len(tensors) > 20
    assert all(tensor.device.type == "meta" for tensor in tensors)


def test_what_is_made_once_moves_with_one_loss_alone(projection: Projection) -> None:
    size = len(pickle.dumps(projection))
    needs = {"tries", "targets", "byte_prefixes", "completions", "piece_chains"}
    one, other = (PairParts.from_projection(projection, needs=needs) for _ in range(2))
    assert one.targets is not None
    assert one.targets is other.targets
    tables = one.byte_prefixes, other.byte_prefixes
    assert tables[0].student_bytes is tables[1].student_bytes
    one.to("meta")
    assert all(tensor.device.type == "cpu" for tensor in other.buffers())
    again = PairParts.from_projection(projection, needs=needs)
    for mine, theirs in zip(other.buffers(), again.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    of_another = PairParts.from_projection(replace(projection), needs=needs)
    assert of_another.targets is not one.targets
    assert len(pickle.dumps(projection)) == size


def test_the_common_sets_are_those_of_the_projection(projection: Projection) -> None:
    pair = PairParts.from_projection(
        projection, needs={"strict_common", "relaxed_common"}, threshold=0.9
    )
    for mode, common in (("strict", pair.strict_common), ("relaxed", pair.relaxed_common)):
        found = torch.stack([common.student_ids, common.teacher_ids], 1)
        assert torch.equal(found, torch.from_numpy(projection.common_set(mode, 0.9)))


def test_learned_weights_come_back_as_a_projection(projection: Projection) -> None:
    pair = PairParts.from_projection(projection, needs="p-kl", learnable=True)
    sparse = pair.projection
    assert sparse is not None
    assert sparse.free is not None
    with torch.no_grad():
        sparse.free.add_(torch.randn(sparse.free.shape, generator=torch.Generator().manual_seed(0)))
    learned = sparse.to_projection(projection)
    assert learned.options.origin == "learned"
    again = SparseProjection.from_projection(learned)
    probs = torch.softmax(torch.randn(3, projection.shape[0]), -1)
    with torch.no_grad():
        torch.testing.assert_close(again.project(probs), sparse.project(probs))


def test_what_cannot_be_made_is_refused(projection: Projection) -> None:
    with pytest.raises(OptionError, match="needs = 'kl', expected a loss"):
        PairParts.from_projection(projection, needs="kl")
    with pytest.raises(OptionError, match="needs holds 'trie', expected of projection, tries"):
        PairParts.from_projection(projection, needs={"trie"})
    with pytest.raises(OptionError, match="learnable = True, but needs = 'prefix-kl'"):
        PairParts.from_projection(projection, needs="prefix-kl", learnable=True)
    with pytest.raises(OptionError, match="threshold"):
        PairParts.from_projection(projection, needs="h-kl", threshold=0.0)
    bare = replace(projection, teacher_pieces_indptr=None, teacher_pieces=None)
    with pytest.raises(OptionError, match="has no student pieces of the teacher's tokens"):
        PairParts.from_projection(bare, needs="prefix-kl")
    for sizes in ((0, 3), (3,), (3.0, 4)):
        with pytest.raises(ShapeError, match="sizes = "):
            PairParts(sizes)
    with pytest.raises(PairError, match="projection is 3 x 3, expected 3 x 4"):
        PairParts((3, 4), projection=SparseProjection.identity(3))
