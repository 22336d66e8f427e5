"""The Rust builder against the slow reference, on random pairs and on a real one."""

from __future__ import annotations

import functools
import os
import pickle
import random
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from chat_families import family
from tokenizer_zoo import byte_level_bpe, deepseek
from tokenizers import Tokenizer

from xtoken import Aligner, Projection, Vocab
from xtoken.errors import (
    ArgumentTypeError,
    NonFiniteError,
    OptionError,
    ShapeError,
    TokenIdError,
    XTokenError,
)
from xtoken.targets import TargetBuilder, TargetExample, TargetOptions, Targets

from reference_targets import (
    OPEN,
    STOP,
    TAIL,
    Example,
    Group,
    Switches,
    TokenPair,
    reference_target,
)

CASES = int(os.environ.get("XTOKEN_TARGET_CASES", "40"))
SPECIALS = ("<bos>", "<eos>", "<tool>")

SWITCHES = {
    "all off": Switches(cells=False, consistent=False, levels=0, max_depth=0),
    "consistent alone": Switches(cells=False, levels=0, max_depth=0),
    "carry alone": Switches(cells=False, consistent=False, levels=1, max_depth=0),
    "cells": Switches(consistent=False, levels=0, max_depth=0),
    "cells, consistent": Switches(levels=0, max_depth=0),
    "cells, consistent, carry": Switches(max_depth=0),
    "depths": Switches(),
    "depths to 1": Switches(max_depth=1),
    "depths to 2, not consistent": Switches(max_depth=2, consistent=False),
    "all levels": Switches(levels=9),
    "all levels, a tail": Switches(levels=9, min_prob=0.02),
    "what is sure": Switches(levels=9, sure="cell"),
    "what is sure, to depth 1": Switches(max_depth=1, sure="cell"),
}


def random_vocab(rng: random.Random, alphabet: bytes, size: int, twins: int = 0) -> Vocab:
    """Tokens of a byte pair encoding, ids as ranks; then some of them once more, as byte tokens
    are; then three special tokens.
    """
    tokens = [alphabet[i : i + 1] for i in range(len(alphabet))]
    while len(tokens) < size:
        new = rng.choice(tokens) + rng.choice(tokens)
        if len(new) <= 6 and new not in tokens:
            tokens.append(new)
    tokens += [rng.choice(tokens) for _ in range(twins)]
    size += twins
    specials = {size + i: text for i, text in enumerate(SPECIALS)}
    roles = {"bos": size, "eos": size + 1}
    return Vocab.from_tokens([*tokens, *[b""] * 3], specials, ranked=True, roles=roles)


def token_pair(
    student: Vocab, teacher: Vocab, projection: Projection, *, stops: bool = True
) -> TokenPair:
    def side(vocab: Vocab) -> list[bytes]:
        return [vocab.token_bytes(i) for i in range(len(vocab))]

    specials = {
        int(projection.indices[projection.indptr[s]]): s
        for s in student.special_tokens
        if projection.indptr[s] < projection.indptr[s + 1] and s != student.roles["eos"]
    }
    return TokenPair(
        side(student),
        side(teacher),
        student.segment,
        teacher.segment,
        specials=specials,
        stops=stops,
    )


def random_ids(rng: random.Random, vocab: Vocab, text: bytes) -> list[int]:
    """The tokenizer's own ids, or, as in a sample of a model, any that spell the text."""
    ids = vocab.segment(text)
    assert ids is not None
    if rng.random() < 0.7:
        return ids
    ids, at = [], 0
    while at < len(text):
        token = rng.choice(
            [
                i
                for i in range(len(vocab))
                if vocab.token_bytes(i) and text.startswith(vocab.token_bytes(i), at)
            ]
        )
        ids.append(token)
        at += len(vocab.token_bytes(token))
    return ids


def random_rows(
    rng: random.Random, vocab: Vocab, ids: Sequence[int], kept: int
) -> tuple[np.ndarray, np.ndarray]:
    """Column ids and log-probs after each token; the text's own token is often likely."""
    columns, log_probs = [], []
    for follower in [*ids[1:], vocab.roles["eos"]]:
        shares = np.array([rng.expovariate(1.0) for _ in range(len(vocab))])
        shares[follower] += 3 * rng.random() * (rng.random() < 0.9)
        shares /= shares.sum()
        best = np.argsort(-shares)[:kept]
        columns.append(best)
        log_probs.append(np.log(shares[best]))
    return np.array(columns), np.array(log_probs, dtype=np.float32)


