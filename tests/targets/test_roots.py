"""The root map R: which cell a teacher token is in."""

from __future__ import annotations

import random

import numpy as np
import pytest
from real_texts import TOPICS
from tokenizer_zoo import byte_level_bpe

from xtoken import Projection, Vocab
from xtoken.targets import TargetBuilder


def random_pair(seed: int) -> Projection:
    rng = random.Random(seed)
    sides = []
    for _ in range(2):
        tokens = [b"a", b"b", b"c"]
        while len(tokens) < 10:
            new = rng.choice(tokens) + rng.choice(tokens)
            if new not in tokens:
                tokens.append(new)
        sides.append(Vocab.from_tokens(tokens, ranked=True))
    return Projection.build(*sides, cache_dir=False)


def real_pair(_: int) -> Projection:
    return Projection.build(
        byte_level_bpe(900, digits=3), byte_level_bpe(700, digits=1), cache_dir=False
    )


PAIRS = [(random_pair, seed) for seed in range(12)] + [(real_pair, 0)]


@pytest.mark.parametrize(("make", "seed"), PAIRS)
def test_a_cell_is_its_own_cell_and_each_text_token_is_in_one(make, seed: int) -> None:
    projection = make(seed)
    builder = TargetBuilder(projection)
    student, teacher = projection.vocabularies()
    roots = builder.roots
    spelled = np.array([bool(teacher.token_bytes(t)) for t in range(len(teacher))])
    assert (roots[spelled] >= 0).all()
    assert (roots[~spelled] == -1).all()
    cells = roots[spelled]
    assert (roots[cells] == cells).all()
    for t in np.flatnonzero(spelled).tolist():
        # A cell is named after a token that the student has, and its tokens begin with it.
        assert student.id_of(teacher.token_bytes(int(roots[t]))) is not None
        assert teacher.token_bytes(t).startswith(teacher.token_bytes(int(roots[t])))
        if student.id_of(teacher.token_bytes(t)) is not None:
            assert roots[t] == t
    for s in range(len(student)):
        pieces = projection.token_pieces(s)
        if student.token_bytes(s):
            assert roots[pieces[0]] >= 0


def test_equal_vocabularies_have_the_identity() -> None:
    tokenizer = byte_level_bpe(900, digits=3)
    projection = Projection.build(tokenizer, tokenizer, cache_dir=False)
    roots = TargetBuilder(projection).roots
    teacher = projection.vocabularies()[1]
    text = [t for t in range(len(teacher)) if teacher.token_bytes(t)]
    assert (roots[text] == text).all()


def test_on_real_text_the_chunks_two_first_tokens_are_in_one_cell() -> None:
    from xtoken import Aligner

    sides = byte_level_bpe(900, digits=3), byte_level_bpe(700, digits=1)
    projection = real_pair(0)
    roots = TargetBuilder(projection).roots
    text = TOPICS["numbers"] + TOPICS["integers"]
    ids = [np.array(side.encode(text, add_special_tokens=False).ids) for side in sides]
    alignment = Aligner(*sides, threads=1).align(*ids)
    same = [
        roots[projection.token_pieces(int(ids[0][s]))[0]] == roots[int(ids[1][t])]
        for s, t, kind in zip(
            alignment.student_bounds[:-1],
            alignment.teacher_bounds[:-1],
            alignment.kind,
            strict=True,
        )
        if kind == 0
    ]
    assert len(same) > 300
    assert np.mean(same) > 0.99
