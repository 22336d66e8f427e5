"""Packing of rows that have a teachers' side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtoken.training.teacher_columns import columns


def pack_rows(dataset: Any, length: int, teachers: int) -> Any:
    """Pack rows with a teacher's side: whole documents, best fit by falling length, the same ones
    in a row on all sides.

    Args:
        dataset: of `datasets`, with `input_ids`, `labels` and the columns of `add_teacher_side`.
        length: most student tokens of a row.
        teachers: how many there are.
    """
    names = ["input_ids", "labels", *columns(teachers)]

    def pack(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        lengths = [len(ids) for ids in rows["input_ids"]]
        packed: dict[str, list[Any]] = {name: [] for name in ("seq_lengths", *names)}
        for members in _best_fit(lengths, length):
            packed["seq_lengths"].append([lengths[at] for at in members])
            for name in names:
                joined = [value for at in members for value in rows[name][at]]
                packed[name].append(joined)
        return packed

    # Which other columns a streamed dataset has is not known.
    return dataset.select_columns(names).map(pack, batched=True)


def _best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    left: list[int] = []
    for at in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = [row for row, space in enumerate(left) if space >= lengths[at]]
        if fitting:
            row = min(fitting, key=left.__getitem__)
        else:
            row = len(rows)
            rows.append([])
            left.append(capacity)
        rows[row].append(at)
        left[row] -= lengths[at]
    return rows
