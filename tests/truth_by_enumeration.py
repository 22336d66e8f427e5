"""A distribution over all short texts, so small that both sides' conditionals are known exactly.

What the student's next token is distributed like at a place, given its tokens so far, is then a
number, and each way of reading it off the teacher's predictions can be held against it.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from reference_targets import OPEN, STOP, Example, Group, Row, Switches, TokenPair, reference_target

Encode = Callable[[bytes], tuple[int, ...]]
Distribution = Mapping[object, float]

SHAPES = ("1:1", "1:n", "m:1", "m:n", "end", "inside m:1", "inside m:n")


# -- tiny tokenizers


def _random_tokens(rng: random.Random, alphabet: bytes, merges: int) -> list[tuple[bytes, bytes]]:
    known = [alphabet[i : i + 1] for i in range(len(alphabet))]
    pairs: list[tuple[bytes, bytes]] = []
    while len(pairs) < merges:
        left, right = rng.choice(known), rng.choice(known)
        if left + right not in known and len(left + right) <= 5:
            pairs.append((left, right))
            known.append(left + right)
    return pairs


def _merge(word: bytes, ranks: Mapping[tuple[bytes, bytes], int]) -> list[bytes]:
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 1:
        found = [ranks.get(pair, math.inf) for pair in itertools.pairwise(parts)]
        best = min(found)
        if best == math.inf:
            break
        at = found.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def bpe(
    rng: random.Random, alphabet: bytes, merges: int, digits: int = 0
) -> tuple[list[bytes], Encode]:
    """Random merges; with `digits`, runs of digits are first cut into words of so many."""
    pairs = _random_tokens(rng, alphabet, merges)
    if digits:
        fits = re.compile(rb"[0-9]{1,%d}|[^0-9]+" % digits)
        pairs = [pair for pair in pairs if fits.fullmatch(b"".join(pair))]
        if digits > 1:  # every number of so many digits is a token, as in real tokenizers
            ones = [alphabet[i : i + 1] for i in range(len(alphabet)) if alphabet[i] < ord("a")]
            pairs += [pair for pair in itertools.product(ones, ones) if pair not in pairs]
    tokens = [alphabet[i : i + 1] for i in range(len(alphabet))] + [b"".join(p) for p in pairs]
    ids = {token: i for i, token in enumerate(tokens)}
    ranks = {pair: rank for rank, pair in enumerate(pairs)}

    @functools.cache
    def encode(text: bytes) -> tuple[int, ...]:
        words = fits.findall(text) if digits else [text]
        return tuple(ids[part] for word in words for part in _merge(word, ranks))

    return tokens, encode


def unigram(rng: random.Random, alphabet: bytes, extra: int) -> tuple[list[bytes], Encode]:
    """The most probable segmentation under random token probabilities."""
    pairs = _random_tokens(rng, alphabet, extra)
    tokens = [alphabet[i : i + 1] for i in range(len(alphabet))] + [b"".join(p) for p in pairs]
    scores = [-3.0 - rng.random() for _ in alphabet] + [-1.0 - 4 * rng.random() for _ in pairs]

    @functools.cache
    def encode(text: bytes) -> tuple[int, ...]:
        best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for end in range(1, len(text) + 1):
            ways = [
                (best[end - len(token)][0] + score, (*best[end - len(token)][1], i))
                for i, (token, score) in enumerate(zip(tokens, scores, strict=True))
                if text[:end].endswith(token)
            ]
            best.append(max(ways))
        return best[-1][1]

    return tokens, encode


# -- the world


def random_distribution(
    rng: random.Random, alphabet: bytes, longest: int, stop: float = 0.2
) -> dict[bytes, float]:
    """Each prefix continues or stops with random probabilities of its own, up to a length."""
    texts: dict[bytes, float] = {}

    def grow(prefix: bytes, mass: float) -> None:
        if len(prefix) == longest:
            texts[prefix] = mass
            return
        shares = [rng.expovariate(1.0) for _ in alphabet]
        end = stop * rng.expovariate(1.0)
        total = sum(shares) + end
        texts[prefix] = mass * end / total
        for i, share in enumerate(shares):
            grow(prefix + alphabet[i : i + 1], mass * share / total)

    grow(b"", 1.0)
    return texts


class Conditionals:
    """The exact next-token conditionals of one tokenizer."""

    def __init__(self, texts: Mapping[bytes, float], encode: Encode) -> None:
        self.masses: dict[tuple[int, ...], dict[int, float]] = defaultdict(
            lambda: defaultdict(float)
        )
        for text, mass in texts.items():
            ids = encode(text)
            for at in range(len(ids) + 1):
                self.masses[ids[:at]][ids[at] if at < len(ids) else STOP] += mass

    @functools.cache  # noqa: B019 - lives as long as the world
    def after(self, prefix: tuple[int, ...]) -> dict[int, float]:
        found = self.masses[prefix]
        total = sum(found.values())
        return {token: mass / total for token, mass in found.items()}


@dataclass(eq=False)
class World:
    """Two tokenizers and a distribution over all texts up to a length."""

    pair: TokenPair
    encode_student: Encode
    encode_teacher: Encode
    texts: Mapping[bytes, float]

    def __post_init__(self) -> None:
        self.student = Conditionals(self.texts, self.encode_student)
        self.teacher = Conditionals(self.texts, self.encode_teacher)

    def example(self, text: bytes) -> Example:
        teacher_ids = self.encode_teacher(text)
        rows: list[Row | None] = [
            self.teacher.after(teacher_ids[:at]) for at in range(len(teacher_ids) + 1)
        ]
        return Example(self.encode_student(text), teacher_ids, rows)


def world(seed: int, longest: int = 8, kind: str = "bpe") -> World:
    """Kinds: `bpe`; `unigram`, the student's model is one; `digits`, the student packs two."""
    rng = random.Random(seed)
    alphabet = b"a12" if kind == "digits" else b"abc"
    texts = random_distribution(rng, alphabet, longest)
    if kind == "unigram":
        student = unigram(rng, alphabet, 4 + seed % 3)
    else:
        student = bpe(rng, alphabet, 4 + seed % 3, digits=2 if kind == "digits" else 0)
    teacher = bpe(rng, alphabet, 5 + seed % 2, digits=1 if kind == "digits" else 0)
    pair = TokenPair(student[0], teacher[0], student[1], teacher[1])
    return World(pair, student[1], teacher[1], texts)


