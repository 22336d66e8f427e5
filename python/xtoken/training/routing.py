"""Which teachers a row of the data is for, where a column names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from xtoken.align import ChunkKind
from xtoken.data.examples import Example
from xtoken.data.stream import StreamedRow
from xtoken.errors import DataError, OptionError


class Routes:
    """Teachers by name, and what becomes of rows that are not for all of them.

    Args:
        names: one per teacher.
        column: of the data; None where every row is for every teacher.

    Raises:
        OptionError: two teachers have one name, and there is a column.
    """

    def __init__(self, names: Sequence[str], column: str | None) -> None:
        self.names = list(names)
        self.column = column
        if column is not None and len(set(names)) != len(names):
            raise OptionError(
                f"teachers are named {', '.join(names)}, and column {column!r} cannot tell them "
                "apart; pass Teacher(..., name=...)"
            )

    def of(self, row: object) -> list[bool] | None:
        """Whether a row is for each teacher; None where it is for all.

        Raises:
            DataError: the column names none, or one that is not there.
        """
        if self.column is None or not isinstance(row, Mapping | StreamedRow):
            return None
        return self.named(row.teachers if isinstance(row, StreamedRow) else row.get(self.column))

    def named(self, value: object) -> list[bool] | None:
        """The same for a value of the column: a name, a list of names, or None for all."""
        if value is None:
            return None
        wanted = [value] if isinstance(value, str) else value
        known = ", ".join(self.names)
        if not isinstance(wanted, list | tuple | np.ndarray) or len(wanted) == 0:
            raise DataError(
                f"column {self.column!r} holds {value!r}, expected one of {known}, or a list"
            )
        for each in wanted:
            if each not in self.names:
                raise DataError(f"column {self.column!r} names {each!r}, expected one of {known}")
        return [name in wanted for name in self.names]

    def apply(
        self, examples: Sequence[tuple[Example, ...]], asked: Sequence[bool] | None
    ) -> list[tuple[Example, ...]]:
        """The examples with nothing to learn from teachers that are not asked."""
        if asked is None or all(asked):
            return list(examples)
        return [
            tuple(each if one else unasked(each) for each, one in zip(entry, asked, strict=True))
            for entry in examples
        ]


def unasked(example: Example) -> Example:
    """The student's side, beside a single token that nobody predicts."""
    alignment = example.alignment
    return replace(
        example,
        teacher_ids=example.teacher_ids[:1],
        teacher_loss_mask=np.zeros(1, dtype=np.bool_),
        alignment=replace(
            alignment,
            student_bounds=np.array([0, len(example.student_ids)], dtype=np.int64),
            teacher_bounds=np.array([0, 1], dtype=np.int64),
            kind=np.array([ChunkKind.MISMATCH], dtype=np.uint8),
            byte_counts=alignment.byte_counts * np.array([1, 0, 0, 0]),
        ),
    )
