"""Each construction against the truth by enumeration; `python -m benches.truth` is the table."""

from __future__ import annotations

import functools

import pytest
from truth_by_enumeration import (
    BOUNDARIES,
    CONSTRUCTIONS,
    Score,
    exact,
    forward_kl,
    places,
    score,
    total_variation,
    world,
)

from reference_targets import Group, Switches

KINDS = ("bpe", "unigram", "digits")


@functools.cache
def scores(kind: str) -> dict[str, Score]:
    # Shorter texts leave the teacher's tokens no room to be decided by what follows.
    longest = 8 if kind == "bpe" else 6
    return score([world(seed, longest, kind) for seed in range(10)], 8)


@pytest.mark.parametrize("kind", KINDS)
def test_conditionals_of_both_sides_are_distributions_and_agree_on_the_next_byte(kind: str) -> None:
    w = world(1, 6, kind)
    for text in [b"", *list(w.texts)[40:400:37]]:
        example = w.example(text)
        for row in example.rows:
            assert row is not None
            assert abs(sum(row.values()) - 1) < 1e-12
        # At the start nothing has been said, so both sides have seen the same.
        firsts = [
            (w.student.after(()), w.pair.student),
            (w.teacher.after(()), w.pair.teacher),
        ]
        by_byte = [
            {
                byte: sum(q for t, q in row.items() if t >= 0 and tokens[t][:1] == byte)
                for byte in {token[:1] for token in tokens}
            }
            for row, tokens in firsts
        ]
        assert by_byte[0] == pytest.approx(by_byte[1])


def test_each_correction_brings_the_target_nearer_to_the_truth() -> None:
    found = scores("bpe")
    steps = (
        "reached columns (P-KL)",
        "cells",
        "cells, consistent",
        "cells, consistent, carry",
        "the same, all levels",
    )
    means = [found[name].mean(*BOUNDARIES) for name in steps]
    assert means == sorted(means, reverse=True)
    assert means[0] > 0.12
    assert means[1] > 3 * means[3]


@pytest.mark.parametrize("kind", KINDS)
def test_exact_targets_are_an_order_nearer_than_those_of_published_losses(kind: str) -> None:
    found = scores(kind)
    ours = found["the same with depths, all levels"].mean(*BOUNDARIES)
    assert ours < 0.035
    for name in ("reached columns (P-KL)", "common set (GOLD)", "longest prefix (BPM, ESCD root)"):
        assert found[name].mean(*BOUNDARIES) > (1.5 if kind == "digits" else 4) * ours


def test_what_is_sure_is_nearly_the_truth() -> None:
    assert scores("bpe")["the same, what is sure"].mean(*BOUNDARIES) < 0.005


def test_inside_a_teacher_token_the_target_is_near_the_truth() -> None:
    found = scores("bpe")["the same with depths, all levels"]
    assert found.mean("inside m:1") < 0.01
    assert found.mean("inside m:n") < 0.03
    assert len(found.distances["inside m:n"]) > 20


def test_a_student_that_is_the_truth_has_a_loss_of_nearly_zero() -> None:
    found = scores("bpe")
    assert found["the same with depths, all levels"].share_exact(*BOUNDARIES) >= 0.6
    assert found["the same, what is sure"].share_exact(*BOUNDARIES) >= 0.95
    assert found["reached columns (P-KL)"].share_exact(*BOUNDARIES) < 0.15


def test_groups_are_told_apart_by_the_text_alone_and_cover_all_that_the_student_can_say() -> None:
    for name in ("cells, consistent, carry", "the same with depths, all levels"):
        for seed in range(4):
            w = world(seed, 6)
            for text in list(w.texts)[30::171]:
                example = w.example(text)
                for place in places(w, example):
                    pairing = CONSTRUCTIONS[name](w, example, place)
                    if pairing is None:
                        continue
                    target, truth = pairing
                    assert abs(sum(target.values()) - 1) < 1e-9
                    assert abs(sum(truth.values()) - 1) < 1e-9
                    assert total_variation(target, truth) <= 1
                    assert forward_kl(target, truth) >= -1e-12


def test_equal_tokenizers_give_the_truth_itself() -> None:
    w = world(3, 6)
    w.pair.teacher[:] = w.pair.student
    same = type(w.pair)(
        w.pair.student, w.pair.student, w.pair.segment_student, w.pair.segment_student
    )
    own = type(w)(same, w.encode_student, w.encode_student, w.texts)
    for switches in (Switches(), Switches(levels=0, max_depth=0), Switches(levels=9)):
        construction = exact(switches)
        for text in list(own.texts)[20::97]:
            example = own.example(text)
            for place in places(own, example):
                pairing = construction(own, example, place)
                assert pairing is not None
                target, truth = pairing
                assert total_variation(target, truth) < 1e-12
                assert all(isinstance(group, Group) for group in target)
