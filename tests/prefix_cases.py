"""Random pairs of vocabularies that spell each other, and batches over them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from loss_cases import Case, make_case
from torch import Tensor

from xtoken.losses import PairParts, TrieSlots, first_pieces
from xtoken.tensors.projection import SparseProjection
from xtoken.trie import PieceTrie


@dataclass
class PrefixCase:
    batch: Case
    student_pieces: list[list[int]]
    teacher_pieces: list[list[int]]
    pair: PairParts

    @property
    def projection(self) -> SparseProjection:
        return self.pair.projection

    def ids(self) -> dict[str, Tensor]:
        """What every call needs beside logits, pair and chunks."""
        return {"student_ids": self.batch.student_ids, "teacher_ids": self.batch.teacher_ids}


def random_pieces(rng: np.random.Generator, tokens: int, pieces: int) -> list[list[int]]:
    """Sequences of 0 to 4 pieces out of few, so that prefixes are shared and repeated."""
    few = rng.permutation(pieces)[:4]
    return [
        [int(rng.choice(few)) for _ in range(int(rng.choice([0, 1, 1, 2, 2, 3, 4])))]
        for _ in range(tokens)
    ]


def add_twins(
    rng: np.random.Generator, own: list[list[int]], other: list[list[int]]
) -> dict[int, int]:
    """Gives some of `own` that are no piece of `other` the bytes of one that is, as byte tokens
    have them; the new ones by piece."""
    pieces = sorted({piece for sequence in other for piece in sequence})
    spare = rng.permutation([token for token in range(len(own)) if token not in pieces])
    found: dict[int, int] = {}
    for token, piece in zip(spare.tolist(), pieces[::2], strict=False):
        if own[piece]:
            own[token] = own[piece]
            found[piece] = token
    return found


def tries_of(
    student_pieces: list[list[int]], teacher_pieces: list[list[int]]
) -> tuple[PieceTrie, PieceTrie]:
    v_s, v_t = len(student_pieces), len(teacher_pieces)
    return (
        PieceTrie.from_pieces(student_pieces, v_t, spelled=teacher_pieces),
        PieceTrie.from_pieces(teacher_pieces, v_s, side="student", spelled=student_pieces),
    )


def csr_of(pieces: list[list[int]], v_t: int, decay: float) -> SparseProjection:
    """W [V_s, V_t] as it is built from pieces; repeated pieces are one entry."""
    ptr, ids, weights = [0], [], []
    for sequence in pieces:
        row: dict[int, float] = {}
        for i, piece in enumerate(sequence):
            row[piece] = row.get(piece, 0.0) + decay**i
        ids += row
        weights += [value / sum(row.values()) for value in row.values()]
        ptr.append(len(ids))
    return SparseProjection.from_csr(
        np.array(ptr), np.array(ids, dtype=np.int64), np.array(weights), (len(pieces), v_t)
    )


def make_prefix_case(seed: int = 0, *, v_s: int = 16, v_t: int = 13, **options) -> PrefixCase:
    """A batch in which most chunks spell a token of the other side."""
    rng = np.random.default_rng(seed + 1000)
    batch = make_case(seed, v_s=v_s, v_t=v_t, **options)
    student_pieces = random_pieces(rng, v_s, v_t)
    teacher_pieces = random_pieces(rng, v_t, v_s)
    student_twins = add_twins(rng, student_pieces, teacher_pieces)
    teacher_twins = add_twins(rng, teacher_pieces, student_pieces)
    for c in range(len(batch.chunks)):
        b = int(batch.chunks.sample[c])
        for ids, side, pieces, twins in (
            (batch.teacher_ids, "teacher", student_pieces, teacher_twins),
            (batch.student_ids, "student", teacher_pieces, student_twins),
        ):
            start = int(getattr(batch.chunks, f"{side}_start")[c])
            end = int(getattr(batch.chunks, f"{side}_end")[c])
            fitting = [p[: end - start] for p in pieces if len(p) >= end - start]
            if end > start and fitting and rng.random() < 0.8:
                for i, piece in enumerate(fitting[int(rng.integers(len(fitting)))]):
                    twin = rng.random() < 0.5
                    ids[b, start + i] = twins.get(piece, piece) if twin else piece
    student_trie, teacher_trie = map(TrieSlots, tries_of(student_pieces, teacher_pieces))
    projection = first_pieces(csr_of(student_pieces, v_t, 0.1), student_trie)
    pair = PairParts(
        (v_s, v_t), projection=projection, student_trie=student_trie, teacher_trie=teacher_trie
    )
    return PrefixCase(batch, student_pieces, teacher_pieces, pair)
