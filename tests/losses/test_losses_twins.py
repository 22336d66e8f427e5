"""Ids with the same bytes, as `<0x41>` beside `A`: which of them spells a text changes no loss."""

from __future__ import annotations

import functools
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from xtoken import Pair, Vocab
from xtoken.data import Example
from xtoken.distillation import DistillLossName

BYTES = [b"2", b"0", b"1", b"A"]
LONGER = [b"20", b"201", b"1A", b"1A2"]
LOSSES = [name for name in get_args(DistillLossName) if name not in ("ce", "same-vocab-kl")]


def vocab(tokens: list[bytes]) -> Vocab:
    """The tokens, then each byte once more, then an end."""
    size = len(tokens) + len(BYTES)
    specials = {size: "<s>", size + 1: "</s>"}
    roles = {"bos": size, "eos": size + 1}
    return Vocab.from_tokens([*tokens, *BYTES, b"", b""], specials, ranked=True, roles=roles)


def byte_twin(side: Vocab, token: int) -> int:
    """A byte's other id; any other token itself."""
    first = side.roles["bos"] - len(BYTES)
    return first + token if token < len(BYTES) else token


@functools.cache
def pair_of(longer_student: bool) -> tuple[Pair, Vocab, Vocab]:
    student, teacher = (vocab([*BYTES, *more]) for more in (LONGER, []))
    if not longer_student:
        student, teacher = teacher, student
    return Pair(student, teacher, cache_dir=False), student, teacher


def spelled(side: Vocab, text: bytes) -> list[int]:
    ids = side.segment(text)
    assert ids is not None
    return [side.roles["bos"], *ids, side.roles["eos"]]


def logits_of(side: Vocab, length: int, seed: int) -> Tensor:
    """Random rows in which ids with the same bytes are equally likely."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(1, length, len(side), generator=generator, dtype=torch.float64)
    for token in range(len(BYTES)):
        rows[..., byte_twin(side, token)] = rows[..., token]
    return rows


def value_and_gradient(
    name: str, pair: Pair, sides: list[Vocab], ids: tuple[list[int], list[int]]
) -> tuple[Tensor, Tensor]:
    """The gradient as one of what ids with the same bytes have together."""
    arrays = tuple(map(np.array, ids))
    masks = [np.ones(len(each), np.bool_) for each in ids]
    example = Example(*arrays, *masks, pair.aligner.align(*arrays))
    distiller = pair.distiller(name)
    batch = distiller.collate([example])
    student = logits_of(sides[0], len(ids[0]), 0).requires_grad_()
    loss = distiller(student, logits_of(sides[1], len(ids[1]), 1), batch).loss
    (gradient,) = torch.autograd.grad(loss, student)
    for token in range(len(BYTES)):
        twin = byte_twin(sides[0], token)
        gradient[..., token] += gradient[..., twin]
        gradient[..., twin] = 0
    return loss.detach(), gradient


@pytest.mark.parametrize("longer_student", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_which_id_spells_a_byte_changes_neither_value_nor_gradient(
    name: str, longer_student: bool
) -> None:
    pair, *sides = pair_of(longer_student)
    ids = spelled(sides[0], b"201A2A0201A"), spelled(sides[1], b"201A2A0201A")
    wanted = value_and_gradient(name, pair, sides, ids)
    assert wanted[0] > 0
    moves = [(True, False), (False, True), (True, True)]
    if name == "partition-kl":  # of both, the common token is an event beside the text's own
        moves.pop()
    for moved_sides in moves:
        for parity in range(2):  # every byte by its other id, or each second token
            other = tuple(
                [
                    byte_twin(side, token) if moved and at % 2 >= parity else token
                    for at, token in enumerate(each)
                ]
                for each, side, moved in zip(ids, sides, moved_sides, strict=True)
            )
            found = value_and_gradient(name, pair, sides, other)  # type: ignore[arg-type]
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
