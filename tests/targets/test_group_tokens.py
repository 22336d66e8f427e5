"""The tokens of groups as ranges, against sets of them."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from exact_kl_cases import LENGTH, chunks_of, laid_out, random_targets

from xtoken.tensors.group_tokens import GroupTokens
from xtoken.tensors.target_batch import TargetBatch


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("part", ["all", "some", "none"])
def test_a_batch_lists_the_tokens_of_each_group(seed: int, part: str) -> None:
    targets, tokens = random_targets(seed)
    chunks = chunks_of(targets)
    share = {"all": 1.0, "some": 0.6, "none": 0.0}[part]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(len(chunks), generator=generator) < share
    own = chunks.select(chosen)
    batch = TargetBatch.from_targets(targets, tokens, own, LENGTH)

    # Position by position, as `Targets` says it.
    sample = np.repeat(np.arange(targets.examples), np.diff(targets.position_indptr))
    wanted = []
    for at in range(len(own)):
        start, end = int(own.student_start[at]), int(own.student_end[at])
        for place in np.flatnonzero(sample == int(own.sample[at])).tolist():
            if start <= targets.positions[place] < end:
                wanted.append((place, targets.groups_at(place, tokens)))
    assert len(batch.rows) == len(wanted)
    ptr, listed, owner = batch.token_ptr.tolist(), batch.tokens.tolist(), batch.token_group
    assert ptr == [0, *np.cumsum([len(ids) for _, groups in wanted for *_, ids in groups])]
    assert batch.host is not None
    assert batch.host.token_ptr.tolist() == ptr
    group = 0
    for position, (place, groups) in enumerate(wanted):
        row = sample[place] * LENGTH + targets.positions[place] - 1
        assert int(batch.rows[position]) == row
        for mass, depth, ids in groups:
            found = listed[ptr[group] : ptr[group + 1]]
            assert sorted(found) == sorted(ids)
            assert (owner[ptr[group] : ptr[group + 1]] == group).all()
            assert (float(batch.probs[group]), int(batch.depths[group])) == (mass, depth)
            group += 1
    most = max(listed, default=-1)
    assert batch.host.most_token() == most
    assert batch.host.fits(most + 1)
    assert not batch.host.fits(most) or most < 0


def test_lists_are_ranges_of_themselves() -> None:
    ptr, tokens = torch.tensor([0, 2, 2, 5]), torch.tensor([4, 1, 7, 0, 2])
    groups = GroupTokens.of_lists(ptr, tokens)
    for found in (groups, groups.mapped(torch.clone), copy.deepcopy(groups)):
        listed = found.listed()
        assert torch.equal(listed.ptr, ptr)
        assert torch.equal(listed.tokens, tokens)
        assert listed.group.tolist() == [0, 0, 2, 2, 2]
    assert groups.listed() is groups.listed()


def test_no_list_is_sent_to_another_process() -> None:
    batch = laid_out(*random_targets(0))
    before = len(pickle.dumps(batch))
    tokens = batch.tokens
    assert len(pickle.dumps(batch)) == before
    assert torch.equal(pickle.loads(pickle.dumps(batch)).tokens, tokens)
    # What a loss changes of the masses leaves the tokens, and their list, alone.
    assert replace(batch, probs=batch.probs / 2).tokens is tokens
