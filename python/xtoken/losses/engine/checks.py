"""Input checks shared by all losses."""

from __future__ import annotations

import torch
from torch import Tensor

from xtoken.errors import NonFiniteError, ShapeError, TokenIdError
from xtoken.losses.engine.merge import ChunkRows
from xtoken.losses.engine.student_rows import StudentRows
from xtoken.losses.inputs import LossInputs
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.full_logits import FullLogits
from xtoken.tensors.host import readable
from xtoken.tensors.teacher_signal import TeacherTopK, teacher_positions


def check_batch(source: StudentRows, inputs: LossInputs) -> None:
    """Raise ShapeError where chunks, ids, logits and teacher are not of one batch."""
    chunks = inputs.chunks
    positions = {"student": source.positions, "teacher": teacher_positions(inputs.teacher)}
    for side, ids in (("student", inputs.student_ids), ("teacher", inputs.teacher_ids)):
        if ids is not None and tuple(ids.shape) != positions[side]:
            raise ShapeError(
                f"{side}_ids has shape {tuple(ids.shape)}, expected {positions[side]} like the "
                f"{side} logits; pass the ids the model was run on"
            )
    device = source.tensors()[0].device
    if chunks.device != device:
        raise ShapeError(
            f"chunks are on {chunks.device}, the student on {device}; "
            f"pass chunks.to({str(device)!r})"
        )
    student_samples, teacher_samples = positions["student"][0], positions["teacher"][0]
    if student_samples != teacher_samples:
        raise ShapeError(
            f"the student has {student_samples} samples, the teacher {teacher_samples}; "
            "pass both models' outputs of one batch"
        )
    chunks.check_within(positions["student"], positions["teacher"])
    if not chunks.host.predicted:
        raise ShapeError(
            "a chunk has no predictor or no token on a side; "
            "pass chunks.usable(student_mask, teacher_mask)"
        )


def check_token_ids(ids: Tensor, size: int, side: str) -> None:
    """Raise TokenIdError where a counted id is outside [0, size); `ids` [n] are those counted.

    On the CPU; elsewhere what is read there is NaN (see `inside`), and the step's check tells.
    """
    if not readable(ids) or ids.numel() == 0:
        return
    bad = ((ids < 0) | (ids >= size)).nonzero().flatten()
    if bad.numel():
        raise TokenIdError(
            f"{side}_ids holds {int(ids[bad[0]])}, outside the {side} vocabulary (V = {size}); "
            "pass the tokenizer that made these ids"
        )


def inside(ids: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """Ids that can be read with, and those [n] bool that were outside [0, size); None on the CPU,
    where `check_token_ids` has looked."""
    if readable(ids):
        return ids, None
    return ids.clamp(0, size - 1), (ids < 0) | (ids >= size)


def zero_or_nan(rows: Tensor) -> Tensor:
    """[R, n] to [R]: 0, and NaN where a row holds NaN or +inf; no gradient. What a loss adds for
    rows that it does not compare, so that a broken model is told there too."""
    top = rows.detach().amax(1)
    top = top.masked_fill(torch.isneginf(top), 0.0)
    return top - top


def finite_or_nan(total: Tensor, slope: Tensor) -> Tensor:
    """The loss; on a device NaN where its gradient is not finite, as nobody looks at that."""
    if readable(total.detach()):
        return total
    return total + torch.where(torch.isfinite(slope), 0.0, torch.nan).to(total.dtype)


def check_finite(total: Tensor, slope: Tensor, source: StudentRows, inputs: LossInputs) -> Tensor:
    """Raise NonFiniteError where a loss or its gradient is NaN or infinite because a logit is.

    Looks at the logits only where one of them is not finite. An infinite loss from finite logits,
    or from logits of -inf (no mass), is a true infinite divergence; it stands where its gradient
    is finite.

    Args:
        slope: scalar, finite where all of the gradient is.

    Returns: the loss. On a device nobody looks, and it is NaN instead of a finite number where its
        gradient is none: whoever reads the loss anyway sees it.
    """
    value = total.detach()
    if not readable(value):
        return finite_or_nan(total, slope)
    good = torch.isfinite(value) & torch.isfinite(slope)
    if bool(good):
        return total
    with torch.no_grad():
        length = source.positions[1]
        for index in torch.split(_rows_of(inputs.chunks, "student", length), 64):
            _refuse(source.rows(index), index, length, "student_logits")
        teacher = inputs.teacher
        length = teacher_positions(teacher)[1]
        values = teacher.log_probs if isinstance(teacher, TeacherTopK) else teacher
        full = FullLogits.of(values, None)
        for index in torch.split(_rows_of(inputs.chunks, "teacher", length), 64):
            _refuse(full.rows(index), index, length, "teacher")
    if bool(torch.isnan(value)):
        raise NonFiniteError(
            "the loss is NaN though no logit is NaN or +inf: some row has no mass at all "
            "(-inf in every column that counts); look at what masks the logits"
        )
    if bool(torch.isfinite(value)):
        raise NonFiniteError(
            f"the loss is {float(value):.6g} but its gradient is not finite, though no logit is "
            "NaN or +inf; lower the scale of the logits, or report this as a bug"
        )
    if not bool(torch.isfinite(slope)):
        raise NonFiniteError(
            f"the loss is {float(value):.6g} and its gradient is not finite, though no logit is "
            "NaN or +inf: one side has mass where the other has none; look at what masks the "
            "logits, or pass direction='forward' or 'jsd'"
        )
    return total


def _rows_of(chunks: ChunkBatch, side: str, length: int) -> Tensor:
    """[n] the rows that predict a chunk's tokens, and the one behind it, which a prefix of all of
    them reads."""
    host = chunks.host
    first, last = host.range_of(side)
    rows = ChunkRows.ragged(host.sample * length + first - 1, last - first + 1, chunks.device)
    return rows.index


def _refuse(rows: Tensor, index: Tensor, length: int, name: str) -> None:
    bad = (torch.isnan(rows) | torch.isposinf(rows)).nonzero()
    if bad.numel():
        row, column = int(bad[0, 0]), int(bad[0, 1])
        position = int(index[row])
        raise NonFiniteError(
            f"{name}[{position // length}, {position % length}, {column}] = "
            f"{float(rows[row, column])}, expected a finite logit or -inf; "
            "the model diverged or overflowed before the loss"
        )
