"""What the baselines have of a student that is the truth: enumerated, by the library's own code."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
from truth_by_enumeration import world
from truth_of_losses import losses_at_the_truth, sample

Found = dict[str, dict[str, list[float]]]


@pytest.fixture(scope="module")
def found() -> Found:
    """Of a student that packs two digits under one that has each alone."""
    names = ["p-kl, decay 0", "bpm", "escd", "partition-kl", "strict-top-k"]
    merged: Found = {name: defaultdict(list) for name in names}
    for seed in (0, 1):
        one = world(seed, 6, "digits")
        for name, shapes in losses_at_the_truth(one, sample(one, 5, seed), names).items():
            for shape, values in shapes.items():
                merged[name][shape] += values
    return merged


def mean(values: list[float]) -> float:
    finite = [value for value in values if value < math.inf]
    return sum(finite) / len(finite)


def test_where_only_the_last_digit_differs_the_partition_is_exact_and_the_longest_prefix_is_not(
    found: Found,
) -> None:
    assert len(found["bpm"]["1:n"]) > 5
    assert max(map(abs, found["partition-kl"]["1:n"])) < 1e-9
    assert max(map(abs, found["p-kl, decay 0"]["1:n"])) < 1e-9
    assert mean(found["bpm"]["1:n"]) > 0.1
    assert mean(found["escd"]["1:n"]) > mean(found["bpm"]["1:n"])


def test_strict_top_k_says_nothing_of_chunks_of_several_tokens(found: Found) -> None:
    assert set(found["strict-top-k"]["1:n"]) == {0.0}
    assert mean(found["strict-top-k"]["1:1"]) > 0.05


def test_no_divergence_is_negative(found: Found) -> None:
    assert min(value for shapes in found.values() for x in shapes.values() for value in x) > -1e-9
