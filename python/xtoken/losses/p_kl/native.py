"""P-KL's forward KL by the core on the CPU: a row in one pass, where torch takes twenty.

`closed_form.py` is the same in torch and what it is held to. A row whose columns need log space is
left to torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from xtoken import _core
from xtoken.losses.engine.row_blocks import run_rows
from xtoken.losses.engine.student_rows import LogitRows, StudentRows
from xtoken.tensors.host import readable
from xtoken.tensors.stop_fold import StopFold

if TYPE_CHECKING:
    from xtoken.losses.p_kl.block import PKLBlocks

_DTYPES = (torch.float32, torch.float64)


def native_pass(
    loss: PKLBlocks,
    source: StudentRows,
    scale: float | Tensor,
    needed: tuple[bool, ...],
    grads: list[Tensor | None] | None,
) -> tuple[Tensor, Tensor, list[Tensor | None]] | None:
    """`run_blocks` of all chunks; None where they are not for the core."""
    if not _suits(loss, source, needed):
        return None
    assert isinstance(source, LogitRows)
    logits, teacher = source.logits.detach(), loss.teacher.signal
    assert isinstance(teacher, Tensor)
    dtype = logits.dtype
    core = _core_of(loss, source.vocab_size, dtype)
    if core is None:
        return None
    weights = np.full(loss.student.count, loss.temperature**2)
    if loss.weights is not None:
        weights = weights * loss.weights.double().numpy()
    grad: Tensor | None = None
    if grads is not None:
        grad = grads[0]
    elif needed[0]:
        # numpy asks for large pages, whose first touch costs a fifth of the whole loss less.
        grad = torch.from_numpy(np.empty(logits.shape, _numpy(dtype)))
    good, losses, mass, empty, slope = core.run(
        _flat(logits), _flat(teacher.detach()), loss.student.index.numpy(),
        loss.teacher.where.index.numpy(), weights * float(scale),
        temperature=loss.temperature, top_k=loss.chunk_top_k,
        gradient=None if grad is None else _flat(grad), adds=grads is not None,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    if grads is None and grad is not None:  # what was not written is zeroed, and no row twice
        rest = np.ones(grad.shape[0] * grad.shape[1], np.bool_)
        rest[loss.student.index.numpy()[good]] = False
        _flat(grad)[rest] = 0.0
    metrics = [losses.sum(), mass.sum(), empty.sum(), slope.sum()]
    total = torch.tensor((losses * weights).sum(), dtype=dtype)
    sums = torch.tensor(metrics, dtype=dtype)
    found: list[Tensor | None] = [grad, *(None for _ in loss.params)]
    for chunk in np.flatnonzero(~good).tolist():
        slopes: list[Tensor] = []
        value, more = run_rows(
            loss, source, scale, 1, needed, (chunk, chunk + 1), found[:1], found[1:], slopes
        )
        total = total + value
        sums = sums + torch.cat([more, sum(slopes, more.new_zeros(()))[None]]).to(dtype)
    return total * scale, sums, found


def _suits(loss: PKLBlocks, source: StudentRows, needed: tuple[bool, ...]) -> bool:
    """Whether the core has a form of this loss: one row a chunk of full logits in memory on either
    side, a fixed W, no tail, and no metric that looks at each column."""
    teacher = loss.teacher
    return (
        isinstance(source, LogitRows)
        and isinstance(teacher.signal, Tensor)
        and readable(source.logits)
        and readable(teacher.signal)
        and source.logits.dtype in _DTYPES
        and teacher.signal.dtype == source.logits.dtype
        and source.logits.is_contiguous()
        and teacher.signal.is_contiguous()
        and loss.has_closed_form
        and not loss.tail_bucket
        and not loss.full_metrics
        and not any(needed[1:])
        and loss.student.owner is None
        and teacher.where.owner is None
        and teacher.left_out is None
        and (teacher.fold is None or isinstance(teacher.fold, StopFold))
        and loss.part.rows is None
        and loss.columns is None
        and loss.student.count > 0
    )


def _flat(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return tensor.view(-1, tensor.shape[-1]).numpy()


def _numpy(dtype: torch.dtype) -> str:
    return "float32" if dtype == torch.float32 else "float64"


def _core_of(loss: PKLBlocks, size: int, dtype: torch.dtype) -> _core.ForwardKL | None:
    """W for the core: made once, and kept with the slice of W that it is of. None where a stop that
    is folded into another is itself a column of W: the core would count it twice."""
    made, fold = loss.part.prepared, loss.teacher.fold
    pairs = fold.pairs if isinstance(fold, StopFold) else ()
    key = (dtype, size, loss.teacher.vocab_size, pairs)
    if key not in made:
        made[key] = _make(loss, size, pairs, dtype)
    found = made[key]
    assert found is None or isinstance(found, _core.ForwardKL)
    return found


def _make(
    loss: PKLBlocks, size: int, pairs: tuple[tuple[int, int], ...], dtype: torch.dtype
) -> _core.ForwardKL | None:
    part, width = loss.part, loss.teacher.vocab_size
    columns = torch.arange(width) if part.columns is None else part.columns
    places = {column: at for at, column in enumerate(columns.tolist())} if pairs else {}
    if any(source in places for source, _ in pairs):
        return None
    return _core.ForwardKL(
        part.map.inputs.numpy(),
        part.map.output_ptr.numpy(),
        loss.params[0].detach().double().numpy(),
        rows=None,
        columns=columns.numpy(),
        folds=[(source, places[target]) for source, target in pairs if target in places],
        empty=loss.empty_rows.numpy(),
        sizes=(size, width),
        single=dtype == torch.float32,
    )
