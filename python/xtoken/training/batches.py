"""What a loader hands to the step: the student's inputs, and the teachers' side beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from xtoken.data.examples import Example
from xtoken.distillation import MultiBatch
from xtoken.distillation.batch import Batch
from xtoken.distillation.collate import DistillCollator
from xtoken.errors import ArgumentTypeError, DataError
from xtoken.training.teaching import AnyBatch, Teaching

TEACHER_SIDE = "teacher_side"
"""The key of the teachers' side among the inputs of a step."""

EXAMPLES = "examples"
"""The key of an example per teacher in a row of a prepared dataset."""

IGNORED = -100

Row: TypeAlias = Mapping[str, Any]


def split(inputs: Any) -> tuple[Any, AnyBatch | None]:
    """The student's inputs, and the teachers' side where there is one."""
    if isinstance(inputs, Batch | MultiBatch):
        return {**inputs.student, "labels": labels_of(inputs)}, inputs
    side = inputs.get(TEACHER_SIDE)
    if side is None:
        return inputs, None
    return {name: value for name, value in inputs.items() if name != TEACHER_SIDE}, side


def labels_of(batch: AnyBatch) -> Tensor:
    """[B, T_s] int64: the tokens that the loss may predict, -100 elsewhere."""
    first = batch.batches[0] if isinstance(batch, MultiBatch) else batch
    return torch.where(first.student_loss_mask, first.student_ids, IGNORED)


class ExampleRows(torch.utils.data.Dataset[Row]):
    """Prepared examples as rows: `input_ids` of the student, and an example per teacher.

    The Trainer reads lengths off `input_ids` where it groups by length.
    """

    def __init__(self, examples: Sequence[tuple[Example, ...]]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Row:
        each = self._examples[index]
        return {"input_ids": each[0].student_ids, EXAMPLES: each}

    def of_first(self) -> list[Example]:
        """The examples with the first teacher."""
        return [each[0] for each in self._examples]


class ExampleCollator:
    """Pads rows of examples, or texts and conversations as they come, to the inputs of a step.

    Args:
        teaching: makes examples of texts.
        collators: one per teacher, in place of the distillers' own.
    """

    def __init__(
        self, teaching: Teaching, collators: Sequence[DistillCollator] | None = None
    ) -> None:
        self._teaching = teaching
        self._collators = collators or [member.collator for member in teaching.members]

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """The padded inputs.

        Raises:
            DataError: a row cannot be used; the message says why.
        """
        examples = [each for row in rows for each in self.examples(row)]
        if not examples:
            raise DataError("a batch of 0 examples cannot be padded; give at least one")
        parts = [
            member.prepared(collator([each[index] for each in examples]))
            for index, (member, collator) in enumerate(
                zip(self._teaching.members, self._collators, strict=True)
            )
        ]
        batch: AnyBatch = parts[0] if len(parts) == 1 else MultiBatch(tuple(parts))
        return {**batch.student, "labels": labels_of(batch), TEACHER_SIDE: batch}

    def examples(self, row: Any) -> list[tuple[Example, ...]]:
        """What a row is for each teacher: one entry, or several where a template asks for it."""
        if isinstance(row, Mapping) and EXAMPLES in row:
            return [row[EXAMPLES]]
        if isinstance(row, Example):
            if len(self._collators) > 1:
                raise ArgumentTypeError(
                    "an Example has one teacher; pass texts or conversations, of which each "
                    f"of the {len(self._collators)} teachers gets an example"
                )
            return [(row,)]
        return self._teaching.examples(row)