def compared(
    pair: TokenPair,
    builder: TargetBuilder,
    targets: Targets,
    at: int,
    expected: tuple[dict[Group, float], Callable[[int], Group]],
    stops: set[int],
    depth_of: Callable[[Group], int] = lambda group: group.depth,
) -> None:
    """The `at`-th target has the groups, masses and depths of the reference."""
    masses, group_of = expected
    members: dict[Group, set[int]] = defaultdict(set)
    for token, text in enumerate(pair.student):
        if text:
            members[group_of(token)].add(token)
    members[Group("stop")] = stops
    for student in pair.specials.values():
        members[Group("special", 0, student)] = {student}
    wanted = sorted(
        (sorted(members[group]), mass, depth_of(group))
        for group, mass in masses.items()
        if group not in (TAIL, OPEN)
    )
    found = sorted(
        (sorted(ids), mass, depth) for mass, depth, ids in targets.groups_at(at, builder.tokens)
    )
    assert [w[0] for w in wanted] == [f[0] for f in found]
    assert [w[2] for w in wanted] == [f[2] for f in found]
    np.testing.assert_allclose([f[1] for f in found], [w[1] for w in wanted], rtol=1e-6, atol=1e-9)
    rest = masses[OPEN] if OPEN in masses else masses.get(TAIL, 0.0)
    np.testing.assert_allclose(targets.tails[at], rest, rtol=1e-6, atol=1e-12)
    assert bool(targets.open[at]) == (OPEN in masses)


@pytest.mark.parametrize("name", SWITCHES)
def test_targets_of_random_pairs_are_those_of_the_reference(name: str) -> None:
    switches = SWITCHES[name]
    places = 0
    for seed in range(CASES):
        rng = random.Random(seed)
        twins = seed % 2 * 4
        student = random_vocab(rng, b"abc", rng.randrange(4, 14), twins)
        teacher = random_vocab(rng, b"abc", rng.randrange(4, 14), twins)
        projection = Projection.build(student, teacher, cache_dir=False)
        own_stops = [student.roles["eos"]] if seed % 3 else []
        pair = token_pair(student, teacher, projection, stops=bool(own_stops))
        builder = TargetBuilder(projection, student_stops=own_stops)
        text = bytes(rng.choice(b"abc") for _ in range(rng.randrange(1, 16)))
        own, other = random_ids(rng, student, text), random_ids(rng, teacher, text)
        student_ids = np.array([student.roles["bos"], *own, student.roles["eos"]])
        teacher_ids = np.array([teacher.roles["bos"], *other, teacher.roles["eos"]])
        columns, log_probs = random_rows(rng, teacher, teacher_ids.tolist(), rng.randrange(3, 20))
        example = TargetExample(
            student_ids,
            teacher_ids,
            Aligner(student, teacher, threads=1).align(student_ids, teacher_ids),
            log_probs,
            columns,
        )
        options = TargetOptions(
            cells=switches.cells,
            consistent=switches.consistent,
            levels=switches.levels,
            max_depth=switches.max_depth,
            min_prob=switches.min_prob,
            sure=bool(switches.sure),
        )
        targets = builder.build([example], options, threads=1)
        stop = teacher.roles["eos"]
        rows = [
            {
                STOP if column == stop else int(column): float(np.exp(np.float64(log_prob)))
                for column, log_prob in zip(*row, strict=True)
            }
            for row in zip(columns, log_probs, strict=True)
        ]
        slow = Example(tuple(own), tuple(other), rows)
        positions = targets.positions.tolist()
        for at in range(len(own) + 1):
            expected = reference_target(pair, slow, at, switches)
            if expected is None or all(
                mass == 0 for group, mass in expected[0].items() if group != TAIL
            ):
                assert at + 1 not in positions or targets.tails[positions.index(at + 1)] > 0
                continue
            assert at + 1 in positions, (seed, at, expected[0])
            compared(pair, builder, targets, positions.index(at + 1), expected, set(own_stops))
            places += 1
    assert places > 4 * CASES or name == "none"


