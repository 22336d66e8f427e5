"""Tokens by all but the last of the other side's pieces: what one more piece can end as."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from xtoken._checks import expect
from xtoken.errors import OptionError, ShapeError
from xtoken.projection import Projection
from xtoken.projection.arrays import ProjectionArrays
from xtoken.tensors.twins import twin

Prefix = tuple[int, ...]


class PieceChains(nn.Module):
    """Pairs of a token and its last piece on the other side, grouped by the pieces before.

    Of several tokens with the same pieces only the lowest id is here, so that within a group both
    columns name each token once.

    Attributes:
        student_ids, teacher_ids: [n] int64 the pairs; first those of student tokens with teacher
            pieces, then those of teacher tokens with student pieces.
        forward_groups: teacher pieces to the range of the student tokens that go on with one more.
        backward_groups: student pieces to the range of the teacher tokens that do.
        student_twins, teacher_twins: tokens that are no piece of any, by the piece with their bytes
            (`<0x41>` beside `A`): a text may have either.
    """

    student_ids: Tensor
    teacher_ids: Tensor

    def __init__(self, student: Sequence[Sequence[int]], teacher: Sequence[Sequence[int]]) -> None:
        """
        Args:
            student: the teacher pieces of each student token, none where it has none.
            teacher: the student pieces of each teacher token.

        >>> chains = PieceChains([[2], [2, 0], [2, 1]], [[0], [0], [0]])
        >>> chains.forward_groups
        {(2,): (0, 2)}
        """
        super().__init__()
        self.sizes = (len(student), len(teacher))
        self.student_twins = _twins(student, teacher)
        self.teacher_twins = _twins(teacher, student)
        self.forward_groups, own, last = _grouped(student, 0)
        self.backward_groups, other, final = _grouped(teacher, len(own))
        for name, ids in (("student_ids", own + final), ("teacher_ids", last + other)):
            self.register_buffer(name, torch.tensor(ids, dtype=torch.int64), persistent=False)

    @classmethod
    def from_projection(cls, projection: Projection) -> PieceChains:
        """Those of a pair; made once for each projection.

        Raises:
            OptionError: the projection has no pieces of the teacher's tokens.
        """
        expect(projection, ProjectionArrays, "projection", "pass Projection.build(...)")
        return twin(projection.once(cls, lambda: cls._made_from(projection)))

    @classmethod
    def _made_from(cls, projection: Projection) -> PieceChains:
        indptr, pieces = projection.teacher_pieces_indptr, projection.teacher_pieces
        if indptr is None or pieces is None:
            raise OptionError(
                "the projection has no student pieces of the teacher's tokens; build it from a "
                "student tokenizer that can segment (a tokenizer.json or a rank file)"
            )
        own = np.split(projection.pieces, projection.pieces_indptr[1:-1])
        other = np.split(pieces, indptr[1:-1])
        return cls([row.tolist() for row in own], [row.tolist() for row in other])

    def check_sizes(self, sizes: tuple[int, int]) -> None:
        """Raise ShapeError where they are of other vocabularies (V_s, V_t)."""
        if self.sizes != sizes:
            raise ShapeError(
                f"piece_chains are of {self.sizes[0]} student and {self.sizes[1]} teacher tokens, "
                f"expected {sizes[0]} and {sizes[1]}; build them from the same two tokenizers"
            )

    def extra_repr(self) -> str:
        return f"{len(self.student_ids)} pairs"


def _twins(own: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> dict[int, int]:
    """Of the tokens `own` those that are spelled as a piece of the other side is, and that piece:
    what is spelled alike has the same bytes."""
    pieces = set(itertools.chain.from_iterable(other))
    found: dict[Prefix, int] = {}
    for piece in sorted(pieces):
        found.setdefault(tuple(own[piece]), piece)
    spelled = ((token, tuple(each)) for token, each in enumerate(own) if token not in pieces)
    return {token: found[each] for token, each in spelled if each and each in found}


def _grouped(
    chains: Sequence[Sequence[int]], first: int
) -> tuple[dict[Prefix, tuple[int, int]], list[int], list[int]]:
    """Ranges by prefix, counted from `first`; and the tokens in them with their last pieces."""
    found: dict[Prefix, dict[int, int]] = {}
    for token, chain in enumerate(chains):
        if len(chain) > 1:
            found.setdefault(tuple(chain[:-1]), {}).setdefault(chain[-1], token)
    groups: dict[Prefix, tuple[int, int]] = {}
    tokens: list[int] = []
    lasts: list[int] = []
    for prefix, ends in found.items():
        groups[prefix] = (first + len(tokens), first + len(tokens) + len(ends))
        tokens += ends.values()
        lasts += ends
    return groups, tokens, lasts
