"""Input checks shared by all losses."""

from __future__ import annotations

import torch
from torch import Tensor

from xtoken.errors import NonFiniteError, OptionError, ShapeError, TokenIdError
from xtoken.losses.engine.merge import chunk_rows
from xtoken.losses.engine.student_rows import StudentRows
from xtoken.losses.inputs import LossInputs
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
    if torch.compiler.is_compiling():  # the rest looks at data
        return
    chunks.check_within(positions["student"], positions["teacher"])
    for side in ("student", "teacher"):
        start, end = getattr(chunks, f"{side}_start"), getattr(chunks, f"{side}_end")
        if bool(((start < 1) | (end <= start) | ~chunks.has_predictor).any()):
            raise ShapeError(
                f"a chunk has no predictor or no token on the {side} side; "
                "pass chunks.usable(student_mask, teacher_mask)"
            )


def check_token_ids(ids: Tensor, size: int, side: str) -> None:
    """Raise TokenIdError where a counted id is outside [0, size); `ids` [n] are those counted."""
    if torch.compiler.is_compiling() or ids.numel() == 0:
        return
    bad = ((ids < 0) | (ids >= size)).nonzero().flatten()
    if bad.numel():
        raise TokenIdError(
            f"{side}_ids holds {int(ids[bad[0]])}, outside the {side} vocabulary (V = {size}); "
            "pass the tokenizer that made these ids"
        )


def check_finite(total: Tensor, slope: Tensor, source: StudentRows, inputs: LossInputs) -> None:
    """Raise NonFiniteError where a loss or its gradient is NaN or infinite because a logit is.

    Looks at the logits only where one of them is not finite. An infinite loss from finite logits,
    or from logits of -inf (no mass), is a true infinite divergence and stands.

    Args:
        slope: scalar, finite where all of the gradient is.
    """
    if torch.compiler.is_compiling():
        return
    value = total.detach()
    good = torch.isfinite(value) & torch.isfinite(slope)
    normalizer = inputs.normalizer
    if isinstance(normalizer, Tensor) and normalizer.device.type != "cpu":
        good = good & (normalizer.detach().reshape(()) > 0)  # not looked at before
    if bool(good):
        return
    if isinstance(normalizer, Tensor) and not float(normalizer) > 0:
        raise OptionError(f"normalizer = {float(normalizer)} must be above 0: a number of chunks")
    with torch.no_grad():
        where = chunk_rows(inputs.chunks, "student", source.positions[1], None)
        for index in torch.split(where.index, 64):
            _refuse(source.rows(index), index, source.positions[1], "student_logits")
        teacher = inputs.teacher
        length = teacher_positions(teacher)[1]
        values = teacher.log_probs if isinstance(teacher, TeacherTopK) else teacher
        flat = values.flatten(0, 1)
        where = chunk_rows(inputs.chunks, "teacher", length, None)
        for index in torch.split(where.index, 64):
            _refuse(flat.index_select(0, index), index, length, "teacher")
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
