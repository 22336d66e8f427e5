"""P-KL's forward KL by the core on the CPU: a row in one pass, where torch takes twenty.

`closed_form.py` is the same in torch and what it is held to. A row whose columns need log space is
left to torch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken import _core
from xtoken.losses.engine.native_rows import flat, gradient_of, suits, zero_others
from xtoken.losses.engine.row_blocks import run_rows
from xtoken.losses.engine.student_rows import LogitRows, StudentRows
from xtoken.tensors.cells import CellFold
from xtoken.tensors.host import readable
from xtoken.tensors.projection import SparseProjection
from xtoken.tensors.rows import upcast
from xtoken.tensors.stop_fold import StopFold
from xtoken.tensors.teacher_signal import TeacherTopK

if TYPE_CHECKING:
    from xtoken.losses.engine.run import LossCall
    from xtoken.losses.engine.teacher_rows import TeacherRows
    from xtoken.losses.p_kl.block import PKLBlocks

# Of each row: whether it was computed, loss, teacher mass, mass on empty rows of W, sum of the
# gradient, log of the teacher's softmax denominator.
_Answer = tuple[
    NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64],
    NDArray[np.float64], NDArray[np.float64],
]  # fmt: skip
_Floats = NDArray[np.float64]
# Of the logits, the seeds of the gradient, the gradient and whether it is added to.
_Run = Callable[[_Floats, _Floats, _Floats | None, bool], _Answer]
_Core = TypeVar("_Core")
# Beside W and not in it, as what is of the core cannot be copied or pickled.
_made: weakref.WeakKeyDictionary[SparseProjection, dict[object, tuple[object, Any]]]
_made = weakref.WeakKeyDictionary()


class NativePass(NamedTuple):
    """What `run_blocks` gives, and the log of each chunk's teacher's denominator, NaN of those that
    are not known."""

    total: Tensor
    sums: Tensor
    grads: list[Tensor | None]
    log_totals: _Floats


def native_pass(
    loss: PKLBlocks,
    source: StudentRows,
    scale: float | Tensor,
    needed: tuple[bool, ...],
    grads: list[Tensor | None] | None,
) -> tuple[Tensor, Tensor, list[Tensor | None]] | None:
    """`run_blocks` of all chunks; None where they are not for the core."""
    found = native_rows(loss, source, scale, needed, grads)
    return None if found is None else found[:3]


def native_rows(
    loss: PKLBlocks,
    source: StudentRows,
    scale: float | Tensor,
    needed: tuple[bool, ...],
    grads: list[Tensor | None] | None,
) -> NativePass | None:
    """The same with what was found of the teacher."""
    if not isinstance(source, LogitRows) or not _suits(loss, source, needed):
        return None
    stored = isinstance(loss.teacher.signal, TeacherTopK)
    run = _of_stored(loss, source) if stored else _of_logits(loss, source)
    return None if run is None else _pass(loss, source, scale, needed, grads, run)


def _suits(loss: PKLBlocks, source: LogitRows, needed: tuple[bool, ...]) -> bool:
    """Whether the core has a form of this loss: one row a chunk in memory on either side, a fixed
    W, and no metric that looks at each column."""
    return (
        suits(source.logits)
        and loss.has_closed_form
        and not loss.full_metrics
        and loss.projection.free is None
        and not any(needed[1:])
        and loss.student.owner is None
        and loss.teacher.where.owner is None
        and loss.teacher.left_out is None
        and loss.student.count > 0
    )


def takes_stored(call: LossCall, projection: SparseProjection, rows: TeacherRows) -> bool:
    """Whether stored predictions are likely to be for the core, which needs no part of W made of
    the columns that a batch names. Where they are not after all, torch reads all of W."""
    options, source = call.options, call.source
    return (
        isinstance(source, LogitRows)
        and isinstance(rows.signal, TeacherTopK)
        and options.backend is None
        and options.direction == "forward"
        and options.top_k_by == "teacher"
        and not options.full_metrics
        and projection.free is None
        and rows.left_out is None
        and readable(source.logits)
        and source.logits.dtype == upcast(rows.signal.log_probs[:0]).dtype
        and source.logits.is_contiguous()
    )


def _of_logits(loss: PKLBlocks, source: LogitRows) -> _Run | None:
    """Of full logits: over all columns, those of a batch, or those that each chunk's teacher
    chooses; no tail."""
    teacher = loss.teacher
    signal = teacher.signal
    if (
        not isinstance(signal, Tensor)
        or not readable(signal)
        or signal.dtype != source.logits.dtype
        or not signal.is_contiguous()
        or loss.tail_bucket
        or not (teacher.fold is None or isinstance(teacher.fold, StopFold))
    ):
        return None
    narrow = loss.part.rows is not None
    if narrow and teacher.log_totals is None:
        return None  # what a row holds beside the batch's columns
    size, single = source.vocab_size, source.logits.dtype == torch.float32
    core = _make(loss, size, single) if narrow else _core_of(loss, source, _make)
    if core is None:
        return None
    rows = loss.student.index.numpy(), teacher.where.index.numpy()
    totals = None
    if narrow:
        assert teacher.log_totals is not None
        totals = teacher.log_totals.double().numpy()
    return lambda student, seeds, gradient, adds: core.run(
        student, flat(signal.detach()), *rows, seeds, temperature=loss.temperature,
        top_k=loss.chunk_top_k, gradient=gradient, adds=adds, threads=torch.get_num_threads(),
        log_totals=totals, whole=bool(loss.tells_empty),
    )  # fmt: skip


def _of_stored(loss: PKLBlocks, source: LogitRows) -> _Run | None:
    """Of a stored top-k, over what each chunk stores, with a tail or without."""
    teacher = loss.teacher
    signal = teacher.signal
    assert isinstance(signal, TeacherTopK)
    log_probs = upcast(signal.log_probs.detach())
    if (
        not readable(signal.ids)
        or not readable(log_probs)
        or log_probs.dtype != source.logits.dtype
        or not log_probs.is_contiguous()
        or not signal.ids.is_contiguous()
        or loss.chunk_top_k is None
    ):
        return None
    core = _core_of(loss, source, _make_stored)
    if core is None:
        return None
    rows = loss.student.index.numpy(), teacher.where.index.numpy()
    ids, logs = signal.ids.view(-1, signal.ids.shape[-1]).numpy(), flat(log_probs)
    least = torch.finfo(log_probs.dtype).eps
    return lambda student, seeds, gradient, adds: core.run(
        student, ids, logs, *rows, seeds, temperature=loss.temperature,
        factor=1.0 / teacher.stored_power, top_k=min(loss.chunk_top_k or 0, signal.ids.shape[-1]),
        tail=(least, loss.all_columns) if loss.tail_bucket else None, whole=bool(loss.tells_empty),
        gradient=gradient, adds=adds, threads=torch.get_num_threads(),
    )  # fmt: skip


def _pass(
    loss: PKLBlocks,
    source: LogitRows,
    scale: float | Tensor,
    needed: tuple[bool, ...],
    grads: list[Tensor | None] | None,
    run: _Run,
) -> NativePass:
    """All rows by the core, and by torch those that it leaves."""
    logits = source.logits.detach()
    dtype = logits.dtype
    weights = np.full(loss.student.count, loss.temperature**2)
    if loss.weights is not None:
        weights = weights * loss.weights.double().numpy()
    grad = gradient_of(logits, needed, grads)
    good, losses, mass, empty, slope, log_totals = run(
        flat(logits), weights * float(scale), None if grad is None else flat(grad),
        grads is not None,
    )  # fmt: skip
    if grads is None and grad is not None:
        zero_others(grad, loss.student.index.numpy()[good])
    metrics = [losses.sum(), mass.sum(), *([empty.sum()] if loss.tells_empty else [])]
    total = torch.tensor((losses * weights).sum(), dtype=dtype, device="cpu")
    sums = torch.tensor([*metrics, slope.sum()], dtype=dtype, device="cpu")
    found: list[Tensor | None] = [grad, *(None for _ in loss.params)]
    left = loss if good.all() else loss.in_torch()
    for chunk in np.flatnonzero(~good).tolist():
        slopes: list[Tensor] = []
        value, more = run_rows(
            left, source, scale, 1, needed, (chunk, chunk + 1), found[:1], found[1:], slopes
        )
        total = total + value
        sums = sums + torch.cat([more, sum(slopes, more.new_zeros(()))[None]]).to(dtype)
    return NativePass(total * scale, sums, found, log_totals)


def _core_of(
    loss: PKLBlocks, source: LogitRows, make: Callable[[PKLBlocks, int, bool], _Core | None]
) -> _Core | None:
    """W for the core; made once, and again where its weights moved or changed."""
    weights, fold = loss.projection.weights, loss.teacher.fold
    stops = fold.pairs if isinstance(fold, StopFold) else fold
    single = source.logits.dtype == torch.float32
    key = (make, single, source.vocab_size, loss.teacher.vocab_size, stops)
    state = (weights.data_ptr(), weights._version)
    made = _made.setdefault(loss.projection, {})
    if key not in made or made[key][0] != state:
        made[key] = (state, make(loss, source.vocab_size, single))
    found: _Core | None = made[key][1]
    return found


def _make(loss: PKLBlocks, size: int, single: bool) -> _core.ForwardKL | None:
    """None where a stop that is folded into another is itself a column of W: the core would count
    it twice."""
    part, width, fold = loss.part, loss.teacher.vocab_size, loss.teacher.fold
    pairs = fold.pairs if isinstance(fold, StopFold) else ()
    columns = torch.arange(width, device="cpu") if part.columns is None else part.columns
    places = {column: at for at, column in enumerate(columns.tolist())} if pairs else {}
    if any(source in places for source, _ in pairs):
        return None
    rows = part.rows
    return _core.ForwardKL(
        part.map.inputs.numpy(),
        part.map.output_ptr.numpy(),
        loss.params[0].detach().double().numpy(),
        rows=None if rows is None else rows.numpy(),
        columns=columns.numpy(),
        folds=[(source, places[target]) for source, target in pairs if target in places],
        empty=loss.empty_rows.numpy(),
        sizes=(size, width),
        single=single,
        alone=rows is not None,
    )


def _make_stored(loss: PKLBlocks, size: int, single: bool) -> _core.StoredForwardKL:
    """On all columns of W, whatever a batch names of them."""
    projection, fold = loss.projection, loss.teacher.fold
    full, width = projection.full(), loss.teacher.vocab_size
    column_of = torch.arange(width, device="cpu")
    if isinstance(fold, CellFold):
        column_of = fold.column_of[:width]
    elif isinstance(fold, StopFold):
        for source, target in fold.pairs:
            column_of[column_of == source] = target
    places = projection.column_of[column_of]
    places = torch.where(places < len(projection.supported_ids), places, -1)
    return _core.StoredForwardKL(
        full.map.inputs.numpy(),
        full.map.output_ptr.numpy(),
        full.weights_of(projection.values()).detach().double().numpy(),
        places=places.numpy(),
        empty=projection.empty_ids.numpy(),
        size=size,
        single=single,
    )
