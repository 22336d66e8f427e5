"""What the losses read of a pair of tokenizers, as one module that moves with the model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from xtoken._checks import expect
from xtoken.errors import OptionError, PairError, ShapeError, TokenIdError
from xtoken.projection import Projection
from xtoken.targets import TargetBuilder
from xtoken.tensors.byte_prefixes import BytePrefixes
from xtoken.tensors.cells import Cells
from xtoken.tensors.completions import Completions
from xtoken.tensors.host import ordinary
from xtoken.tensors.piece_chains import PieceChains
from xtoken.tensors.projection import SparseProjection
from xtoken.tensors.stop_fold import StopFold
from xtoken.tensors.trie import TrieSlots, first_pieces
from xtoken.trie import PairTries
from xtoken.vocab.fingerprints import PairFingerprint, common_pair

Part = Literal[
    "projection",
    "tries",
    "strict_common",
    "relaxed_common",
    "targets",
    "byte_prefixes",
    "completions",
    "piece_chains",
    "cells",
]
LossName = Literal[
    "prefix-kl",
    "p-kl",
    "exact-kl",
    "h-kl",
    "gold",
    "uld",
    "alm",
    "bpm",
    "escd",
    "strict-top-k",
    "partition-kl",
    "same-vocab-kl",
]

# What each loss reads of a pair, beside the sizes of its vocabularies.
PARTS_OF_LOSS: dict[LossName, frozenset[Part]] = {
    "prefix-kl": frozenset({"projection", "tries"}),
    "p-kl": frozenset({"projection"}),
    "exact-kl": frozenset({"targets"}),
    "h-kl": frozenset({"relaxed_common"}),
    "gold": frozenset({"strict_common"}),
    "uld": frozenset(),
    "alm": frozenset(),
    "bpm": frozenset({"byte_prefixes"}),
    "escd": frozenset({"byte_prefixes", "completions"}),
    "strict-top-k": frozenset({"strict_common"}),
    "partition-kl": frozenset({"strict_common", "piece_chains"}),
    "same-vocab-kl": frozenset(),
}


class CommonSet(nn.Module):
    """Pairs of tokens that correspond one to one: student token i and teacher token i.

    >>> len(CommonSet(torch.tensor([4, 2]), torch.tensor([0, 9])))
    2
    """

    student_ids: Tensor
    teacher_ids: Tensor

    def __init__(self, student_ids: Tensor, teacher_ids: Tensor) -> None:
        """
        Args:
            student_ids, teacher_ids: [n] int64, distinct on each side.

        Raises:
            ArgumentTypeError: no tensors.
            ShapeError: not two int64 lists of one length.
            TokenIdError: an id below 0, or named twice.
        """
        super().__init__()
        hint = "pass PairParts.from_projection(projection, needs='h-kl')"
        for name, ids in (("student_ids", student_ids), ("teacher_ids", teacher_ids)):
            expect(ids, Tensor, name, hint)
        if student_ids.shape != teacher_ids.shape or student_ids.dim() != 1:
            raise ShapeError(
                f"student_ids {tuple(student_ids.shape)} and teacher_ids "
                f"{tuple(teacher_ids.shape)} must be two lists of one length: pair i is (s_i, t_i)"
            )
        for name, ids in (("student_ids", student_ids), ("teacher_ids", teacher_ids)):
            if ids.dtype != torch.int64:
                raise ShapeError(f"{name} is {ids.dtype}, expected torch.int64")
            if len(torch.unique(ids)) != len(ids):
                raise TokenIdError(f"{name} names a token twice; the set must be one-to-one")
            self.register_buffer(name, ids.contiguous(), persistent=False)

    def __len__(self) -> int:
        return len(self.student_ids)

    def check_sizes(self, sizes: tuple[int, int]) -> None:
        """Raise TokenIdError where an id is outside its vocabulary (V_s, V_t)."""
        for name, ids, size in zip(
            ("student_ids", "teacher_ids"), (self.student_ids, self.teacher_ids), sizes, strict=True
        ):
            if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= size):
                raise TokenIdError(
                    f"{name} spans [{int(ids.min())}, {int(ids.max())}], outside the vocabulary "
                    f"(V = {size}); pass the common set of this pair"
                )

    def extra_repr(self) -> str:
        return f"{len(self)} pairs"


class PairParts(nn.Module):
    """What losses read of a pair of tokenizers: sizes, W, tries, common sets.

    `from_projection` makes it with the parts that a loss needs; the constructor takes parts made by
    hand. `pair.to(device)` moves all of them.

    Attributes:
        sizes: (V_s, V_t), the tokens of the two tokenizers; what an lm_head has beyond is padding.
        fingerprint: the pair of vocabularies, where known.
        projection: W, with its learnable weights if any.
        first_pieces: W with `decay = 0`, which prefix KL compares at its root; made where W and
            `student_trie` are there.
        student_trie: the student's tokens as teacher pieces.
        teacher_trie: the mirror.
        strict_common, relaxed_common: the common sets: of GOLD, strict top-k and partition KL, and
            of H-KL.
        stop_fold: the teacher's stop tokens that no student token stands for.
        student_stop_fold: the student's that claim a teacher token of a preferred one, for the
            losses with one-to-one pairs.
        targets: the builder of exact targets, for exact-kl; it stays on the CPU.
        byte_prefixes: what each teacher token begins with, for bpm and escd.
        completions: what completes the teacher tokens that a student token begins, for escd.
        piece_chains: what the pieces of a token but the last can end as, for partition-kl.
        cells: for the options `cells` and `consistent` of p-kl and prefix-kl.
        first_cells: `first_pieces` onto the cells.

    >>> pair = PairParts((3, 3), projection=SparseProjection.identity(3))
    >>> pair.sizes
    (3, 3)
    """

    projection: SparseProjection | None
    first_pieces: SparseProjection | None
    student_trie: TrieSlots | None
    teacher_trie: TrieSlots | None
    strict_common: CommonSet | None
    relaxed_common: CommonSet | None
    stop_fold: StopFold | None
    student_stop_fold: StopFold | None
    targets: TargetBuilder | None
    byte_prefixes: BytePrefixes | None
    completions: Completions | None
    piece_chains: PieceChains | None
    cells: Cells | None
    first_cells: SparseProjection | None

    def __init__(
        self,
        sizes: tuple[int, int],
        *,
        projection: SparseProjection | None = None,
        student_trie: TrieSlots | None = None,
        teacher_trie: TrieSlots | None = None,
        strict_common: CommonSet | None = None,
        relaxed_common: CommonSet | None = None,
        stop_fold: StopFold | None = None,
        student_stop_fold: StopFold | None = None,
        targets: TargetBuilder | None = None,
        byte_prefixes: BytePrefixes | None = None,
        completions: Completions | None = None,
        piece_chains: PieceChains | None = None,
        cells: Cells | None = None,
        fingerprint: PairFingerprint | None = None,
    ) -> None:
        """
        Args:
            sizes: (V_s, V_t).
            fingerprint: None takes that of the parts.

        Raises:
            ArgumentTypeError: a part is of another class.
            PairError: the parts are of several pairs.
            TokenIdError: a common set is outside the vocabularies.
            ShapeError: tables over bytes are of other sizes.
        """
        super().__init__()
        self.sizes = _checked_sizes(sizes)
        hint = "pass PairParts.from_projection(projection, needs=...) for all of them"
        for name, part, cls in (
            ("projection", projection, SparseProjection),
            ("student_trie", student_trie, TrieSlots),
            ("teacher_trie", teacher_trie, TrieSlots),
            ("strict_common", strict_common, CommonSet),
            ("relaxed_common", relaxed_common, CommonSet),
            ("targets", targets, TargetBuilder),
            ("byte_prefixes", byte_prefixes, BytePrefixes),
            ("completions", completions, Completions),
            ("piece_chains", piece_chains, PieceChains),
            ("cells", cells, Cells),
        ):
            setattr(self, name, None if part is None else expect(part, cls, name, hint))
        known = [("fingerprint", fingerprint)]
        if projection is not None:
            known.append(("projection", projection.fingerprint))
            if projection.shape != self.sizes:
                raise PairError(
                    f"projection is {projection.shape[0]} x {projection.shape[1]}, expected "
                    f"{self.sizes[0]} x {self.sizes[1]}; build it from the same two tokenizers"
                )
        for name, trie, expected in (
            ("student_trie", student_trie, self.sizes),
            ("teacher_trie", teacher_trie, self.sizes[::-1]),
        ):
            if trie is None:
                continue
            known.append((name, trie.fingerprint))
            if (trie.token_count, trie.piece_count) != expected:
                raise PairError(
                    f"{name} has {trie.token_count} tokens and {trie.piece_count} pieces, "
                    f"expected {expected[0]} and {expected[1]}; build W and both tries from the "
                    "same two tokenizers"
                )
        if targets is not None:
            known.append(("targets", targets.pair))
        for common in (strict_common, relaxed_common):
            if common is not None:
                common.check_sizes(self.sizes)
        for tables in (byte_prefixes, completions, piece_chains):
            if tables is not None:
                tables.check_sizes(self.sizes)
        self.fingerprint = _common_fingerprint(known)
        self.stop_fold = stop_fold
        self.student_stop_fold = student_stop_fold
        self.first_pieces = None
        if projection is not None and student_trie is not None:
            self.first_pieces = first_pieces(projection, student_trie)
        self.first_cells = None
        if cells is not None and self.first_pieces is not None:
            self.first_cells = cells.first_pieces(self.first_pieces)

    @classmethod
    @ordinary()
    def from_projection(
        cls,
        projection: Projection,
        *,
        needs: LossName | Collection[Part],
        learnable: bool = False,
        threshold: float = 0.6,
    ) -> PairParts:
        """The parts of a pair, made from its W on the CPU.

        Args:
            projection: `xtoken.Projection.build(...)` of the pair.
            needs: the name of the loss, or of the parts: "projection", "tries", "strict_common",
                "relaxed_common", "targets", "byte_prefixes", "completions",
                "piece_chains", "cells".
            learnable: W's weights are parameters that the loss trains.
            threshold: the least weight of a relaxed pair, in (0, 1].

        Raises:
            ArgumentTypeError: not a `Projection`.
            OptionError: an unknown part or loss; a threshold out of range; the projection has no
                pieces to make tries of; `learnable` where the loss does not train W.
        """
        expect(
            projection, Projection, "projection", "pass xtoken.Projection.build(...) of the pair"
        )
        parts = _parts_named(needs)
        if learnable and (parts & {"projection", "tries"}) != {"projection"}:
            raise OptionError(
                f"learnable = True, but needs = {needs!r} trains no weight of W; "
                "pass needs='p-kl', or learnable=False"
            )
        tries = PairTries.from_projection(projection) if "tries" in parts else None
        sparse = None
        if "projection" in parts:
            sparse = SparseProjection.from_projection(projection, learnable=learnable)
        return cls(
            projection.shape,
            projection=sparse,
            student_trie=None if tries is None else TrieSlots(tries.student),
            teacher_trie=None if tries is None else TrieSlots(tries.teacher),
            strict_common=_common(projection, "strict", threshold)
            if "strict_common" in parts
            else None,
            relaxed_common=_common(projection, "relaxed", threshold)
            if "relaxed_common" in parts
            else None,
            stop_fold=_stop_fold(projection),
            student_stop_fold=_student_stop_fold(projection),
            targets=TargetBuilder.from_projection(projection) if "targets" in parts else None,
            byte_prefixes=BytePrefixes.from_projection(projection)
            if "byte_prefixes" in parts
            else None,
            completions=Completions.from_projection(projection) if "completions" in parts else None,
            cells=Cells(projection, _stop_fold(projection)) if "cells" in parts else None,
            piece_chains=PieceChains.from_projection(projection)
            if "piece_chains" in parts
            else None,
            fingerprint=projection.pair,
        )

    def extra_repr(self) -> str:
        return f"{self.sizes[0]} student and {self.sizes[1]} teacher tokens"


def _stop_fold(projection: Projection) -> StopFold | None:
    sources, targets = projection.stop_fold_from, projection.stop_fold_to
    if sources is None or targets is None or not len(sources):
        return None
    return StopFold(sources.tolist(), targets.tolist())


def _student_stop_fold(projection: Projection) -> StopFold | None:
    claimed: dict[int, int] = {}
    folds = {}
    for stop in () if projection.student_stops is None else projection.student_stops.tolist():
        columns, _ = projection.csr.row(stop)
        if len(columns):
            preferred = claimed.setdefault(int(columns[0]), stop)
            if preferred != stop:
                folds[stop] = preferred
    return StopFold(list(folds), list(folds.values())) if folds else None


def _parts_named(needs: LossName | Collection[Part]) -> frozenset[Part]:
    if isinstance(needs, str):
        if needs not in PARTS_OF_LOSS:
            raise OptionError(
                f"needs = {needs!r}, expected a loss ({', '.join(PARTS_OF_LOSS)}) or a set of parts"
            )
        return PARTS_OF_LOSS[needs]
    unknown = [part for part in needs if part not in get_args(Part)]
    if unknown:
        raise OptionError(f"needs holds {unknown[0]!r}, expected of {', '.join(get_args(Part))}")
    return frozenset(needs)


def _common(
    projection: Projection, mode: Literal["strict", "relaxed"], threshold: float
) -> CommonSet:
    pairs = torch.from_numpy(projection.common_set(mode, threshold))  # [n, 2]
    return CommonSet(pairs[:, 0], pairs[:, 1])


def _checked_sizes(sizes: tuple[int, int]) -> tuple[int, int]:
    hint = "pass the sizes of the two tokenizers, (V_s, V_t)"
    expect(sizes, tuple, "sizes", hint)
    if len(sizes) != 2 or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ShapeError(f"sizes = {sizes!r}, expected two numbers above 0; {hint}")
    return sizes


def _common_fingerprint(known: list[tuple[str, PairFingerprint | None]]) -> PairFingerprint | None:
    found: PairFingerprint | None = None
    for name, pair in known:
        found = common_pair((found, pair), name)
    return found