@pytest.mark.parametrize("stops", [False, True])
def test_which_of_two_ids_with_the_same_bytes_spells_a_text_changes_no_target(stops: bool) -> None:
    differ = 0
    for seed in range(CASES):
        rng = random.Random(seed)
        sides = [random_vocab(rng, b"abc", rng.randrange(4, 14), 6) for _ in range(2)]
        projection = Projection.build(*sides, cache_dir=False)
        # A stop is one, whatever its bytes.
        apart = [[side.roles["eos"], side.roles["bos"] - 1][: 1 + stops] for side in sides]
        builder = TargetBuilder(projection, student_stops=apart[0], teacher_stops=apart[1])
        text = bytes(rng.choice(b"abc") for _ in range(rng.randrange(1, 16)))
        spelled = [
            [side.roles["bos"], *random_ids(rng, side, text), side.roles["eos"]] for side in sides
        ]
        other = [
            [twin_of(rng, side, token, kept) for token in ids]
            for side, ids, kept in zip(sides, spelled, apart, strict=True)
        ]
        differ += spelled != other
        columns, log_probs = random_rows(rng, sides[1], spelled[1], 40)
        made = []
        for ids in (spelled, other):
            own_and_other = tuple(map(np.array, ids))
            alignment = Aligner(*sides, threads=1).align(*own_and_other)
            example = TargetExample(*own_and_other, alignment, log_probs, columns)
            made.append(builder.build([example]))
        for name in Targets.__dataclass_fields__:
            np.testing.assert_array_equal(*(getattr(targets, name) for targets in made))
        for at in range(len(made[0]) if not stops else 0):
            members = [ids for _, _, ids in made[0].groups_at(at, builder.tokens)]
            assert sum(map(len, members)) == len(set().union(*members))
    assert differ > CASES / 4


def twin_of(rng: random.Random, vocab: Vocab, token: int, apart: Sequence[int]) -> int:
    """Any token with the same bytes, but for those that stand for themselves."""
    text = vocab.token_bytes(token)
    same = [i for i in range(len(vocab)) if vocab.token_bytes(i) == text and i not in apart]
    return rng.choice(same) if text and token not in apart else token


@functools.cache
def real_tokenizers() -> dict[str, Tokenizer]:
    """DeepSeek's, and one that is trained here; with an environment variable SmolLM2's, which takes
    a minute to read.
    """
    if os.environ.get("XTOKEN_SMOLLM2"):
        other = family("smollm2").tokenizer.backend_tokenizer
    else:
        other = byte_level_bpe(3000, digits=1)
    return {"small": other, "deepseek": deepseek()}


TEXT = (
    "In 1991, 20,126 of 3,401 Hundreds walked; unbelievably, the bread\n"
    "    def naïve(x): return x[201:2024]  # 东京 机器学习 Straße\n"
)


# The reference takes a minute per direction, and several on a large student vocabulary.
@pytest.mark.skipif("XTOKEN_REAL_TARGETS" not in os.environ, reason="XTOKEN_REAL_TARGETS not set")
@pytest.mark.parametrize(("own", "other"), [("small", "deepseek"), ("deepseek", "small")])
def test_targets_of_a_real_pair_are_those_of_the_reference(own: str, other: str) -> None:
    student, teacher = (Vocab.from_tokenizer(real_tokenizers()[name]) for name in (own, other))
    projection = Projection.build(student, teacher, cache_dir=False)
    pair = token_pair_of(projection, student, teacher)
    builder = TargetBuilder(projection, student_stops=[], teacher_stops=[])
    ids = [
        real_tokenizers()[name].encode(TEXT, add_special_tokens=False).ids for name in (own, other)
    ]
    rng = random.Random(5)
    every = [t for t in range(len(teacher)) if teacher.token_bytes(t)]
    by_byte: dict[int, list[int]] = defaultdict(list)
    for t in every:
        by_byte[teacher.token_bytes(t)[0]].append(t)
    columns, log_probs = [], []
    for at, token in enumerate(ids[1]):
        following = ids[1][at + 1] if at + 1 < len(ids[1]) else token
        # Tokens like the text's own, as a model's guesses are, and some of any kind.
        near = by_byte[teacher.token_bytes(following)[0]][:400]
        some = {following, *rng.choices(near, k=14), *rng.choices(every, k=25)}
        shares = np.array([rng.expovariate(1.0) for _ in some])
        columns.append([*some, *[-1] * (40 - len(some))])
        log_probs.append([*np.log(0.9 * shares / shares.sum()), *[-np.inf] * (40 - len(some))])
    rows = [
        {c: float(np.exp(np.float64(np.float32(p)))) for c, p in zip(*row, strict=True) if c >= 0}
        for row in zip(columns, log_probs, strict=True)
    ]
    alignment = Aligner(student, teacher, threads=1).align(*map(np.array, ids))
    assert set(alignment.kind.tolist()) == {0}
    example = TargetExample(
        np.array(ids[0]), np.array(ids[1]), alignment,
        np.array(log_probs, dtype=np.float32), np.array(columns),
    )  # fmt: skip
    slow = Example(tuple(ids[0]), tuple(ids[1]), [None, *rows])
    for switches in (Switches(), Switches(levels=4, max_depth=2, min_prob=1e-3)):
        targets = builder.build(
            [example],
            TargetOptions(
                levels=switches.levels, max_depth=switches.max_depth, min_prob=switches.min_prob
            ),
        )
        found = dict(zip(targets.positions.tolist(), range(len(targets)), strict=True))
        compared_places = 0
        for at in range(len(ids[0])):
            expected = reference_target(pair, slow, at, switches)
            if expected is None or sum(m for g, m in expected[0].items() if g != TAIL) == 0:
                continue
            masses, group_of = expected
            groups = targets.groups_at(found[at], builder.tokens)
            seen = {}
            for mass, _, members in groups:
                some = rng.sample(sorted(members), min(len(members), 12))
                (group,) = {group_of(token) for token in some} or {None}
                if group is not None:
                    assert group not in seen
                    seen[group] = mass
            for group, mass in masses.items():
                if group in seen:
                    assert seen.pop(group) == pytest.approx(mass, rel=1e-5, abs=1e-9)
            assert not seen
            inside = set().union(*(members for _, _, members in groups))
            for token in rng.sample(range(len(student)), 60):
                if student.token_bytes(token):
                    assert (group_of(token) in masses and group_of(token) != TAIL) == (
                        token in inside
                    )
            compared_places += 1
        assert compared_places > 20