# -- places


class Place(NamedTuple):
    """A student position of a text with the chunk it is in; `start` counts teacher tokens."""

    at: int
    shape: str
    student: range
    teacher: range


def places(world: World, example: Example) -> Iterator[Place]:
    """Every student position of a text, the one after its last token too."""
    ends = [
        list(itertools.accumulate((len(tokens[i]) for i in ids), initial=0))
        for tokens, ids in (
            (world.pair.student, example.student_ids),
            (world.pair.teacher, example.teacher_ids),
        )
    ]
    common = sorted(set(ends[0]) & set(ends[1]))
    for start, end in itertools.pairwise(common):
        student, teacher = (range(side.index(start), side.index(end)) for side in ends)
        shape = ("1" if len(student) == 1 else "m") + ":" + ("1" if len(teacher) == 1 else "n")
        for at in student:
            yield Place(at, shape if at == student[0] else f"inside {shape}", student, teacher)
    n, m = len(example.student_ids), len(example.teacher_ids)
    yield Place(n, "end", range(n, n), range(m, m))


# -- constructions: a place to (target, truth), two distributions over the same groups


def renormalized(masses: Distribution) -> dict[object, float]:
    total = sum(masses.values())
    return {key: mass / total for key, mass in masses.items()} if total > 0 else {}


def total_variation(one: Distribution, other: Distribution) -> float:
    return 0.5 * sum(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in {*one, *other})


def forward_kl(target: Distribution, student: Distribution) -> float:
    return sum(
        q * (math.log(q) - math.log(student[key])) if student.get(key, 0.0) > 0 else math.inf
        for key, q in target.items()
        if q > 0
    )


