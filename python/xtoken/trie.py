"""Piece tries: the tokens of one vocabulary by the pieces that another spells them with.

A numeral like `201` of the student is `2`, `0`, `1` to the teacher. The trie of all student tokens
so spelled says at each prefix which tokens go on how: what prefix KL compares the two models on
(`xtoken.losses.prefix_kl.loss`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xtoken import _core
from xtoken._checks import as_whole, check_choice, check_number, expect, thread_count
from xtoken._core import Vocab
from xtoken.align.ids import as_ids, as_rows
from xtoken.errors import OptionError, TokenIdError
from xtoken.projection.arrays import ProjectionArrays
from xtoken.vocab.fingerprints import PairFingerprint, common_pair

if TYPE_CHECKING:
    from xtoken.projection import Projection

Ints = NDArray[np.int64]
Side = Literal["student", "teacher"]

_NO_LIMIT = np.iinfo(np.int32).max


class PrefixNodes(NamedTuple):
    """Where chunks can be compared, [N] int64 each, by chunk and depth.

    Attributes:
        chunk: index of the chunk.
        depth: number of pieces in the prefix, from 1.
        node: the prefix's node, which has at least two slots.
    """

    chunk: Ints
    depth: Ints
    node: Ints


class Slots(NamedTuple):
    """A trie as flat int64 arrays, read-only.

    The tokens below node `u` are `tokens[node_starts[u]:]`, cut one after the other into the slots
    `slot_ptr[u]:slot_ptr[u + 1]`: first the tokens that end at `u`, if any, then each child's.

    Attributes:
        tokens: [n] ids of the tokens in the trie, by their sequences of pieces.
        node_starts: [nodes] index into `tokens`.
        slot_ptr: [nodes + 1] index into the next two.
        slot_sizes: [slots] number of tokens.
        slot_pieces: [slots] the piece that leads there; -1 where the tokens end.
    """

    tokens: Ints
    node_starts: Ints
    slot_ptr: Ints
    slot_sizes: Ints
    slot_pieces: Ints


class PieceTrie:
    """The tokens of one vocabulary as sequences of pieces of another; immutable and picklable.

    Special and unused tokens are in no node, nor is a token that the pieces cannot spell. A piece
    in a text may have another id with the same bytes (`<0x41>` beside `A`): where both vocabularies
    are known, it leads to the same node.
    """

    def __init__(
        self, core: _core.PieceTrie, side: Side, pair: PairFingerprint | None = None
    ) -> None:
        """Wrap a trie of the core.

        Args:
            side: whose tokens the pieces are.
            pair: the two vocabularies, where known; not part of equality.
        """
        self._core = core
        self.side = side
        self.pair = pair

    @classmethod
    def build(
        cls, tokens: Vocab, pieces: Vocab, *, side: Side = "teacher", threads: int | None = None
    ) -> PieceTrie:
        """Segment every token of one vocabulary with the other's own model.

        Args:
            tokens: the vocabulary whose tokens are sorted into the trie.
            pieces: the vocabulary that spells them.
            side: the name of `pieces` in messages.
            threads: None for one per core, 1 for none beside the caller's.

        Raises:
            UnsupportedTokenizerError: `pieces` has no model that can segment.
        """
        check_choice("side", side, ("student", "teacher"))
        for name, vocab in (("tokens", tokens), ("pieces", pieces)):
            expect(vocab, Vocab, name, "pass Vocab.from_tokenizer(...)")
        core = _core.PieceTrie.build(tokens, pieces, side, thread_count(threads))
        names = (tokens.fingerprint, pieces.fingerprint)
        return cls(core, side, PairFingerprint(*(names if side == "teacher" else names[::-1])))

    @classmethod
    def from_pieces(
        cls,
        sequences: Sequence[Sequence[int]],
        piece_count: int,
        *,
        side: Side = "teacher",
        spelled: Sequence[Sequence[int]] | None = None,
    ) -> PieceTrie:
        """From each token's pieces, an empty sequence for a token without any.

        Args:
            spelled: the mirror, each piece's tokens. Ids with the same ones have the same bytes:
                one that is no piece of any token leads where the piece does. None where not known.

        Raises:
            TokenIdError: a piece is not in [0, piece_count), or a token is not in `sequences`.
        """
        indptr, flat = _flat("piece", sequences)
        size = as_whole("piece_count", piece_count, "pass the size of the pieces' vocabulary")
        if not 0 <= size <= _NO_LIMIT:
            raise OptionError(f"piece_count = {size} is out of range; expected 0 to 2^31 - 1")
        mirror = None if spelled is None else _flat("token", spelled)
        return cls(_core.PieceTrie.from_pieces(indptr, flat, size, mirror), side)

    @classmethod
    def from_projection(cls, projection: Projection) -> PieceTrie:
        """The student's tokens as the teacher's pieces, which a projection keeps."""
        expect(projection, ProjectionArrays, "projection", "pass Projection.build(...)")
        indptr, pieces = projection.teacher_pieces_indptr, projection.teacher_pieces
        core = _core.PieceTrie.from_pieces(
            projection.pieces_indptr,
            projection.pieces,
            projection.shape[1],
            None if indptr is None or pieces is None else (indptr, pieces),
        )
        return cls(core, "teacher", projection.pair)

    @property
    def core(self) -> _core.PieceTrie:
        """The trie itself, for other calls of the core."""
        return self._core

    def __len__(self) -> int:
        """Number of nodes, the root among them."""
        return len(self._core)

    def __repr__(self) -> str:
        return repr(self._core)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PieceTrie):
            return NotImplemented
        return self.side == other.side and self._core == other._core

    def __hash__(self) -> int:
        return hash(self._core)

    def __getstate__(self) -> dict[str, object]:
        return {"_core": self._core, "side": self.side, "pair": self.pair}

    @property
    def piece_count(self) -> int:
        """Size of the vocabulary that the pieces are from."""
        return self._core.piece_count

    @property
    def token_count(self) -> int:
        """Size of the vocabulary whose tokens are sorted here, those in no node included."""
        return len(self._core.pieces()[0]) - 1

    @cached_property
    def slots(self) -> Slots:
        """The trie as flat arrays."""
        slots = Slots(*self._core.slots())
        for array in slots:
            array.flags.writeable = False
        return slots

    def pieces(self, token_id: int) -> Ints:
        """The pieces of a token, [m] int64; empty where it is in no node.

        Raises:
            TokenIdError: no such token.
        """
        indptr, ids = self._core.pieces()
        token_id = as_whole("token_id", token_id, "pass one token id")
        if not 0 <= token_id < len(indptr) - 1:
            raise TokenIdError(
                f"token id {token_id} is outside the vocabulary (V = {len(indptr) - 1}); "
                f"valid ids are 0..{len(indptr) - 1}"
            )
        return ids[indptr[token_id] : indptr[token_id + 1]]

    def find(self, prefix: Sequence[int]) -> int | None:
        """The node of a prefix, None where no token starts so. The empty prefix is node 0."""
        pieces = as_ids("prefix", prefix).tolist()
        known = all(0 <= piece < self.piece_count for piece in pieces)
        return self._core.find(pieces) if known else None

    def below(self, node: int) -> Ints:
        """The ids of the tokens whose sequence starts with a node's prefix."""
        slots = self.slots
        node = as_whole("node", node, "pass a node of this trie")
        if not 0 <= node < len(slots.node_starts):
            raise OptionError(f"node = {node} is out of range; expected 0..{len(self)}")
        size = int(slots.slot_sizes[slots.slot_ptr[node] : slots.slot_ptr[node + 1]].sum())
        start = int(slots.node_starts[node])
        return slots.tokens[start : start + size]

    def prefix_counts(self) -> Ints:
        """Prefixes with something to decide in each token's own spelling, [tokens] int64.

        They are the depths that prefix KL adds to a chunk of this token so spelled.
        """
        indptr, ids = self._core.pieces()
        chunk = self.lookup(ids, indptr[:-1].copy(), indptr[1:].copy()).chunk
        return np.bincount(chunk, minlength=len(indptr) - 1)

    def lookup(
        self,
        ids: Ints,
        starts: Ints,
        ends: Ints,
        *,
        max_depth: int | None = None,
        threads: int | None = None,
    ) -> PrefixNodes:
        """The nodes of all prefixes of all chunks at which there is something to decide.

        Args:
            ids: [n] int64 token ids of the pieces' vocabulary, contiguous; only those inside chunks
                are read.
            starts, ends: [C] int64, chunk `c` is `ids[starts[c]:ends[c]]`.
            max_depth: longest prefix, None for no limit.
            threads: None for one per core, 1 for none beside the caller's. The GIL is released.

        Raises:
            ShapeError: a chunk is no range of `ids`.
            TokenIdError: an id inside a chunk is outside the vocabulary.
        """
        depth = _NO_LIMIT
        if max_depth is not None:
            rule = "is out of range; expected a whole number of at least 0, or None"
            check_number("max_depth", max_depth, 0, rule=rule, whole=True)
            depth = min(max_depth, _NO_LIMIT)
        arrays = (as_ids("ids", ids), as_ids("starts", starts), as_ids("ends", ends))
        count = thread_count(threads)
        return PrefixNodes(*self._core.lookup(*arrays, depth, self.side, count))


