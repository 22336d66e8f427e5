"""What a loss takes as its student: logits, an lm_head, or a shard of logits."""

from __future__ import annotations

from torch import Tensor

from xtoken._checks import expect
from xtoken.errors import ShapeError
from xtoken.losses.engine.lm_head import LmHeadRows
from xtoken.losses.engine.shared_gradient import SharedGradient, SharedLogits
from xtoken.losses.engine.student_rows import LogitRows, StudentRows
from xtoken.losses.engine.vocab_shard import ShardRows, VocabShard
from xtoken.tensors.lm_head import LmHead, check_floats

Student = Tensor | LmHead | VocabShard | SharedLogits


def check_student(student: Student) -> None:
    """Raise ArgumentTypeError unless it is one of these classes."""
    expect(
        student, (Tensor, LmHead, VocabShard, SharedLogits), "student",
        "pass the model's logits [B, T_s, V_s'], or LmHead(hidden, weight)",
    )  # fmt: skip


def student_rows(student: Student, vocab_size: int | None) -> StudentRows:
    """The source behind what the caller passed as `student_logits`.

    A DTensor sharded on its last axis counts as a `VocabShard` over that axis's group; it needs
    torch 2.5.

    Raises:
        ShapeError: not [B, T_s, V_s'] or fewer columns than `vocab_size`.
    """
    check_student(student)
    if isinstance(student, LmHead):
        size = _checked_size(student.weight.shape[0], vocab_size, "the lm_head's weight")
        return LmHeadRows(student, size)
    if isinstance(student, Tensor) and hasattr(student, "device_mesh"):
        student = _shard_of(student)
    if isinstance(student, VocabShard):
        if student.logits.dim() != 3:
            raise ShapeError(
                f"the shard has shape {tuple(student.logits.shape)}, expected [B, T_s, V_r]"
            )
        shard = ShardRows.build(student, vocab_size)
        _checked_size(sum(shard.sizes), vocab_size, "the shards together")
        return shard
    shared: SharedGradient | None = None
    if isinstance(student, SharedLogits):
        shared = student.gradient
        student = student.logits
    check_floats("student_logits", student, "pass the model's logits [B, T_s, V_s']")
    if student.dim() != 3:
        raise ShapeError(
            f"student_logits is {student.dtype} {tuple(student.shape)}, "
            "expected float [B, T_s, V_s]"
        )
    size = _checked_size(student.shape[2], vocab_size, "student_logits")
    return LogitRows(student, size, shared)


def _shard_of(student: Tensor) -> VocabShard | Tensor:
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(student, DTensor)
    last = student.dim() - 1
    cut = [
        axis
        for axis, placement in enumerate(student.placements)
        if isinstance(placement, Shard) and placement.dim in (last, -1)
    ]
    others = [p for i, p in enumerate(student.placements) if i not in cut and not p.is_replicate()]
    if others or len(cut) > 1:
        raise ShapeError(
            f"student_logits is placed {student.placements}; expected one Shard({last}) and else "
            "Replicate(); redistribute it first"
        )
    local = student.to_local()
    if not cut:
        return local
    return VocabShard(local, student.device_mesh.get_group(cut[0]))


def _checked_size(found: int, vocab_size: int | None, name: str) -> int:
    if vocab_size is not None and found < vocab_size:
        raise ShapeError(
            f"{name} has {found} columns, fewer than the student vocabulary of {vocab_size}; "
            "pass the student whose tokenizer this is"
        )
    return found if vocab_size is None else vocab_size