Pairing = tuple[Distribution, Distribution] | None
Construction = Callable[[World, Example, Place], Pairing]


def _grouped(masses: Mapping[int, float], group: Callable[[int], object]) -> dict[object, float]:
    out: dict[object, float] = defaultdict(float)
    for token, mass in masses.items():
        out[group(token)] += mass
    return out


def _rows(world: World, example: Example, place: Place) -> tuple[Row, Row] | None:
    if place.shape.startswith("inside"):
        return None
    student = world.student.after(example.student_ids[: place.at])
    row = example.rows[place.teacher.start]
    assert row is not None
    return row, student


def reached_columns(world: World, example: Example, place: Place) -> Pairing:
    """P-KL: the teacher's mass on columns that W reaches, renormalized."""
    rows = _rows(world, example, place)
    if rows is None:
        return None
    pair = world.pair
    target = {t: q for t, q in rows[0].items() if t == STOP or t in pair.reached}
    truth = _grouped(rows[1], lambda s: s if s == STOP else pair.student_pieces[s][0])
    return renormalized(target), truth


def common_set(world: World, example: Example, place: Place) -> Pairing:
    """GOLD: shared tokens one by one, all others as one."""
    rows = _rows(world, example, place)
    if rows is None:
        return None
    pair = world.pair

    def of_teacher(t: int) -> object:
        return t if t == STOP or len(pair.teacher_pieces[t]) == 1 else "rest"

    def of_student(s: int) -> object:
        pieces = () if s == STOP else pair.student_pieces[s]
        shared = len(pieces) == 1 and pair.teacher[pieces[0]] == pair.student[s]
        return STOP if s == STOP else pieces[0] if shared else "rest"

    return _grouped(rows[0], of_teacher), _grouped(rows[1], of_student)


def longest_prefix(world: World, example: Example, place: Place) -> Pairing:
    """BPM, and the root of ESCD: a teacher token counts for the longest student token in it."""
    rows = _rows(world, example, place)
    if rows is None:
        return None
    pair = world.pair

    def of_teacher(t: int) -> object:
        if t == STOP:
            return STOP
        fits = [s for s, text in enumerate(pair.student) if pair.teacher[t].startswith(text)]
        return max(fits, key=lambda s: len(pair.student[s]))

    return (
        _grouped(rows[0], of_teacher),
        _grouped(rows[1], lambda s: s if s == STOP else of_teacher(pair.student_pieces[s][0])),
    )


def partition(world: World, example: Example, place: Place) -> Pairing:
    """Partition KL: chains that differ from the chunk in the last piece, and the rest."""
    rows = _rows(world, example, place)
    if rows is None:
        return None
    if place.shape in ("1:1", "end"):
        return common_set(world, example, place)
    pair, (student, teacher) = world.pair, (place.student, place.teacher)
    ids, other = example.student_ids, example.teacher_ids

    def chain(side: Conditionals, all_ids: tuple[int, ...], where: range) -> float:
        product = 1.0
        for at in where:
            product *= side.after(all_ids[:at])[all_ids[at]]
        return product

    target: dict[object, float] = {}
    truth: dict[object, float] = {}
    if len(student) == 1:
        prefix = other[teacher.start : teacher.stop - 1]
        scale = chain(world.teacher, other, teacher[:-1])
        last = world.teacher.after(other[: teacher.stop - 1])
        for s, pieces in enumerate(pair.student_pieces):
            if pieces[:-1] == prefix:
                target[s] = scale * last.get(pieces[-1], 0.0)
                truth[s] = rows[1].get(s, 0.0)
    elif len(teacher) == 1:
        prefix = ids[student.start : student.stop - 1]
        scale = chain(world.student, ids, student[:-1])
        last = world.student.after(ids[: student.stop - 1])
        for t, pieces in enumerate(pair.teacher_pieces):
            if pieces[:-1] == prefix:
                target[t] = rows[0].get(t, 0.0)
                truth[t] = scale * last.get(pieces[-1], 0.0)
    else:
        target["chunk"] = chain(world.teacher, other, teacher)
        truth["chunk"] = chain(world.student, ids, student)
    return (
        {**target, "rest": 1.0 - sum(target.values())},
        {**truth, "rest": 1.0 - sum(truth.values())},
    )


