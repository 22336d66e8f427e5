"""Batches of texts that two random byte pair encodings spell, for the losses that read bytes."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import numpy as np
import torch
from loss_cases import Case, pair_of
from torch import Tensor

from xtoken import Aligner, Projection, Vocab
from xtoken.losses import PairParts
from xtoken.tensors.byte_prefixes import BytePrefixes
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.piece_chains import PieceChains
from xtoken.tensors.projection import SparseProjection

ALPHABET = b"ab "


def random_tokens(rng: random.Random, size: int, longest: int = 4) -> list[bytes]:
    """The letters, then random ones of several, as the merge ranks of a byte pair encoding."""
    tokens = [ALPHABET[i : i + 1] for i in range(len(ALPHABET))]
    while len(tokens) < size:
        new = rng.choice(tokens) + rng.choice(tokens)
        if len(new) <= longest and new not in tokens:
            tokens.append(new)
    return tokens


@dataclass
class ByteCase:
    """A batch with the bytes of both sides' tokens; the last id of each side ends a text."""

    batch: Case
    student: list[bytes]
    teacher: list[bytes]

    def ids(self) -> dict[str, Tensor]:
        return {"student_ids": self.batch.student_ids, "teacher_ids": self.batch.teacher_ids}


@functools.cache
def random_pair(seed: int, v_s: int, v_t: int) -> tuple[Vocab, Vocab, Projection]:
    rng = random.Random(seed)
    vocabs = []
    for size in (v_s, v_t):
        tokens = [*random_tokens(rng, size - 1), b""]
        if seed in (1, 5):  # the last ones are others once more, as byte tokens are
            tokens[-3:-1] = rng.sample(tokens[:-3], 2)
        vocabs.append(
            Vocab.from_tokens(tokens, {size - 1: "<eos>"}, ranked=True, roles={"eos": size - 1})
        )
    return vocabs[0], vocabs[1], Projection.build(*vocabs, cache_dir=False, threads=1)


def make_byte_case(
    seed: int = 0,
    *,
    batch: int = 2,
    letters: int = 24,
    v_s: int = 14,
    v_t: int = 12,
    padded: int = 2,
    dtype: torch.dtype = torch.float64,
    scale: float = 2.0,
    canonical: float = 0.8,
) -> ByteCase:
    """Random texts, some of them cut by chance and not by the tokenizers, each with its end."""
    rng = random.Random(seed)
    one, other, projection = random_pair(seed % 7, v_s, v_t)
    aligner = Aligner(one, other, threads=1)
    rows: list[list[list[int]]] = [[], []]
    for b in range(batch):
        text = bytes(rng.choice(ALPHABET) for _ in range(letters + 3 * b))
        for side, vocab in enumerate((one, other)):
            if rng.random() < canonical:
                ids = vocab.segment(text)
            else:
                ids, at = [], 0
                while at < len(text):
                    token = rng.choice(
                        [
                            i
                            for i in range(len(vocab) - 1)
                            if text.startswith(vocab.token_bytes(i), at)
                        ]
                    )
                    ids.append(token)
                    at += len(vocab.token_bytes(token))
            # A first token that nothing predicts, and the end.
            rows[side].append([len(vocab) - 1, *ids, len(vocab) - 1])
    alignments = [aligner.align(s, t) for s, t in zip(*rows, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for ids, vocab in zip(rows, (one, other), strict=True):
        length = max(map(len, ids)) + 2
        padded_ids, mask = torch.zeros(batch, length, dtype=torch.int64), []
        for b, row in enumerate(ids):
            padded_ids[b, : len(row)] = torch.tensor(row)
            mask.append(torch.arange(length) < len(row))
        shape = (batch, length, len(vocab) + padded)
        logits = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        sides.append((logits.to(dtype), padded_ids, torch.stack(mask)))
    chunks = ChunkBatch.from_alignments(alignments)
    common = PairParts.from_projection(projection, needs={"strict_common"}).strict_common
    pair = pair_of(
        SparseProjection.from_projection(projection),
        BytePrefixes.from_projection(projection),
        PieceChains.from_projection(projection),
    )
    pair.strict_common = common
    case = Case(
        sides[0][0].requires_grad_(), sides[1][0], sides[0][1], sides[1][1], alignments, chunks,
        chunks.usable(sides[0][2], sides[1][2]), sides[0][2], sides[1][2], pair,
        PairParts((min(v_s, v_t),) * 2), v_s, v_t,
    )  # fmt: skip
    bytes_of = [[vocab.token_bytes(i) for i in range(len(vocab))] for vocab in (one, other)]
    return ByteCase(case, bytes_of[0], bytes_of[1])


def hand_made(student: list[bytes], teacher: list[bytes], **given: object) -> BytePrefixes:
    return BytePrefixes(student, teacher, **given)  # type: ignore[arg-type]


def ranges(*rows: tuple[int, int, int, int, int]) -> ChunkBatch:
    """Chunks as (sample, student start, end, teacher start, end)."""
    return ChunkBatch.from_ranges(*torch.from_numpy(np.array(rows, np.int64).reshape(-1, 5)).T)
