"""P-KL by kernels: all columns that W reaches, the best of each chunk or of the micro-batch, those
of a stored top-k; with a tail or without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from xtoken.losses.engine.row_blocks import Block
from xtoken.losses.engine.student_rows import LogitRows, StudentRows
from xtoken.losses.engine.teacher_rows import TeacherRows
from xtoken.losses.kernels import launch, self_check
from xtoken.losses.kernels.choice import on_device_of, takes
from xtoken.losses.kernels.launch import (
    Compared,
    Found,
    GradientBuffer,
    Rows,
    cdiv,
    floats,
    found,
    one_row_each,
    padded,
    seeds,
    times,
)
from xtoken.losses.kernels.patches import patched_columns, readable_rows
from xtoken.losses.kernels.w_map import WMap, w_map
from xtoken.tensors.teacher_signal import TeacherTopK

if TYPE_CHECKING:
    from xtoken.losses.p_kl.block import PKLBlocks

# Rows that a grid has at most.
_MOST_ROWS = 65535
# Columns of few and of many tokens, and tokens of each, that a program sums up at a time.
_FEW_TILE, _MANY_TILE = (64, 8), (4, 256)
_ALWAYS = 2**30
# Of the gradient, whose reads are scattered: more of them wait at a time than with Triton's four.
_WARPS = 8


@dataclass(frozen=True, eq=False)
class _Teacher:
    """The teacher's side of a block of rows.

    Attributes:
        logits: rows of full logits; the student's own where the columns are listed.
        patches: the columns that differ from those, and the logits there.
        listed: [n, k] int32 teacher ids and float32 log-probabilities, -inf for none; None for
            full logits.
        tail: [n] log of the teacher's mass in the tail, where the columns are listed.
        totals: [n] log of each row's softmax denominator, where it is known and the kept columns
            are all that is read.
    """

    logits: Rows
    patches: tuple[Tensor, Tensor]
    listed: tuple[Tensor, Tensor] | None
    tail: Tensor | None = None
    totals: Tensor | None = None

    def part(self, start: int, stop: int) -> _Teacher:
        some = slice(start, stop)
        columns, values = self.patches
        listed = None if self.listed is None else (self.listed[0][some], self.listed[1][some])
        return _Teacher(
            self.logits.part(start, stop), (columns, values[some]), listed,
            None if self.tail is None else self.tail[some],
            None if self.totals is None else self.totals[some],
        )  # fmt: skip


def p_kl_pass(
    loss: PKLBlocks,
    source: StudentRows,
    scale: float | Tensor,
    needed: tuple[bool, ...],
    grads: list[Tensor | None] | None,
) -> Found | None:
    """The whole pass over a batch by kernels; None where torch computes it."""
    if any(needed[1:]) or not _takes(source, loss):
        return None
    with torch.no_grad(), on_device_of(source.logits):
        return _Pass.of(loss, source).run(scale, needed, grads)


def p_kl_compared(loss: PKLBlocks, source: StudentRows) -> Compared | None:
    """The pass without its gradient, which can be written afterwards."""
    if not _takes(source, loss):
        return None
    with torch.no_grad(), on_device_of(source.logits):
        return _Pass.of(loss, source).compared()


def _takes(source: StudentRows, loss: PKLBlocks) -> TypeGuard[LogitRows]:
    student, teacher = one_row_each(loss.student, source), loss.teacher
    if student is None or teacher.where.owner is not None or teacher.left_out is not None:
        return False
    if loss.direction != "forward" or loss.by_student or loss.full_metrics:
        return False
    if loss.projection.free is not None:
        return False
    signal = teacher.signal
    values = signal.log_probs if isinstance(signal, TeacherTopK) else signal
    if not isinstance(values, Tensor):
        return False
    if isinstance(signal, TeacherTopK) and loss.chunk_top_k is None:
        return False
    if not isinstance(signal, TeacherTopK) and not readable_rows(teacher):
        return False
    return takes("p-kl", self_check.p_kl, student.logits, values)


@dataclass(frozen=True, eq=False)
class _Block:
    """A block of rows once compared, from which its gradient can be written.

    Attributes:
        rows: which of the batch's.
        stats: [n, 7], see `together`.
        apart: [n, M], see `shared_columns`.
        bits: as those of `_Pass`, of these rows.
        listed: see `columns_of_list`; None where the columns are not listed, or to be made again.
    """

    rows: slice
    z: Rows
    teacher: _Teacher
    stats: Tensor
    apart: Tensor
    bits: Tensor
    listed: Tensor | None


@dataclass(frozen=True, eq=False)
class _Pass:
    """What is the same for all blocks of rows.

    Attributes:
        teacher: of all rows.
        mass: [n] the teacher's on the kept columns, where the columns are listed.
        every: whether all columns that W reaches are kept.
        bits: [1, words] the columns kept of all rows, where they are the same; else None.
        k: how many columns each row keeps of full logits, where that differs; else None.
    """

    loss: PKLBlocks
    source: LogitRows
    w: WMap
    teacher: _Teacher
    mass: Tensor | None
    every: bool
    bits: Tensor | None
    k: int | None

    @classmethod
    def of(cls, loss: PKLBlocks, source: LogitRows) -> _Pass:
        signal, rows, index = loss.teacher.signal, loss.teacher, loss.teacher.where.index
        patches = None if isinstance(signal, TeacherTopK) else patched_columns(rows)
        w, supported = w_map(loss.projection), len(loss.projection.supported_ids)
        if patches is not None:
            assert isinstance(signal, Tensor)
            k = loss.chunk_top_k
            shared = k is None and loss.part is not loss.projection.full()
            some = k is not None and k < supported
            bits = _bits_of(loss.part.columns, rows.vocab_size) if shared else None
            totals = None if loss.tail_bucket or not shared else rows.log_totals
            totals = None if totals is None else totals.to(torch.float32)
            teacher = _Teacher(Rows.of(signal, index), patches, None, totals=totals)
            return cls(
                loss, source, w, teacher, None, not (shared or some), bits, k if some else None
            )
        whole = Block(0, len(index), None)
        places, log_probs = loss.teacher_columns(whole)
        assert places is not None
        ids = places if loss.part.columns is None else _padded_ids(loss.part.columns)[places]
        mass = torch.logsumexp(log_probs * rows.stored_power, -1).exp()
        tail = None
        if loss.tail_bucket:
            tail = rows.log_outside(0, len(index), mass, None).to(torch.float32).contiguous()
        none = (
            torch.empty(0, dtype=torch.int32, device=index.device),
            torch.empty((len(index), 0), dtype=torch.float32, device=index.device),
        )
        listed = (ids.to(torch.int32).contiguous(), log_probs.to(torch.float32).contiguous())
        student = Rows.of(source.logits, loss.student.index)
        teacher = _Teacher(student, none, listed, tail)
        return cls(loss, source, w, teacher, mass, False, None, None)

    def run(
        self, scale: float | Tensor, needed: tuple[bool, ...], grads: list[Tensor | None] | None
    ) -> Found:
        """Value and gradient block by block, so that what a block holds is gone before the next."""
        loss, index = self.loss, self.loss.student.index
        own, seed = seeds(len(index), loss.weights, scale, index.device)
        gradient, checks = None, None
        if any(needed):
            gradient = GradientBuffer.of(self.source, index, grads)
            checks = floats(own, len(index), cdiv(gradient.flat.shape[1], launch.BLOCK))
        stats = floats(own, len(index), 7)
        for rows in self._blocks():
            block = self._compare(rows, stats[rows])
            if gradient is not None and checks is not None:
                self._write(block, seed, gradient, checks)
            del block
        total, sums = self._values(stats, own)
        return found(self.source, total, scale, sums, gradient, checks, len(loss.params))

    def compared(self) -> Compared:
        """The values of all blocks, and what their gradients are made from."""
        loss, index = self.loss, self.loss.student.index
        own, _ = seeds(len(index), loss.weights, 1.0, index.device)
        stats = floats(own, len(index), 7)
        blocks = [replace(self._compare(rows, stats[rows]), listed=None) for rows in self._blocks()]
        total, sums = self._values(stats, own)

        def write(scale: float | Tensor, gradient: GradientBuffer) -> Tensor:
            seed = times(own, scale)
            checks = floats(seed, len(seed), cdiv(gradient.flat.shape[1], launch.BLOCK))
            for block in blocks:
                self._write(block, seed, gradient, checks)
            return checks

        return Compared(self.source, index, total, sums, write, len(loss.params))

    def _values(self, stats: Tensor, own: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The sum of weighted losses, and those of the metrics."""
        losses = stats[:, 2]
        mass = torch.exp(stats[:, 3]) if self.mass is None else self.mass
        sums = [losses.sum(), mass.sum().to(torch.float32)]
        if self.loss.tells_empty:
            sums.append(stats[:, 5].sum())
        return (losses * own).sum() * self.loss.temperature**2, sums

    def _blocks(self) -> Iterator[slice]:
        count, listed = len(self.loss.student.index), self.teacher.listed is not None
        width = 2 * self.w.several + (self.loss.teacher.vocab_size if listed else 0)
        step = min(max(1, launch.SCRATCH // max(width, 1)), _MOST_ROWS)
        return (slice(start, min(start + step, count)) for start in range(0, count, step))

    def _compare(self, rows: slice, stats: Tensor) -> _Block:
        from xtoken.losses.kernels.device import p_kl as device

        loss, w, beta, block = self.loss, self.w, 1 / self.loss.temperature, launch.BLOCK
        z = Rows.of(self.source.logits, loss.student.index).part(rows.start, rows.stop)
        teacher = self.teacher.part(rows.start, rows.stop)
        count, size, columns = len(z), self.source.vocab_size, loss.teacher.vocab_size
        student, y = (z.tensor, z.offsets, z.step), teacher.logits
        said = (y.tensor, y.offsets, y.step, *teacher.patches)
        patches, tail = len(teacher.patches[0]), loss.tail_bucket
        few, whole = teacher.totals is not None, teacher.listed is None
        logs, apart = (floats(stats, count, max(w.several, 1)) for _ in range(2))
        bits, listed = self._kept(teacher, count), None
        bits_step = self._step(bits)
        for (wide, deep), first, last in (
            (_FEW_TILE, 0, w.few), (_MANY_TILE, w.few, w.several),
        ):  # fmt: skip
            if last > first:
                device.shared_columns[(cdiv(last - first, wide), count)](
                    *student, *said, w.columns, w.ptr, w.source, w.entry_log_w, bits, bits_step,
                    logs, apart, first, last, w.several, beta, ALL=self.every, LISTED=not whole,
                    PATCHES=patches, COLUMNS=wide, WIDTH=deep,
                )  # fmt: skip
        if teacher.listed is None:
            parts = cdiv(columns, launch.SPAN)
            partial = floats(stats, count, parts, 10)
            device.columns_of_logits[(parts, count)](
                *student, *said, w.code, w.log_w, logs, w.several, bits, bits_step, partial,
                columns, beta, ALL=self.every, TAIL=tail,
                FEW=few, PATCHES=patches, PARTS=parts, SPAN=launch.SPAN, BLOCK=block,
            )  # fmt: skip
        else:
            parts = 1
            listed, partial = self._listed(z, teacher.listed, logs, apart)
        tails, beside = partial, 0
        if tail or (loss.tells_empty and len(loss.empty_rows)):
            beside = cdiv(size, launch.SPAN)
            tails = floats(stats, count, beside, 6)
            device.student_sums[(beside, count)](
                *student, w.first, w.first_weight, w.more_ptr, w.more, w.more_weights, apart,
                w.several, bits, bits_step, tails, size, beta, ALL=self.every, PARTS=beside,
                SPAN=launch.SPAN, BLOCK=block,
            )  # fmt: skip
        most = _ALWAYS if loss.all_columns is None else loss.all_columns
        device.together[(count,)](
            partial, tails, partial if teacher.tail is None else teacher.tail,
            partial if teacher.totals is None else teacher.totals, stats, most,
            PARTS=parts, PADDED=padded(parts), TAILS=beside, TAILS_PADDED=padded(beside), TAIL=tail,
            LISTED=not whole, FEW=few,
        )  # fmt: skip
        return _Block(rows, z, teacher, stats, apart, bits, listed)

    def _listed(
        self, z: Rows, listed: tuple[Tensor, Tensor], logs: Tensor, apart: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of rows whose columns are listed: log q by column, and the parts; `apart` is filled."""
        from xtoken.losses.kernels.device.p_kl import columns_of_list

        loss, w, count = self.loss, self.w, len(z)
        columns = loss.teacher.vocab_size
        by_column, partial = floats(logs, count, columns), floats(logs, count, 1, 10)
        columns_of_list[(1, count)](
            z.tensor, z.offsets, z.step, *listed, listed[0].shape[1], w.code, w.log_w, logs,
            w.several, apart, by_column, partial, columns, 1 / loss.temperature,
            BLOCK=launch.BLOCK,
        )  # fmt: skip
        return by_column, partial

    def _write(self, block: _Block, seed: Tensor, gradient: GradientBuffer, checks: Tensor) -> None:
        """The gradient of a block; `seed`, `gradient` and `checks` are of all rows."""
        from xtoken.losses.kernels.device.p_kl import gradient as write

        loss, w, z, listed = self.loss, self.w, block.z, block.teacher.listed
        y, patches, by_column = block.teacher.logits, block.teacher.patches, block.listed
        if by_column is None:
            by_column = block.apart if listed is None else self._by_column(listed)
        width, to = gradient.flat.shape[1], gradient.part(block.rows.start, block.rows.stop)
        write[(cdiv(width, launch.BLOCK), len(z))](
            z.tensor, z.offsets, z.step, y.tensor, y.offsets, y.step, *patches, w.first,
            w.first_weight, w.more_ptr, w.more, w.more_weights, block.apart, w.several, block.bits,
            self._step(block.bits), by_column, by_column.shape[1], block.stats,
            (seed * loss.temperature)[block.rows], *to.cross_entropy, to.flat, to.rows,
            checks[block.rows], self.source.vocab_size, width, 1 / loss.temperature, ALL=self.every,
            LISTED=listed is not None, TAIL=loss.tail_bucket, PATCHES=len(patches[0]),
            JOINS=to.joined is not None, ADDS=to.adds, BLOCK=launch.BLOCK, num_warps=_WARPS,
        )  # fmt: skip

    def _by_column(self, listed: tuple[Tensor, Tensor]) -> Tensor:
        """[n, V_t + 1] the listed log-probabilities [n, k] at their columns."""
        ids, values = listed
        columns = self.loss.teacher.vocab_size
        # A pad may have the id of a listed column: it goes where nobody reads.
        ids = ids.to(torch.int64).masked_fill(torch.isneginf(values), columns)
        return floats(values, len(ids), columns + 1).scatter_(1, ids, values)

    def _step(self, bits: Tensor) -> int:
        """From a row's bits to the next; 0 where all rows have the same."""
        return 0 if len(bits) == 1 and self.bits is not None else bits.shape[1]

    def _kept(self, teacher: _Teacher, count: int) -> Tensor:
        """[n, words] int32, the kept columns of each row; [1, words] for all rows; a stand-in where
        every column is kept."""
        if self.bits is not None:
            return self.bits
        columns, like = self.loss.teacher.vocab_size, self.w.code
        words = cdiv(columns, 32)
        if self.every:
            return like.new_zeros((1, 1))
        if teacher.listed is not None:
            from xtoken.losses.kernels.device.p_kl import mark

            ids, values = teacher.listed
            bits = like.new_zeros((count, words))
            tiles = cdiv(ids.shape[1], launch.BLOCK)
            mark[(tiles, count)](ids, values, ids.shape[1], bits, words, BLOCK=launch.BLOCK)
            return bits
        from xtoken.losses.kernels.device.top_k import largest

        assert self.k is not None
        y, bits = teacher.logits, like.new_empty((count, words))
        # What a 16-bit float leaves of a float32's bits.
        passes = {torch.bfloat16: 2, torch.float16: 3}.get(y.tensor.dtype, 4)
        passes = 4 if len(teacher.patches[0]) else passes
        largest[(count,)](
            y.tensor, y.offsets, y.step, *teacher.patches, self.w.code, bits, columns, self.k,
            words, PASSES=passes, PATCHES=len(teacher.patches[0]), BLOCK=max(launch.BLOCK, 32),
        )  # fmt: skip
        return bits


def _padded_ids(columns: Tensor) -> Tensor:
    """Teacher ids by place; 0, which nobody reads, past the last."""
    return torch.nn.functional.pad(columns, (0, 1))


def _bits_of(columns: Tensor | None, size: int) -> Tensor:
    """[1, words] int32 with the bits of columns [K] set."""
    assert columns is not None
    words = cdiv(size, 32)
    mask = torch.zeros(words * 32, dtype=torch.int64, device=columns.device)
    mask.index_fill_(0, columns, 1)
    shift = torch.arange(32, device=columns.device)
    return (mask.view(words, 32) << shift).sum(1).to(torch.int32)[None]


def column_masses(teacher: TeacherRows) -> tuple[Tensor, Tensor] | None:
    """[V_t] the teacher's mass of each column over all rows, and [n] the log of each row's softmax
    denominator; None where torch computes them."""
    signal = teacher.signal
    if not isinstance(signal, Tensor) or teacher.where.owner is not None or not teacher.where.count:
        return None
    if not readable_rows(teacher) or not takes("p-kl", self_check.p_kl, signal):
        return None
    with on_device_of(signal):
        return _column_masses(teacher, signal, patched_columns(teacher))


def _column_masses(
    teacher: TeacherRows, signal: Tensor, patches: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    from xtoken.losses.kernels.device import top_k as device

    y, size, beta = (
        Rows.of(signal, teacher.where.index),
        teacher.vocab_size,
        1 / teacher.temperature,
    )
    count, parts, block = len(y), cdiv(size, launch.SPAN), launch.BLOCK
    rows = (y.tensor, y.offsets, y.step, *patches)
    partial, totals = floats(signal, count, parts, 2), floats(signal, count)
    device.row_parts[(count, parts)](
        *rows, partial, size, beta, PATCHES=len(patches[0]), PARTS=parts, SPAN=launch.SPAN,
        BLOCK=block,
    )  # fmt: skip
    device.row_totals[(count,)](partial, totals, PARTS=parts, PADDED=padded(parts))
    together = max(64, cdiv(count, _MOST_ROWS))
    mass = floats(signal, cdiv(count, together), size)
    device.column_mass[(cdiv(size, block), len(mass))](
        *rows, totals, mass, count, size, beta, PATCHES=len(patches[0]), ROWS=together, BLOCK=block
    )
    return mass.sum(0), totals
