"""Stop tokens added to one another: the same for whole rows, some columns and a stored top-k."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xtoken.tensors.stop_fold import StopFold


def folded(probs: torch.Tensor, fold: StopFold) -> torch.Tensor:
    """The slow way, in float64."""
    out = probs.double().clone()
    for row in out:
        for source, target in fold.pairs:
            row[target] += row[source]
            row[source] = 0
    return out


@st.composite
def cases(draw: st.DrawFn) -> tuple[StopFold, torch.Tensor]:
    size = draw(st.integers(3, 9))
    ids = draw(st.permutations(range(size)))
    count = draw(st.integers(1, (size - 1) // 2))
    targets = draw(st.lists(st.sampled_from(ids[count:]), min_size=count, max_size=count))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = torch.randn(4, size, generator=generator)
    return StopFold(ids[:count], targets), torch.log_softmax(rows, -1)


@given(cases())
def test_whole_rows_are_those_of_a_loop(case: tuple[StopFold, torch.Tensor]) -> None:
    fold, log_probs = case
    expected = folded(log_probs.exp(), fold)
    assert torch.allclose(fold.dense(log_probs.clone()).exp().double(), expected, atol=1e-6)


@given(cases(), st.data())
def test_some_columns_are_those_of_whole_rows(
    case: tuple[StopFold, torch.Tensor], data: st.DataObject
) -> None:
    fold, log_probs = case
    ids = st.lists(st.sampled_from(range(log_probs.shape[1])), min_size=1, unique=True)
    columns = torch.tensor(sorted(data.draw(ids)))
    found = fold.chosen(log_probs[:, columns], log_probs, columns)
    assert torch.allclose(found, fold.dense(log_probs.clone())[:, columns], atol=1e-6)


@given(cases(), st.integers(1, 9))
def test_a_stored_top_k_keeps_its_mass_and_names_no_source(
    case: tuple[StopFold, torch.Tensor], k: int
) -> None:
    fold, log_probs = case
    best = torch.topk(log_probs, min(k, log_probs.shape[1]))
    ids, stored = fold.stored(best.indices, best.values)
    dense = torch.zeros_like(log_probs, dtype=torch.float64)
    dense.scatter_add_(1, ids, stored.exp().double())
    kept = torch.zeros_like(log_probs, dtype=torch.float64)
    kept.scatter_(1, best.indices, best.values.exp().double())
    assert torch.allclose(dense, folded(kept, fold), atol=1e-6)
    live = torch.isfinite(stored)
    for row in range(len(ids)):
        assert len(set(ids[row][live[row]].tolist())) == int(live[row].sum())
    mask = torch.zeros(log_probs.shape[1], dtype=torch.bool)
    mask[best.indices] = True
    named = fold.named(mask.clone())
    assert set(ids[live].tolist()) <= set(named.nonzero().flatten().tolist())


def test_it_says_what_moves_where() -> None:
    assert repr(StopFold([3, 5], [1, 1])) == "StopFold(3 -> 1, 5 -> 1)"
    assert len(StopFold([3], [1])) == 1
    with pytest.raises(ValueError, match="zip"):
        StopFold([1, 2], [3])