def token_pair_of(projection: Projection, student: Vocab, teacher: Vocab) -> TokenPair:
    texts = [[vocab.token_bytes(i) for i in range(len(vocab))] for vocab in (student, teacher)]
    return TokenPair(texts[0], texts[1], student.segment, teacher.segment)


ROWS_THAT_NO_SOFTMAX_GIVES = {
    "a token twice": ([[3, 5, 3]], [[-1.0, -2.0, -3.0]], r"column_ids\[0\] names token 3 twice"),
    "the last row": (
        [[3, 5, 4], [7, 7, -1]],
        [[-1.0, -2.0, -3.0]] * 2,
        r"column_ids\[1\] names token 7 twice",
    ),
    "logits": ([[3, 5, 4]], [[9.0, 7.0, 1.0]], r"log_probs\[0\] sums to 9202 as probabilities"),
    "whole rows of logits": (None, [[0.0, 0.0]], r"log_probs\[0\] sums to 2 as probabilities"),
}


@pytest.mark.parametrize("name", ROWS_THAT_NO_SOFTMAX_GIVES)
def test_rows_that_no_softmax_gives_are_refused(name: str) -> None:
    columns, log_probs, message = ROWS_THAT_NO_SOFTMAX_GIVES[name]
    with pytest.raises(OptionError, match=message):
        example_of_rows(columns, log_probs)


def test_rows_with_nan_are_refused_and_pads_are_not_columns() -> None:
    with pytest.raises(NonFiniteError, match=r"log_probs\[1\] holds NaN"):
        example_of_rows([[3, 5], [3, 5]], [[-1.0, -2.0], [-1.0, np.nan]])
    example_of_rows([[3, -1, -1, 5, 5]], [[-1.0, -2.0, -3.0, -np.inf, -np.inf]])


def example_of_rows(columns: list[list[int]] | None, log_probs: list[list[float]]) -> TargetExample:
    vocab = byte_level_bpe()
    ids = np.array([65, 66])
    return TargetExample(
        ids,
        ids,
        Aligner(vocab, vocab, threads=1).align(ids, ids),
        np.array(log_probs, np.float32),
        None if columns is None else np.array(columns, np.int64),
    )


COLUMNS_THAT_ARE_NO_IDS = {
    "fractions": np.array([[65.9, 66.2]]),
    "2**64 - 1, which is -1 of 64 bits": np.array([[2**64 - 1, 66]], np.uint64),
    "flags": np.array([[True, False]]),
    "texts": [["65", "66"]],
}


@pytest.mark.parametrize("name", COLUMNS_THAT_ARE_NO_IDS)
@pytest.mark.parametrize("validate", [True, False])
def test_columns_that_are_no_ids_are_refused_not_changed(name: str, validate: bool) -> None:
    given = example_of_rows([[65, 66]], [[-1.0, -2.0]])
    with pytest.raises(ArgumentTypeError, match=r"column_ids is of dtype .* where int64"):
        replaced(given, column_ids=COLUMNS_THAT_ARE_NO_IDS[name], validate=validate)


