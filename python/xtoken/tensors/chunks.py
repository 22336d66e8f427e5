"""Chunks of a batch as flat index tensors, and the rule that says which of them a loss counts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken import _core
from xtoken._checks import expect
from xtoken.align.alignment import Alignment, AlignmentBatch, ChunkKind
from xtoken.errors import ShapeError
from xtoken.tensors.host import readable
from xtoken.tensors.host_chunks import HostChunks, WholeText, array_of
from xtoken.tensors.segments import ragged_arange
from xtoken.tensors.stacked import batch_of
from xtoken.vocab.fingerprints import PairFingerprint

_INDEX_FIELDS = ("sample", "student_start", "student_end", "teacher_start", "teacher_end", "kind")
_TENSORS = (*_INDEX_FIELDS, "has_predictor")
_FIELDS = (*_TENSORS, "pair", "_host")
_ADMITTED = (ChunkKind.EXACT, ChunkKind.SPECIAL)


@dataclass(frozen=True, eq=False)
class ChunkBatch:
    """The chunks of a padded batch, one row per chunk: half-open token ranges in both sequences.

    `usable_from_alignments` makes the chunks that a loss counts; `from_alignments` makes all, of
    which `usable` keeps those.

    Attributes:
        sample: [C] int64, row of the batch the chunk belongs to.
        student_start, student_end: [C] int64, token range in the padded [B, T_s] ids.
        teacher_start, teacher_end: [C] int64, token range in the padded [B, T_t] ids.
        kind: [C] int64, a value of `ChunkKind`.
        has_predictor: [C] bool, on both sides each token of the chunk follows a token of its own
            document, which predicts it. Padding on the left and packed documents are told here.
        pair: the vocabularies of the ids, where known.
    """

    sample: Tensor
    student_start: Tensor
    student_end: Tensor
    teacher_start: Tensor
    teacher_end: Tensor
    kind: Tensor
    has_predictor: Tensor
    pair: PairFingerprint | None = None
    # Of these very tensors: `dataclasses.replace` takes none along.
    _host: HostChunks | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        count = self.sample.shape
        for name in _TENSORS:
            value = getattr(self, name)
            wanted = torch.bool if name == "has_predictor" else torch.int64
            if value.dtype != wanted or value.dim() != 1 or value.shape != count:
                raise ShapeError(
                    f"{name} is {value.dtype} {tuple(value.shape)}, expected {wanted} "
                    f"{tuple(count)} like sample; build the batch with ChunkBatch.from_alignments"
                )

    def __len__(self) -> int:
        return self.sample.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.sample.device

    @classmethod
    def from_alignments(
        cls,
        alignments: AlignmentBatch | Sequence[Alignment],
        student_offsets: Sequence[int] | None = None,
        teacher_offsets: Sequence[int] | None = None,
        *,
        student_document_starts: Tensor | None = None,
        teacher_document_starts: Tensor | None = None,
    ) -> ChunkBatch:
        """Flatten one alignment a sample into one batch, on the CPU.

        Args:
            alignments: what `Aligner.align_batch` gives, with the columns at which it found each
                sample's first token; or one `Alignment` a sample.
            student_offsets, teacher_offsets: B ints, for a sequence of alignments: the column at
                which each sample's first token stands in the padded ids (left padding); None
                means 0.
            student_document_starts, teacher_document_starts: [B, T] bool, for packed rows: the
                first token of each document, as `position_ids == 0` says. No chunk that holds one
                is predicted. None means one document per row.

        Raises:
            ArgumentTypeError: neither of both classes.
            ShapeError: the number of offsets is not B, the bounds of a sample do not fit `kind`, or
                the document starts do not cover the chunks.
            OptionError: offsets beside an `AlignmentBatch`, which has its own.
            PairError: alignments of several pairs.

        >>> import numpy as np
        >>> one = Alignment(np.array([0, 1, 3]), np.array([0, 1, 2]), np.zeros(2, np.uint8),
        ...                 np.zeros(4, np.int64))
        >>> ChunkBatch.from_alignments([one]).student_end.tolist()
        [1, 3]
        """
        batch = batch_of(alignments, student_offsets, teacher_offsets)
        rows, predicted, reach, whole = _core.chunk_rows(
            (batch.student_bounds, batch.student_columns),
            (batch.teacher_bounds, batch.teacher_columns),
            batch.kind,
            batch.chunk_indptr,
        )
        for side, starts, at in (
            ("student", student_document_starts, 1),
            ("teacher", teacher_document_starts, 3),
        ):
            if starts is not None:
                name = f"{side}_document_starts"
                predicted &= _counts_inside(starts, name, rows[0], rows[at], rows[at + 1]) == 0
                whole = whole and bool(predicted.all())
        text = _text(batch, student_document_starts, teacher_document_starts)
        return cls._of_rows(rows, predicted, reach, whole, batch.pair, text)

    @classmethod
    def usable_from_alignments(
        cls,
        alignments: AlignmentBatch | Sequence[Alignment],
        student_mask: Tensor,
        teacher_mask: Tensor,
        *,
        admit: Collection[int] = _ADMITTED,
        student_offsets: Sequence[int] | None = None,
        teacher_offsets: Sequence[int] | None = None,
        student_document_starts: Tensor | None = None,
        teacher_document_starts: Tensor | None = None,
    ) -> ChunkBatch:
        """The chunks that a loss counts, on the CPU: `from_alignments` and `usable` in one pass.

        Args:
            alignments: as in `from_alignments`.
            student_mask: [B, T_s] bool, the token counts in the loss (prompt and padding do not).
            teacher_mask: [B, T_t] bool.
            admit: kinds to count, as in `usable`.
            student_offsets, teacher_offsets: B ints, as in `from_alignments`.
            student_document_starts, teacher_document_starts: as in `from_alignments`, of the masks'
                shapes.

        Raises:
            ArgumentTypeError: the alignments or a mask are of another class.
            ShapeError: a mask is not [B, T] bool, a chunk lies outside of it, document starts are
                not of its shape, or the arrays of an alignment do not fit together.
            OptionError: offsets beside an `AlignmentBatch`, which has its own.
            PairError: alignments of several pairs.

        >>> import numpy as np
        >>> one = Alignment(np.array([0, 1, 3]), np.array([0, 1, 2]), np.zeros(2, np.uint8),
        ...                 np.zeros(4, np.int64))
        >>> masks = torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)
        >>> ChunkBatch.usable_from_alignments([one], *masks).student_end.tolist()
        [3]
        """
        batch = batch_of(alignments, student_offsets, teacher_offsets)
        flags = []
        for side, mask, starts in (
            ("student", student_mask, student_document_starts),
            ("teacher", teacher_mask, teacher_document_starts),
        ):
            _check_mask(mask, side)
            if starts is not None:
                name = f"{side}_document_starts"
                _check_flags(starts, name)
                if starts.shape != mask.shape:
                    raise ShapeError(
                        f"{name} has shape {tuple(starts.shape)}, expected {tuple(mask.shape)} "
                        f"like {side}_mask; pass both of the padded ids"
                    )
                # A chunk is left out for a token that begins a document as for one that is masked.
                mask = mask & ~starts
            flags.append(_flags(mask))
        kept = _core.usable_chunks(
            (batch.student_bounds, batch.student_columns, flags[0]),
            (batch.teacher_bounds, batch.teacher_columns, flags[1]),
            batch.kind,
            batch.chunk_indptr,
            [int(kind) for kind in admit],
        )
        if kept is not None:
            text = _text(batch, student_document_starts, teacher_document_starts)
            return cls._of_rows(*kept, batch.pair, text)
        # Two steps tell what does not fit.
        chunks = cls.from_alignments(
            batch,
            student_document_starts=student_document_starts,
            teacher_document_starts=teacher_document_starts,
        )
        return chunks.usable(student_mask, teacher_mask, admit=admit)

    @classmethod
    def _of_rows(
        cls,
        rows: NDArray[np.int64],
        predicted: NDArray[np.bool_],
        reach: tuple[int, int, int],
        whole: bool,
        pair: PairFingerprint | None,
        text: WholeText | None = None,
    ) -> ChunkBatch:
        """What the core made of chunks; its arrays own their memory, as `HostChunks` wants them."""
        host = HostChunks(rows[0], rows[1], rows[2], rows[3], rows[4], whole, reach, text)
        values = (*torch.from_numpy(rows).unbind(0), torch.from_numpy(predicted), pair, host)
        chunks = object.__new__(cls)  # what the core makes needs no check
        vars(chunks).update(zip(_FIELDS, values, strict=True))
        return chunks

    @classmethod
    def from_ranges(
        cls,
        sample: Tensor,
        student_start: Tensor,
        student_end: Tensor,
        teacher_start: Tensor,
        teacher_end: Tensor,
        kind: Tensor | ChunkKind = ChunkKind.EXACT,
    ) -> ChunkBatch:
        """Chunks typed by hand, in rows of one document that are padded on the right.

        Args:
            sample, student_start, student_end, teacher_start, teacher_end: [C] int64.
            kind: [C] int64, or one kind for all.
        """
        if not isinstance(kind, Tensor):
            kind = torch.full_like(sample, int(kind))
        predicted = (student_start >= 1) & (teacher_start >= 1)
        return cls(sample, student_start, student_end, teacher_start, teacher_end, kind, predicted)

    @classmethod
    def from_mask(cls, mask: Tensor, document_starts: Tensor | None = None) -> ChunkBatch:
        """One 1:1 EXACT chunk for every token of `mask`: both sides share a tokenizer.

        Args:
            mask: [B, T] bool, the tokens that count.
            document_starts: [B, T] bool, the first token of each document, which nothing predicts;
                the first column is one in any case. With left padding pass it, or keep each
                sample's first token out of `mask`.
        """
        if mask.dim() != 2 or mask.dtype != torch.bool:
            raise ShapeError(f"mask is {mask.dtype} {tuple(mask.shape)}, expected bool [B, T]")
        sample, start = mask.nonzero(as_tuple=True)
        chunks = cls.from_ranges(sample, start, start + 1, start, start + 1)
        if document_starts is None:
            return chunks
        if document_starts.shape != mask.shape or document_starts.dtype != torch.bool:
            raise ShapeError(
                f"document_starts is {document_starts.dtype} {tuple(document_starts.shape)}, "
                f"expected bool {tuple(mask.shape)} like mask"
            )
        return replace(chunks, has_predictor=chunks.has_predictor & ~document_starts[sample, start])

    @classmethod
    def empty(cls, device: torch.device | str | None = None) -> ChunkBatch:
        """A batch without chunks."""
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return cls.from_ranges(none, none, none, none, none)

    @property
    def host(self) -> HostChunks:
        """The same chunks on the host. Batches moved by `to` bring them along; for others this
        waits for the device, once."""
        if self._host is None:
            object.__setattr__(self, "_host", HostChunks.of(self))
        assert self._host is not None
        return self._host

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ChunkBatch:
        """The same chunks on another device."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ChunkBatch:
        """The same chunks in pinned memory, for a copy to a GPU that waits for nothing."""
        return self.mapped(Tensor.pin_memory)

    def mapped(self, move: Callable[[Tensor], Tensor]) -> ChunkBatch:
        """The same chunks in tensors that `move` makes of these, of equal values."""
        host = self.host if readable(self.sample) else self._host
        moved = self._each(move)
        object.__setattr__(moved, "_host", host)
        return moved

    def select(self, index: Tensor) -> ChunkBatch:
        """The chunks at `index`: int64 positions or a [C] bool mask."""
        if index.dtype == torch.bool:
            index = index.nonzero().flatten()  # once, and not again for every field
        # A quarter of the time that indexing takes.
        return self._each(lambda tensor: tensor.index_select(0, index))

    def _each(self, function: Callable[[Tensor], Tensor]) -> ChunkBatch:
        return ChunkBatch(
            function(self.sample),
            function(self.student_start),
            function(self.student_end),
            function(self.teacher_start),
            function(self.teacher_end),
            function(self.kind),
            function(self.has_predictor),
            self.pair,
        )

    def usable(
        self,
        student_mask: Tensor,
        teacher_mask: Tensor,
        *,
        admit: Collection[int] = _ADMITTED,
    ) -> ChunkBatch:
        """The chunks that a loss counts, in order.

        A chunk counts when its kind is in `admit`, neither side is empty, each token is predicted
        by one of its own document on both sides, and all its tokens are inside both masks.

        Args:
            student_mask: [B, T_s] bool, the token counts in the loss (prompt and padding do not).
            teacher_mask: [B, T_t] bool.
            admit: kinds to count; by default EXACT and SPECIAL, the ends of turns and texts that
                the masks hold.

        Raises:
            ShapeError: a mask is not [B, T] bool, or a chunk lies outside of it.
        """
        for side, mask in (("student", student_mask), ("teacher", teacher_mask)):
            _check_mask(mask, side)
        self.check_within(student_mask.shape, teacher_mask.shape)
        host = self.host
        kept = _core.usable_rows(
            host.sample,
            host.range_of("student"),
            host.range_of("teacher"),
            np.ascontiguousarray(array_of(self.kind)),
            _flags(self.has_predictor),
            _flags(student_mask),
            _flags(teacher_mask),
            [int(kind) for kind in admit],
        )
        chunks = self._of_rows(*kept, self.pair, host.text)
        return chunks if self.device.type == "cpu" else chunks.to(self.device)

    def check_within(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
        """Raise where a chunk lies outside [B, T_s] or [B, T_t]: the alignment of another batch."""
        if len(self) == 0:
            return
        sample, student_end, teacher_end = self.host.reach
        ends = {"student": student_end, "teacher": teacher_end}
        for side, shape in (("student", student_shape), ("teacher", teacher_shape)):
            if len(shape) != 2:
                raise ShapeError(f"{side} ids or mask have shape {tuple(shape)}, expected [B, T]")
            if sample >= shape[0] or ends[side] > shape[1]:
                raise ShapeError(
                    f"chunks reach sample {sample} and {side} token {ends[side] - 1}, but the "
                    f"batch is {tuple(shape)}; pass the alignments of this batch"
                )

    def range_of(self, side: str) -> tuple[Tensor, Tensor]:
        """First tokens and ends on "student" or "teacher"."""
        if side == "student":
            return self.student_start, self.student_end
        return self.teacher_start, self.teacher_end

    def chunk_ids(self, side: str, shape: Sequence[int]) -> Tensor:
        """[B, T] int64: the chunk each token of `side` ("student" or "teacher") is in, -1 for none.

        Made for inspection; the losses work on the ranges.
        """
        start, end = self.range_of(side)
        sizes = end - start
        chunk = torch.repeat_interleave(torch.arange(len(self), device=self.device), sizes)
        ids = torch.full(tuple(shape), -1, dtype=torch.int64, device=self.device)
        ids[self.sample[chunk], ragged_arange(start, sizes)] = chunk
        return ids


def _flags(tensor: Tensor) -> NDArray[np.uint8]:
    flags: NDArray[np.uint8] = np.ascontiguousarray(array_of(tensor)).view(np.uint8)
    return flags


def _text(
    alignments: AlignmentBatch, student_starts: Tensor | None, teacher_starts: Tensor | None
) -> WholeText | None:
    """What chunks are taken from; None where one side alone says where documents begin."""
    if student_starts is None and teacher_starts is None:
        return WholeText(alignments)
    if student_starts is None or teacher_starts is None:
        return None
    starts = array_of(student_starts).copy(), array_of(teacher_starts).copy()
    return WholeText(alignments, starts)


def _check_mask(mask: Tensor, side: str) -> None:
    name = f"{side}_mask"
    expect(mask, Tensor, name, f"pass {name} as a bool tensor [B, T]")
    _check_flags(mask, name)


def _check_flags(flags: Tensor, name: str) -> None:
    if flags.dim() != 2 or flags.dtype != torch.bool:
        raise ShapeError(
            f"{name} is {flags.dtype} {tuple(flags.shape)}, expected torch.bool [B, T]"
        )


def _counts_inside(
    flags: Tensor,
    name: str,
    sample: NDArray[np.int64],
    start: NDArray[np.int64],
    end: NDArray[np.int64],
) -> NDArray[np.int64]:
    """[C] how many flags of [B, T] are set in each range of its row."""
    _check_flags(flags, name)
    rows, width = flags.shape
    if len(sample) and (int(sample.max()) >= rows or int(end.max()) > width):
        raise ShapeError(
            f"{name} has shape {tuple(flags.shape)}, but the chunks reach sample "
            f"{int(sample.max())} and token {int(end.max()) - 1}; pass that of the padded ids"
        )
    # One running sum over all rows: a range does not leave its row.
    sums = np.zeros(rows * width + 1, np.int64)
    np.cumsum(array_of(flags).reshape(-1), out=sums[1:])
    row = sample * width
    counts: NDArray[np.int64] = sums.take(row + end) - sums.take(row + start)
    return counts
