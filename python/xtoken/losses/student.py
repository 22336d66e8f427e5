"""Where the student's rows come from: logits, a hidden state and its lm_head, or a shard.

A source hands out rows of logits for a block of predictor positions and takes back their gradient.
The losses see only rows, so each of them works from each source.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class StudentRows(Protocol):
    """A source of student logits, by row of the flattened [B * T_s] positions."""

    @property
    def positions(self) -> tuple[int, int]:
        """(B, T_s)."""

    @property
    def vocab_size(self) -> int:
        """Columns that `rows` returns."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The differentiable tensors behind the rows, in a fixed order."""

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> StudentRows:
        """The same source on other tensors."""

    def rows_at_once(self, width: int) -> int:
        """How many rows of `width` columns it pays to make together; 1 where it does not."""

    def rows(self, index: Tensor, columns: Tensor | None = None) -> Tensor:
        """[n, V_s], or [n, K] at `columns` [K]; float32 or float64, differentiable."""

    def new_grads(self, needed: tuple[bool, ...]) -> list[Tensor | None]:
        """Zeros for the gradient of each tensor, None where none is needed."""

    def add_grads(
        self, grads: list[Tensor | None], index: Tensor, columns: Tensor | None, grad: Tensor
    ) -> None:
        """Add to `grads` what `grad`, the gradient of `rows(index, columns)`, means for them."""


def upcast(rows: Tensor) -> Tensor:
    """float32 for half precision, else unchanged: the maths of a loss never runs in 16 bits."""
    return rows if rows.dtype == torch.float64 else rows.to(torch.float32)


# Chosen columns of an lm_head copied at a time: 8 MB of float32 weights at 2,048 features.
_TILE = 1024


@dataclass(frozen=True, eq=False)
class LogitRows:
    """Rows of logits [B, T_s, V_s'], of which the first `vocab_size` columns count."""

    logits: Tensor
    vocab_size: int

    @property
    def positions(self) -> tuple[int, int]:
        return self.logits.shape[0], self.logits.shape[1]

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.logits,)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> LogitRows:
        return replace(self, logits=tensors[0])

    def rows_at_once(self, width: int) -> int:
        return 1

    def rows(self, index: Tensor, columns: Tensor | None = None) -> Tensor:
        flat = self.logits.flatten(0, 1)[:, : self.vocab_size].index_select(0, index)
        return upcast(flat if columns is None else flat.index_select(1, columns))

    def new_grads(self, needed: tuple[bool, ...]) -> list[Tensor | None]:
        return [torch.zeros_like(self.logits, memory_format=torch.contiguous_format)]

    def add_grads(
        self, grads: list[Tensor | None], index: Tensor, columns: Tensor | None, grad: Tensor
    ) -> None:
        assert grads[0] is not None
        flat = grads[0].view(-1, grads[0].shape[-1])
        if columns is None:
            flat[:, : self.vocab_size].index_add_(0, index, grad.to(flat.dtype))
        else:  # a loss may read a row in one block only, so a plain write is enough
            flat[index[:, None], columns] = grad.to(flat.dtype)


