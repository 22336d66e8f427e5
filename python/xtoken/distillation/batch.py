"""One padded batch of both sides, ready for the two models and the loss."""

from __future__ import annotations

from collections.abc import Callable, KeysView
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.align import Coverage
from xtoken.errors import ArgumentTypeError
from xtoken.losses.engine.prepared import Prepared
from xtoken.losses.prefix_kl.compared_prefixes import PreparedPrefixes
from xtoken.targets import Targets
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.target_batch import TargetBatch
from xtoken.vocab.fingerprints import PairFingerprint


def _version(tensor: Tensor) -> int:
    """How often it was altered in place; tensors of `torch.inference_mode` do not count."""
    return 0 if tensor.is_inference() else tensor._version


@dataclass(frozen=True, eq=False)
class Batch:
    """Both sides of some examples, padded each on its own, and the chunks that a loss counts.

    `model(**batch.student)` and `model(**batch.teacher)` run the two models.

    Attributes:
        student, teacher: what the models take: `input_ids` [B, T] int64, `attention_mask` [B, T]
            int64 (1 for a token), and with padding on the left `position_ids` [B, T] int64.
        student_loss_mask, teacher_loss_mask: [B, T] bool, the tokens that a loss may predict;
            never padding nor a first token.
        chunks: the usable chunks, token ranges in the padded rows.
        tokens: number of student tokens in the loss mask, the normalizer of the cross-entropy.
        coverage: how much of the batch lies in EXACT chunks, of the examples that this teacher is
            asked for.
        pair: the pair that made the batch; None where it is not known.
        counted: [N] int64, the flat positions that predict the tokens of `student_loss_mask`.
        prefixes: what prefix KL looks up in the tries; None where the loss is another.
        prepared: what another loss makes of the ids; None where it reads none.
        targets: exact targets of the chunks that were made before; None where there are none.
        asked_tokens: those of `tokens` in examples with a token in the teacher's loss mask; None
            for all.

    `counted` and what follows are made on the CPU, so that no loss waits for a GPU to ask it for
    them. They and the chunks are of the ids and masks as they were then: a loss refuses a batch in
    which those were changed, in place or by `dataclasses.replace`.
    """

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    student_loss_mask: Tensor
    teacher_loss_mask: Tensor
    chunks: ChunkBatch
    tokens: int
    coverage: Coverage
    pair: PairFingerprint | None = None
    counted: Tensor | None = None
    prefixes: PreparedPrefixes | None = None
    prepared: Prepared | None = None
    targets: TargetBatch | None = None
    asked_tokens: int | None = None
    # The ids and masks that all else was made from, each with its version.
    _made_from: tuple[tuple[Tensor, int], ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self._made_from is None:
            marks = tuple((tensor, _version(tensor)) for tensor in self._sources())
            object.__setattr__(self, "_made_from", marks)

    def _sources(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            self.student_ids, self.teacher_ids, self.student_loss_mask, self.teacher_loss_mask
        )  # fmt: skip

    def check_unchanged(self) -> None:
        """Refuse a batch whose ids or masks are not those that its chunks were made from.

        Raises:
            ArgumentTypeError: one was altered, or another put in its place.
        """
        if torch.compiler.is_compiling():
            return
        names = ("student_ids", "teacher_ids", "student_loss_mask", "teacher_loss_mask")
        for name, now, (then, version) in zip(
            names, self._sources(), self._made_from or (), strict=True
        ):
            if now is not then or _version(now) != version:
                raise ArgumentTypeError(
                    f"batch.{name} was changed after the batch was made, and its chunks and counts "
                    "are of the one before; change the examples (student_loss_mask, "
                    "teacher_loss_mask) and collate them"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_made_from"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        object.__setattr__(self, "_made_from", None)
        self.__post_init__()

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.student_loss_mask)

    def __contains__(self, name: object) -> bool:
        """Whether the student takes an input of this name, as `transformers.Trainer` asks."""
        return name in self.student

    def __getitem__(self, name: str) -> Tensor:
        """An input of the student by name."""
        return self.student[name]

    def keys(self) -> KeysView[str]:
        """The names of the student's inputs."""
        return self.student.keys()

    @property
    def student_ids(self) -> Tensor:
        """[B, T_s] int64."""
        return self.student["input_ids"]

    @property
    def teacher_ids(self) -> Tensor:
        """[B, T_t] int64."""
        return self.teacher["input_ids"]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.student_loss_mask.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=non_blocking)
            if isinstance(value, dict):
                return {name: moved(part) for name, part in value.items()}
            if isinstance(value, ChunkBatch | PreparedPrefixes | Prepared | TargetBatch):
                return value.to(device, non_blocking=non_blocking)
            return value

        return self._each(moved)

    def _each(self, change: Callable[[Any], Any]) -> Batch:
        return self.remade(**{f.name: change(getattr(self, f.name)) for f in fields(self)})

    def remade(self, **changes: object) -> Batch:
        """As `dataclasses.replace`, where the caller answers for it that chunks and counts are of
        the ids and masks that it gives."""
        self.check_unchanged()
        values: dict[str, Any] = changes | {"_made_from": None}
        return replace(self, **values)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU do not wait."""

        def pinned(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.pin_memory()
            if isinstance(value, dict):
                return {name: pinned(part) for name, part in value.items()}
            if isinstance(value, ChunkBatch | PreparedPrefixes | Prepared | TargetBatch):
                return value.pin_memory()
            return value

        return self._each(pinned)

    @property
    def taught(self) -> int:
        """Number of student tokens in the loss mask that the chunks teach."""
        host = self.chunks.host
        return int((host.student_end - host.student_start).sum())

    @property
    def covered(self) -> float:
        """Share of the student tokens in the loss mask that the chunks teach; 1 where there is no
        token."""
        return self.taught / self.tokens if self.tokens else 1.0

    def with_targets(self, targets: Targets, tokens: NDArray[np.int64]) -> Batch:
        """The batch, on the CPU, with targets of its examples that were made before.

        Args:
            targets: of the examples, in order.
            tokens: of the `TargetBuilder` that made them.
        """
        attention = self.student.get("attention_mask")
        columns = None if attention is None else attention.argmax(1).tolist()
        length = self.student_ids.shape[1]
        made = TargetBatch.from_targets(targets, tokens, self.chunks, length, columns)
        return replace(self, targets=made)

    def __repr__(self) -> str:
        shapes = f"student {list(self.student_ids.shape)}, teacher {list(self.teacher_ids.shape)}"
        return f"Batch({len(self)} examples, {shapes}, {len(self.chunks)} chunks, {self.device})"