def _flat(name: str, sequences: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
    """Where each of some sequences begins, and all of them in a row."""
    rows = as_rows(name, sequences)
    flat = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    return np.cumsum([0, *map(len, rows)], dtype=np.int64), flat


@dataclass(frozen=True)
class PairTries:
    """Both tries of a pair.

    Attributes:
        student: the student's tokens as the teacher's pieces, for chunks of one student token.
        teacher: the mirror, the teacher's tokens as the student's pieces, for chunks of several
            student tokens and one of the teacher.
    """

    student: PieceTrie
    teacher: PieceTrie

    @property
    def pair(self) -> PairFingerprint | None:
        """The two vocabularies, where known."""
        return common_pair((self.student.pair, self.teacher.pair), "teacher")

    @classmethod
    def build(cls, student: object, teacher: object, *, threads: int | None = None) -> PairTries:
        """From two tokenizers, paths or vocabularies (see `Vocab.from_tokenizer`).

        Raises:
            UnsupportedTokenizerError: a tokenizer's bytes or model are not known exactly.
        """
        one, other = Vocab.from_tokenizer(student), Vocab.from_tokenizer(teacher)
        return cls(
            PieceTrie.build(one, other, side="teacher", threads=threads),
            PieceTrie.build(other, one, side="student", threads=threads),
        )

    @classmethod
    def from_projection(cls, projection: Projection) -> PairTries:
        """From the pieces that a projection keeps, built or loaded; made once for each.

        Raises:
            OptionError: the projection has no pieces of the teacher's tokens, as the student's
                tokenizer has no model that can segment, or the file is of an older version.
        """
        expect(projection, ProjectionArrays, "projection", "pass Projection.build(...)")
        return projection.once(cls, lambda: cls._made_from(projection))

    @classmethod
    def _made_from(cls, projection: Projection) -> PairTries:
        student_size = projection.shape[0]
        if projection.teacher_pieces_indptr is None or projection.teacher_pieces is None:
            raise OptionError(
                "the projection has no student pieces of the teacher's tokens; build it from a "
                "student tokenizer that can segment (a tokenizer.json or a rank file)"
            )
        teacher = _core.PieceTrie.from_pieces(
            projection.teacher_pieces_indptr,
            projection.teacher_pieces,
            student_size,
            (projection.pieces_indptr, projection.pieces),
        )
        return cls(
            PieceTrie.from_projection(projection),
            PieceTrie(teacher, "student", projection.pair),
        )
