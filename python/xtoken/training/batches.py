"""What a loader hands to the step: the student's inputs, and the teachers' side beside them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from xtoken.data.examples import Example
from xtoken.data.stream import StreamedRow
from xtoken.distillation import MultiBatch
from xtoken.distillation.batch import Batch
from xtoken.distillation.collate import DistillCollator
from xtoken.errors import DataError, OptionError
from xtoken.training.teaching import AnyBatch, Teaching

TEACHER_SIDE = "teacher_side"
"""The key of the teachers' side among the inputs of a step."""

EXAMPLES = "examples"
"""The key of an example per teacher in a row of a prepared dataset."""

LEFT_OUT = "example_left_out"
"""The key of why a row of a prepared dataset has no example."""

BATCH_ROWS = "batch_rows"
"""The key of the rows that a micro-batch was made of."""

IGNORED = -100

Row: TypeAlias = Mapping[str, Any]


def split(inputs: Any) -> tuple[Any, AnyBatch | None]:
    """The student's inputs, and the teachers' side where there is one."""
    if isinstance(inputs, Batch | MultiBatch):
        return {**inputs.student, "labels": labels_of(inputs)}, inputs
    side = inputs.get(TEACHER_SIDE)
    if side is None:
        return inputs, None
    own = (TEACHER_SIDE, BATCH_ROWS)
    return {name: value for name, value in inputs.items() if name not in own}, side


def rows_of(inputs: Any) -> BatchRows:
    """What a micro-batch was made of, where its collator says so."""
    found = inputs.get(BATCH_ROWS) if isinstance(inputs, Mapping) else None
    return found if isinstance(found, BatchRows) else BatchRows()


def labels_of(batch: AnyBatch) -> Tensor:
    """[B, T_s] int64: the tokens that the loss may predict, -100 elsewhere."""
    first = batch.batches[0] if isinstance(batch, MultiBatch) else batch
    return torch.where(first.student_loss_mask, first.student_ids, IGNORED)


@dataclass(frozen=True)
class BatchRows:
    """What a micro-batch was made of.

    Attributes:
        examples: with each teacher, where they are kept (see `ExampleCollator.keep`).
        left_out: number of rows that could not be used.
        not_distilled: number of documents of which a teacher that they are for has no chunk.
    """

    examples: tuple[tuple[Example, ...], ...] = ()
    left_out: int = 0
    not_distilled: int = 0


class ExampleCollator:
    """Pads rows of examples, or texts and conversations as they come, to the inputs of a step.

    A row that cannot be used is left out: the first is named in a warning, all are counted in the
    inputs, and where nothing else is in the batch it holds two tokens without a loss. None of the
    first hundred rows may be so.

    Args:
        teaching: makes examples of texts.
        collators: one per teacher, in place of the distillers' own.
        keep: whether the examples stay beside the inputs.

    Raises:
        OptionError: a collator is missing.
    """

    def __init__(
        self,
        teaching: Teaching,
        collators: Sequence[DistillCollator] | None = None,
        *,
        keep: bool = False,
    ) -> None:
        self._teaching = teaching
        self._collators = collators or [member.collator for member in teaching.members]
        if len(self._collators) != len(teaching.members):
            raise OptionError(
                f"data_collator is a DistillCollator, which pads for one teacher, and there are "
                f"{len(teaching.members)}; leave it out, and pass padding_side and pad_multiple"
            )
        self.keep = keep
        self._used = self._left_out = 0

    @property
    def pads_left(self) -> bool:
        """Whether rows are padded on the left."""
        return any(each.padding_side == "left" for each in self._collators)

    def __getstate__(self) -> dict[str, Any]:
        # For a loader's worker that is no fork: it makes batches, and asks no teacher, which may be
        # a model of many gigabytes, or hold connections.
        return self.__dict__ | {"_teaching": self._teaching.without_sources()}

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """The padded inputs.

        Raises:
            DataError: there is no row, or none of the first hundred can be used.
            PairError: a tokenized row is of another pair.
        """
        if not rows:
            raise DataError("a batch of 0 examples cannot be padded; give at least one")
        examples: list[tuple[Example, ...]] = []
        left_out = 0
        for row in rows:
            try:
                examples += self.examples(row)
            except DataError as error:
                left_out += 1
                self._warn(row, str(error))
        self._used += len(rows) - left_out
        kept = BatchRows(tuple(examples) if self.keep else (), left_out)
        batch = self.batch(examples) if examples else self._blank()
        return self.inputs(batch, kept)

    def inputs(self, batch: AnyBatch, rows: BatchRows) -> dict[str, Any]:
        """A batch as the inputs of a step."""
        return {
            **batch.student, "labels": labels_of(batch), TEACHER_SIDE: batch, BATCH_ROWS: rows
        }  # fmt: skip

    def batch(self, examples: Sequence[tuple[Example, ...]]) -> AnyBatch:
        """The padded batch of examples with each teacher."""
        parts = []
        members = zip(self._teaching.members, self._collators, self._teaching.targets, strict=True)
        for index, (member, collator, store) in enumerate(members):
            own = [each[index] for each in examples]
            batch = collator(own)
            if store is not None and store.knows(own):
                # One in a worker of a loader.
                made = store.targets(own, threads=torch.get_num_threads())
                batch = batch.with_targets(made, store.builder.tokens)
            parts.append(member.prepared(batch))
        return parts[0] if len(parts) == 1 else MultiBatch(tuple(parts))

    def examples(self, row: Any) -> list[tuple[Example, ...]]:
        """What a row is for each teacher: one entry, or several where a template asks for it.

        Raises:
            DataError: it cannot be used; the message says why.
        """
        if isinstance(row, Mapping) and EXAMPLES in row:
            return [row[EXAMPLES]]
        if isinstance(row, Mapping) and LEFT_OUT in row:
            raise DataError(row[LEFT_OUT])
        if isinstance(row, StreamedRow) and row.document is None:
            raise DataError(row.reason)
        return self._teaching.examples(row)

    def _warn(self, row: Any, reason: str) -> None:
        self._left_out += 1
        if self._left_out >= 100 and not self._used:
            raise DataError(f"none of the first {self._left_out} rows can be used: {reason}")
        if self._left_out == 1:
            shown = row.source if isinstance(row, StreamedRow) else repr(row)
            shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
            warnings.warn(
                f"a row is left out, and others like it will be (rows_left_out in the log counts "
                f"them): {reason}; it is {shown}",
                stacklevel=3,
            )

    def _blank(self) -> AnyBatch:
        """Two tokens on each side, of which nothing counts."""
        nothing = np.zeros(2, dtype=np.bool_)
        examples = []
        for member, collator in zip(self._teaching.members, self._collators, strict=True):
            student, teacher = (
                np.full(2, pad, dtype=np.int64)
                for pad in (collator.student_pad_id, collator.teacher_pad_id)
            )
            alignment = member.pair.aligner.align(student, teacher)
            examples.append(Example(student, teacher, nothing, nothing, alignment))
        return self.batch([tuple(examples)])