@dataclass(frozen=True, eq=False)
class LmHead:
    """Hidden states and the lm_head that would turn them into logits: the fused losses' input.

    logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap), made a block of rows at a
    time and never kept. Pass it wherever a loss takes `student_logits`.

    Attributes:
        hidden: [B, T_s, H] float, the last hidden states, after the final norm.
        weight: [V_s', H] float.
        bias: [V_s'] float or None.
        scale: factor on the logits (Cohere's logit_scale; 1 / Granite's logits_scaling).
        softcap: Gemma-2's final_logit_softcapping, > 0, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.hidden.dim() != 3 or self.weight.dim() != 2:
            raise ValueError(
                f"hidden {tuple(self.hidden.shape)} and weight {tuple(self.weight.shape)}: "
                "expected [B, T_s, H] and [V_s, H]"
            )
        if self.hidden.shape[2] != self.weight.shape[1]:
            raise ValueError(
                f"hidden has {self.hidden.shape[2]} features, weight {self.weight.shape[1]}; "
                "pass the lm_head of the model that made the hidden states"
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"bias has shape {tuple(self.bias.shape)}, expected ({self.weight.shape[0]},)"
            )
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap = {self.softcap} must be above 0, or None for no cap")


@dataclass(frozen=True, eq=False)
class LmHeadRows:
    """Rows of logits made from an `LmHead` on demand."""

    head: LmHead
    vocab_size: int

    @property
    def positions(self) -> tuple[int, int]:
        return self.head.hidden.shape[0], self.head.hidden.shape[1]

    def tensors(self) -> tuple[Tensor, ...]:
        head = self.head
        return (head.hidden, head.weight) + (() if head.bias is None else (head.bias,))

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> LmHeadRows:
        bias = tensors[2] if len(tensors) == 3 else None
        return replace(
            self, head=replace(self.head, hidden=tensors[0], weight=tensors[1], bias=bias)
        )

    def rows_at_once(self, width: int) -> int:
        # The whole weight, and the gradient it gets, are read once for these rows.
        numbers = 2**23 if self.head.hidden.device.type == "cpu" else 2**26
        return max(1, numbers // max(width, 1))

    def _tiles(self, columns: Tensor | None) -> list[Tensor | slice]:
        """Columns of the lm_head that are worked on together: a chosen column's weights are
        copied, and the copy is kept small; all of them are used in place."""
        if columns is None:
            return [slice(0, self.vocab_size)]
        return list(torch.split(columns, _TILE))

    def rows(self, index: Tensor, columns: Tensor | None = None) -> Tensor:
        head = self.head
        hidden = head.hidden.flatten(0, 1).index_select(0, index)
        parts = [
            torch.nn.functional.linear(
                hidden,
                head.weight[tile].to(hidden.dtype),
                None if head.bias is None else head.bias[tile].to(hidden.dtype),
            )
            for tile in self._tiles(columns)
        ]
        raw = upcast(parts[0] if len(parts) == 1 else torch.cat(parts, 1))
        if head.scale != 1.0:
            raw = raw * head.scale
        return raw if head.softcap is None else head.softcap * torch.tanh(raw / head.softcap)

    def new_grads(self, needed: tuple[bool, ...]) -> list[Tensor | None]:
        return [
            torch.zeros_like(tensor) if need else None
            for tensor, need in zip(self.tensors(), needed, strict=True)
        ]

    def add_grads(
        self, grads: list[Tensor | None], index: Tensor, columns: Tensor | None, grad: Tensor
    ) -> None:
        head = self.head
        if head.softcap is not None:  # d/dx cap * tanh(x / cap) = 1 - (y / cap)^2
            logits = self.rows(index, columns)
            grad = grad * (1.0 - (logits / head.softcap).square())
        if head.scale != 1.0:
            grad = grad * head.scale
        hidden = head.hidden.flatten(0, 1).index_select(0, index)
        grad = grad.to(hidden.dtype)
        grad_hidden, grad_weight = grads[0], grads[1]
        grad_bias = grads[2] if len(grads) == 3 else None
        done = 0
        for tile in self._tiles(columns):
            weight = head.weight[tile]
            part = grad[:, done : done + len(weight)]
            done += len(weight)
            if grad_hidden is not None:
                flat = grad_hidden.view(-1, grad_hidden.shape[-1])
                flat.index_add_(0, index, (part @ weight.to(part.dtype)).to(flat.dtype))
            if grad_weight is not None:
                _add_product(grad_weight, tile, part.t(), hidden)
            if grad_bias is not None:
                grad_bias[tile] += part.sum(0).to(grad_bias.dtype)


def _add_product(target: Tensor, tile: Tensor | slice, left: Tensor, right: Tensor) -> None:
    """target[tile] += left @ right, in place."""
    if isinstance(tile, slice):
        target[tile].addmm_(left.to(target.dtype), right.to(target.dtype))
    else:
        target.index_add_(0, tile, (left @ right).to(target.dtype))


@dataclass(frozen=True, eq=False)
class VocabShard:
    """Logits of which this rank holds some columns (tensor parallel over the vocabulary).

    Attributes:
        logits: [B, T_s, V_r] float, this rank's columns; ranks hold consecutive ranges in order.
        group: the process group over which the vocabulary is cut.
    """

    logits: Tensor
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True, eq=False)
class ShardRows:
    """Rows gathered from all ranks a block at a time; each rank keeps its columns' gradient.

    Each rank computes the whole loss, so its value is the same everywhere; what is saved is memory.
    """

    logits: Tensor
    group: dist.ProcessGroup | None
    sizes: tuple[int, ...]
    vocab_size: int

    @classmethod
    def of(cls, shard: VocabShard, vocab_size: int | None) -> ShardRows:
        world, local = dist.get_world_size(shard.group), shard.logits.shape[-1]
        sizes: list[int] = [0] * world
        held = [torch.zeros(1, dtype=torch.int64, device=shard.logits.device) for _ in sizes]
        dist.all_gather(held, torch.full_like(held[0], local), group=shard.group)
        sizes = [int(size) for size in held]
        return cls(shard.logits, shard.group, tuple(sizes), vocab_size or sum(sizes))

    @property
    def positions(self) -> tuple[int, int]:
        return self.logits.shape[0], self.logits.shape[1]

    @property
    def _start(self) -> int:
        return sum(self.sizes[: dist.get_rank(self.group)])

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.logits,)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> ShardRows:
        return replace(self, logits=tensors[0])

    def rows_at_once(self, width: int) -> int:
        return 1

    def rows(self, index: Tensor, columns: Tensor | None = None) -> Tensor:
        local = self.logits.detach().flatten(0, 1).index_select(0, index)
        width = max(self.sizes)
        local = torch.nn.functional.pad(local, (0, width - local.shape[1])).contiguous()
        parts = [torch.empty_like(local) for _ in self.sizes]
        dist.all_gather(parts, local, group=self.group)
        whole = torch.cat([part[:, :n] for part, n in zip(parts, self.sizes, strict=True)], 1)
        whole = whole[:, : self.vocab_size]
        return upcast(whole if columns is None else whole.index_select(1, columns))

    def new_grads(self, needed: tuple[bool, ...]) -> list[Tensor | None]:
        return [torch.zeros_like(self.logits, memory_format=torch.contiguous_format)]

    def add_grads(
        self, grads: list[Tensor | None], index: Tensor, columns: Tensor | None, grad: Tensor
    ) -> None:
        assert grads[0] is not None
        flat = grads[0].view(-1, grads[0].shape[-1])
        if columns is not None:
            whole = grad.new_zeros(grad.shape[0], self.vocab_size)
            whole[:, columns] = grad
            grad = whole
        mine = grad[:, self._start : self._start + flat.shape[1]]  # [n, V_r], less a padded tail
        flat[:, : mine.shape[1]].index_add_(0, index, mine.to(flat.dtype))


Student = Tensor | LmHead | VocabShard


def student_rows(student: Student, vocab_size: int | None) -> StudentRows:
    """The source behind what the caller passed as `student_logits`.

    A DTensor sharded on its last axis counts as a `VocabShard` over that axis's group.

    Raises:
        ValueError: not [B, T_s, V_s'] or fewer columns than `vocab_size`.
        TypeError: neither a tensor nor one of this file's classes.
    """
    if isinstance(student, LmHead):
        size = _checked_size(student.weight.shape[0], vocab_size, "the lm_head's weight")
        return LmHeadRows(student, size)
    if isinstance(student, Tensor) and hasattr(student, "device_mesh"):
        student = _shard_of(student)
    if isinstance(student, VocabShard):
        if student.logits.dim() != 3:
            raise ValueError(
                f"the shard has shape {tuple(student.logits.shape)}, expected [B, T_s, V_r]"
            )
        shard = ShardRows.of(student, vocab_size)
        _checked_size(sum(shard.sizes), vocab_size, "the shards together")
        return shard
    if not isinstance(student, Tensor):
        raise TypeError(
            f"student_logits is {type(student).__name__}, expected a tensor, LmHead or VocabShard"
        )
    if student.dim() != 3 or not student.is_floating_point():
        raise ValueError(
            f"student_logits is {student.dtype} {tuple(student.shape)}, "
            "expected float [B, T_s, V_s]"
        )
    return LogitRows(student, _checked_size(student.shape[2], vocab_size, "student_logits"))


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
        raise ValueError(
            f"student_logits is placed {student.placements}; expected one Shard({last}) and else "
            "Replicate(); redistribute it first"
        )
    local = student.to_local()
    if not cut:
        return local
    return VocabShard(local, student.device_mesh.get_group(cut[0]))


def _checked_size(found: int, vocab_size: int | None, name: str) -> int:
    if vocab_size is not None and found < vocab_size:
        raise ValueError(
            f"{name} has {found} columns, fewer than the student vocabulary of {vocab_size}; "
            "pass the student whose tokenizer this is"
        )
    return found if vocab_size is None else vocab_size
