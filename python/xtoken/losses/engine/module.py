"""The thin modules: a loss with its options held, to be called with a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from xtoken.losses.engine.student_input import Student
from xtoken.losses.output import LossOutput
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.teacher_signal import Teacher


class LossModule(nn.Module):
    """A loss function with its options; subclasses add what moves with the module."""

    def __init__(self, function: Callable[..., LossOutput], options: dict[str, Any]) -> None:
        super().__init__()
        known = inspect.signature(function).parameters
        unknown = [name for name in options if name not in known]
        if unknown:
            raise TypeError(
                f"{function.__name__} has no option {unknown[0]!r}; it knows {', '.join(known)}"
            )
        self.function = function
        self.options = options

    def held(self) -> dict[str, Any]:
        """Arguments that this module owns."""
        return {}

    def forward(
        self, student_logits: Student, teacher: Teacher, chunks: ChunkBatch, **call: Any
    ) -> LossOutput:
        """The loss of one batch.

        Args:
            call: what changes from batch to batch, such as `normalizer`; overrides the options.
        """
        arguments = {**self.held(), **self.options, **call}
        return self.function(
            student_logits=student_logits, teacher=teacher, chunks=chunks, **arguments
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class CommonSetModule(LossModule):
    """A loss over a common set, whose ids move with the module."""

    def __init__(
        self,
        function: Callable[..., LossOutput],
        student_ids_common: Any,
        teacher_ids_common: Any,
        options: dict[str, Any],
    ) -> None:
        super().__init__(function, options)
        self.register_buffer("student_ids_common", student_ids_common, persistent=False)
        self.register_buffer("teacher_ids_common", teacher_ids_common, persistent=False)

    def held(self) -> dict[str, Any]:
        return {
            "student_ids_common": self.student_ids_common,
            "teacher_ids_common": self.teacher_ids_common,
        }
