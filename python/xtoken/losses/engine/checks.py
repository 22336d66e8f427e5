"""The checks that all losses share: what does not fit is refused, with the place and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor

from xtoken.losses.engine.merge import Merge, chunk_rows
from xtoken.losses.engine.student_rows import StudentRows
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.teacher_signal import Teacher, TeacherTopK, teacher_positions


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless the temperature is above 0."""
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature} must be above 0")


def check_batch(
    source: StudentRows,
    teacher: Teacher,
    chunks: ChunkBatch,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
) -> None:
    """Raise ValueError where chunks, ids, logits and teacher are not of one batch."""
    sides = (
        ("student", source.positions, student_ids),
        ("teacher", teacher_positions(teacher), teacher_ids),
    )
    for side, positions, ids in sides:
        if ids is not None and tuple(ids.shape) != positions:
            raise ValueError(
                f"{side}_ids has shape {tuple(ids.shape)}, expected {positions} like the {side} "
                "logits; pass the ids the model was run on"
            )
    device = source.tensors()[0].device
    if chunks.device != device:
        raise ValueError(
            f"chunks are on {chunks.device}, the student on {device}; "
            f"pass chunks.to({str(device)!r})"
        )
    if sides[0][1][0] != sides[1][1][0]:
        raise ValueError(
            f"the student has {sides[0][1][0]} samples, the teacher {sides[1][1][0]}; "
            "pass both models' outputs of one batch"
        )
    if torch.compiler.is_compiling():  # the rest looks at data
        return
    chunks.check_within(sides[0][1], sides[1][1])
    for side in ("student", "teacher"):
        start, end = getattr(chunks, f"{side}_start"), getattr(chunks, f"{side}_end")
        if bool(((start < 1) | (end <= start)).any()):
            raise ValueError(
                f"a chunk has no predictor or no token on the {side} side; "
                "pass chunks.usable(student_mask, teacher_mask)"
            )


def check_token_ids(ids: Tensor, size: int, side: str) -> None:
    """Raise ValueError where a counted id is outside [0, size); `ids` [n] are the counted ones."""
    if torch.compiler.is_compiling() or ids.numel() == 0:
        return
    bad = ((ids < 0) | (ids >= size)).nonzero().flatten()
    if bad.numel():
        raise ValueError(
            f"{side}_ids holds {int(ids[bad[0]])}, outside the {side} vocabulary (V = {size}); "
            "pass the tokenizer that made these ids"
        )


def check_finite(
    total: Tensor, source: StudentRows, teacher: Teacher, chunks: ChunkBatch, merge: Merge | None
) -> None:
    """Raise ValueError where a loss is NaN or infinite because a logit is.

    Looks at the logits only where the loss is not finite. An infinite loss from finite logits, or
    from logits of -inf (no mass), is a true infinite divergence and stands.
    """
    if torch.compiler.is_compiling() or bool(torch.isfinite(total.detach())):
        return
    with torch.no_grad():
        where = chunk_rows(chunks, "student", source.positions[1], merge)
        for index in torch.split(where.index, 64):
            _refuse(source.rows(index), index, source.positions[1], "student_logits")
        length = teacher_positions(teacher)[1]
        values = teacher.log_probs if isinstance(teacher, TeacherTopK) else teacher
        flat = values.flatten(0, 1)
        where = chunk_rows(chunks, "teacher", length, merge)
        for index in torch.split(where.index, 64):
            _refuse(flat.index_select(0, index), index, length, "teacher")
    if bool(torch.isnan(total.detach())):
        raise ValueError(
            "the loss is NaN though no logit is NaN or +inf: some row has no mass at all "
            "(-inf in every column that counts); look at what masks the logits"
        )


def _refuse(rows: Tensor, index: Tensor, length: int, name: str) -> None:
    bad = (torch.isnan(rows) | torch.isposinf(rows)).nonzero()
    if bad.numel():
        row, column = int(bad[0, 0]), int(bad[0, 1])
        position = int(index[row])
        raise ValueError(
            f"{name}[{position // length}, {position % length}, {column}] = "
            f"{float(rows[row, column])}, expected a finite logit or -inf; "
            "the model diverged or overflowed before the loss"
        )