def exact(switches: Switches) -> Construction:
    """The target of `reference_target`, over its own groups."""

    def construction(world: World, example: Example, place: Place) -> Pairing:
        found = reference_target(world.pair, example, place.at, switches)
        if found is None:
            return None
        target, group_of = found
        student = world.student.after(example.student_ids[: place.at])

        def group(s: int) -> object:
            return Group("stop") if s == STOP else group_of(s)

        truth = _grouped(student, group)
        if OPEN in target:
            groups = {key: mass for key, mass in target.items() if key != OPEN}
            truth = {key: truth.get(key, 0.0) for key in groups}
            truth[OPEN] = 1.0 - sum(truth.values())
            outside = min(truth[OPEN], target[OPEN])
            target = {key: (1.0 - outside) * mass for key, mass in groups.items()}
            target[OPEN] = outside
        return target, truth

    return construction


CONSTRUCTIONS: dict[str, Construction] = {
    "reached columns (P-KL)": reached_columns,
    "common set (GOLD)": common_set,
    "longest prefix (BPM, ESCD root)": longest_prefix,
    "partition KL": partition,
    "cells": exact(Switches(consistent=False, levels=0, max_depth=0)),
    "cells, consistent": exact(Switches(levels=0, max_depth=0)),
    "cells, consistent, carry": exact(Switches(levels=1, max_depth=0)),
    "the same, all levels": exact(Switches(levels=99, max_depth=0)),
    "the same with depths, one level": exact(Switches(levels=1)),
    "the same with depths, all levels": exact(Switches(levels=99)),
    "the same, what is sure within a cell": exact(Switches(levels=99, sure="cell")),
    "the same, what is sure": exact(Switches(levels=99, sure="all")),
}


# -- tables


@dataclass
class Score:
    """Distances of one construction from the truth, by shape."""

    distances: dict[str, list[float]]
    losses: dict[str, list[float]]

    def mean(self, *shapes: str) -> float:
        values = [value for shape in shapes for value in self.distances[shape]]
        return sum(values) / max(len(values), 1)

    def share_exact(self, *shapes: str, below: float = 1e-9) -> float:
        values = [value for shape in shapes for value in self.losses[shape]]
        return sum(value < below for value in values) / max(len(values), 1)


BOUNDARIES = SHAPES[:4]


def score(
    worlds: list[World], texts_per_world: int, names: list[str] | None = None, seed: int = 0
) -> dict[str, Score]:
    """Each construction at every place of sampled texts."""
    names = list(CONSTRUCTIONS) if names is None else names
    scores = {name: Score(defaultdict(list), defaultdict(list)) for name in names}
    rng = random.Random(seed)
    for w in worlds:
        sample = rng.choices(list(w.texts), list(w.texts.values()), k=texts_per_world)
        for text in sample:
            example = w.example(text)
            for place in places(w, example):
                for name in names:
                    found = CONSTRUCTIONS[name](w, example, place)
                    if found is None:
                        continue
                    scores[name].distances[place.shape].append(total_variation(*found))
                    scores[name].losses[place.shape].append(abs(forward_kl(*found)))
    return scores


def table(scores: Mapping[str, Score]) -> str:
    """Mean total variation by shape, and the share of places with a loss of (near) 0."""
    head = ["construction", *BOUNDARIES, "all (exact)", *SHAPES[4:]]
    lines = [head, ["---"] * len(head)]
    for name, found in scores.items():
        lines.append(
            [
                name,
                *(f"{found.mean(shape):.3f}" for shape in BOUNDARIES),
                f"{found.mean(*BOUNDARIES):.4f} ({found.share_exact(*BOUNDARIES):.2f})",
                *(
                    f"{found.mean(shape):.3f}" if found.distances[shape] else ""
                    for shape in SHAPES[4:]
                ),
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
