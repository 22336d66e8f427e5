"""Which teachers a row of the data is for, where a column names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

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

    Attributes:
        seen: whether a row, or what a dataset says of its columns, had the column. A row without
            it is then for all teachers, as one where it is null; until then the column may be
            misspelt, and every row would be for all.

    Raises:
        OptionError: two teachers have one name, and there is a column.
    """

    def __init__(self, names: Sequence[str], column: str | None) -> None:
        self.names = list(names)
        self.column = column
        self.seen = False
        if column is not None and len(set(names)) != len(names):
            raise OptionError(
                f"teachers are named {', '.join(names)}, and column {column!r} cannot tell them "
                "apart; pass Teacher(..., name=...)"
            )

    def of(self, row: object, *, one_of_many: bool = False) -> list[bool] | None:
        """Whether a row is for each teacher; None where it is for all.

        Args:
            one_of_many: whether rows that come later are known to be there and may have the column,
                so that `check_seen` says whether any had it.

        Raises:
            DataError: the column names none, or one that is not there.
            OptionError: neither this row nor one before it has the column.
        """
        if self.column is None:
            return None
        has, value = False, None
        if isinstance(row, StreamedRow):
            has, value = row.names_teachers, row.teachers
        elif isinstance(row, Mapping):
            has, value = self.column in row, row.get(self.column)
        self.seen = self.seen or has
        if not one_of_many:
            self.check_seen(row)
        return self.named(value)

    def check_seen(self, row: object = None) -> None:
        """Refuse a column that nothing had.

        Args:
            row: one of them, which the message shows.

        Raises:
            OptionError: as said.
        """
        if self.column is not None and not self.seen:
            has = self._shown(row) if isinstance(row, Mapping) else ""
            raise OptionError(
                f"teacher_column = {self.column!r}, but no row has a column of that name{has}; "
                "pass the name of one, with null in rows that are for all teachers"
            )

    def check_columns(self, dataset: Any) -> None:
        """Refuse a dataset that says which columns it has, without this one.

        Raises:
            OptionError: as said.
        """
        names = getattr(dataset, "column_names", None)
        if self.column is None or not isinstance(names, list | tuple):
            return
        self.seen = self.seen or self.column in names
        self.check_seen(dict.fromkeys(names))

    def _shown(self, row: Mapping[Any, Any]) -> str:
        names = ", ".join(map(repr, list(row)[:8]))
        return f" (there are {names})" if names else ""

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