EXAMPLES_OF_OTHER_KINDS: dict[str, tuple[dict[str, object], type[XTokenError], str]] = {
    "ids that are floats": (
        {"student_ids": np.array([65.0, 66.0])},
        ArgumentTypeError,
        "student_ids is of dtype float64",
    ),
    "ids in a table": ({"teacher_ids": [[65, 66]]}, ShapeError, "pass one sequence"),
    "rows in lists": ({"log_probs": [[-1.0]]}, ArgumentTypeError, "log_probs is list"),
    "whole numbers": (
        {"log_probs": np.array([[-1, -2]])},
        ArgumentTypeError,
        "log_probs is of dtype int64, expected floats",
    ),
    "one row": ({"log_probs": np.zeros(2, np.float32)}, ShapeError, r"expected \[T_t, K\]"),
    "other columns": ({"column_ids": [[65]]}, ShapeError, r"column_ids has shape \(1, 1\)"),
    "no alignment": ({"alignment": [(0, 1)]}, ArgumentTypeError, "expected an Alignment"),
    "a word for a flag": ({"validate": "no"}, OptionError, "validate = 'no'"),
}


@pytest.mark.parametrize("name", EXAMPLES_OF_OTHER_KINDS)
def test_an_example_of_other_kinds_is_refused_by_name(name: str) -> None:
    changed, error, message = EXAMPLES_OF_OTHER_KINDS[name]
    with pytest.raises(error, match=message):
        replaced(example_of_rows([[65, 66]], [[-1.0, -2.0]]), **changed)


def replaced(example: TargetExample, **changed: object) -> TargetExample:
    return TargetExample(**{"validate": False, **vars(example), **changed})  # type: ignore[arg-type]


def test_ids_in_lists_are_those_in_arrays() -> None:
    vocab = byte_level_bpe()
    builder = TargetBuilder(Projection.build(vocab, vocab, cache_dir=False))
    given = example_of_rows([[65, 66], [67, 68]], [[-1.0, -2.0]] * 2)
    lists = replaced(
        given, student_ids=[65, 66], teacher_ids=[65, 66], column_ids=[[65, 66], [67, 68]]
    )
    assert builder.build([lists]) == builder.build([given], threads=np.int64(1))  # type: ignore[arg-type]
    arrays = zip(builder.swallowing([65, 66]), builder.swallowing(np.array([65, 66])), strict=True)
    assert all(np.array_equal(*pair) for pair in arrays)


def test_stops_tokens_and_threads_are_whole_numbers_in_range() -> None:
    vocab = byte_level_bpe()
    projection = Projection.build(vocab, vocab, cache_dir=False)
    builder = TargetBuilder(projection, student_stops={66, np.int64(65)}, teacher_stops=[65])
    copy = pickle.loads(pickle.dumps(builder))
    assert copy.fingerprint == builder.fingerprint != TargetBuilder(projection).fingerprint
    with pytest.raises(ArgumentTypeError, match="student_stops is of dtype float64"):
        TargetBuilder(projection, student_stops=[0.7])  # type: ignore[list-item]
    with pytest.raises(TokenIdError, match="teacher_stops has -1, which is outside"):
        TargetBuilder(projection, teacher_stops=[-1])
    with pytest.raises(ArgumentTypeError, match="tokens is of dtype float64"):
        builder.swallowing(np.array([0.7]))  # type: ignore[arg-type]
    example = example_of_rows([[65, 66]], [[-1.0, -2.0]])
    for threads in (1.0, -1, 2**70, "1", True):
        with pytest.raises(OptionError, match=r"threads = .*; expected a whole number"):
            builder.build([example], threads=threads)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="options is dict, expected TargetOptions"):
        builder.build([example], {})  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"examples\[0\] is NoneType"):
        builder.build([None])  # type: ignore[list-item]


def test_corrections_are_checked_and_those_of_numpy_are_whole_numbers() -> None:
    made = TargetOptions(levels=np.int64(2), max_depth=np.uint8(3))  # type: ignore[arg-type]
    assert made == TargetOptions(levels=2, max_depth=3)
    assert {type(made.levels), type(made.max_depth)} == {int}
    wrong = {"levels": 256, "max_depth": 2.0, "min_prob": "a", "cells": "no", "sure": 1}
    with pytest.raises(OptionError, match=r"levels = array\(\[\[1\], \[2\]\]\) is out of range"):
        TargetOptions(levels=np.array([[1], [2]]))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="max_depth = one int is out of range"):
        TargetOptions(max_depth=10**5000)
    for name, value in wrong.items():
        with pytest.raises(OptionError, match=f"{name} = {value!r}"):
            TargetOptions(**{name: value})  # type: ignore[arg-type]
