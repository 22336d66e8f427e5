"""Examples as columns, which `datasets` and Ray keep on disk, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeGuard, overload

import numpy as np

from xtoken.align import Aligner, Alignment, ChunkKind
from xtoken.data.documents import LeftOut
from xtoken.data.encode import Encoder
from xtoken.data.examples import Example, Made, encode_documents
from xtoken.data.rows import Document, document_of, reason_of
from xtoken.errors import ArgumentTypeError, DataError, ShapeError
from xtoken.vocab.fingerprints import PairFingerprint

Column: TypeAlias = list[list[int]] | list[list[bool]] | list[str] | list[int] | list[bool]

# What stands in a row that was left out: one token of each side without a loss. Of lists without
# a number the formats on disk know no type.
_NOTHING: dict[str, list[int] | list[bool]] = {
    "student_ids": [0],
    "teacher_ids": [0],
    "student_loss_mask": [False],
    "teacher_loss_mask": [False],
    "student_bounds": [0, 1],
    "teacher_bounds": [0, 1],
    "chunk_kinds": [int(ChunkKind.MISMATCH)],
    "byte_counts": [0, 0, 0, 0],
}
COLUMNS = (*_NOTHING, "pair", "part", "cut", "left_out")
"""The columns of `Pair.tokenize`."""


class Rows(Protocol):
    """A dataset of `datasets`, or another that gives rows by number and columns by name."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Any: ...


def tokenize_columns(
    batch: Mapping[str, Sequence[object]],
    encoders: tuple[Encoder, Encoder],
    aligner: Aligner,
    pair: PairFingerprint,
    *,
    max_tokens: int | None,
    field: str | None,
) -> dict[str, Column]:
    """The columns of the examples in a batch of rows; see `Pair.tokenize`.

    Args:
        encoders, aligner, pair: of the two tokenizers.
        field: see `document_of`.
    """
    size = _length(batch)
    names = list(batch)
    made: list[Made] = [Made([], 0, []) for _ in range(size)]
    documents: list[Document] = []
    places: list[int] = []
    for index in range(size):
        row = {name: _plain(batch[name][index]) for name in names}
        try:
            document = document_of(row, field=field, source=f"row {index}")
        except DataError as error:
            # The number within this batch says nothing to anybody.
            made[index].reasons.append(reason_of(error, f"row {index}"))
            continue
        documents.append(document)
        places.append(index)
    encoded = encode_documents(
        documents, encoders[0], encoders[1:], [aligner], max_tokens=max_tokens, strict=False
    )
    for index, found in zip(places, encoded, strict=True):
        made[index] = found
    rows = [row for each in made for row in _rows(each, "-".join(pair))]
    return {name: [row[name] for row in rows] for name in COLUMNS}


def _length(batch: Mapping[str, Sequence[Any]]) -> int:
    """The number of rows in columns, which all have it."""
    if not isinstance(batch, Mapping):
        raise ArgumentTypeError(
            f"batch is a {type(batch).__name__}, expected columns by name, as "
            'datasets.map(batched=True) passes them: {"text": [...]}'
        )
    for name, column in batch.items():
        if isinstance(column, str | bytes) or not hasattr(column, "__len__"):
            raise ArgumentTypeError(
                f"the column {name!r} is a {type(column).__name__}, expected a list of rows; pass "
                "batched=True to datasets.map"
            )
    lengths = {name: len(column) for name, column in batch.items()}
    if len(set(lengths.values())) > 1:
        raise ShapeError(f"the columns have {lengths} rows, expected equally many")
    return next(iter(lengths.values()), 0)


def is_tokenized(row: object) -> TypeGuard[Mapping[str, object]]:
    """Whether it is a row of `Pair.tokenize`."""
    return isinstance(row, Mapping) and all(name in row for name in COLUMNS)


def example_from_columns(row: Mapping[str, object], pair: PairFingerprint | None = None) -> Example:
    """The example in a row of `Pair.tokenize`.

    Args:
        row: by column.
        pair: which it must be of; None takes any.

    Raises:
        PairError: it is of another pair.
        DataError: it was left out; the message says why.
    """
    student, _, teacher = str(row["pair"]).partition("-")
    found = PairFingerprint(student, teacher)
    if pair is not None:
        pair.check(found, "a tokenized row", "tokenize the rows with this pair's tokenize")
    if row["left_out"]:
        raise DataError(f"a tokenized row was left out: {row['left_out']}; filter such rows")
    values = {name: np.asarray(row[name]) for name in _NOTHING}
    alignment = Alignment(
        values["student_bounds"].astype(np.int64),
        values["teacher_bounds"].astype(np.int64),
        values["chunk_kinds"].astype(np.uint8),
        values["byte_counts"].astype(np.int64),
        found,
    )
    example = Example(
        values["student_ids"].astype(np.int64),
        values["teacher_ids"].astype(np.int64),
        values["student_loss_mask"].astype(np.bool_),
        values["teacher_loss_mask"].astype(np.bool_),
        alignment,
    )
    for side in ("student", "teacher"):
        ids, mask = getattr(example, f"{side}_ids"), getattr(example, f"{side}_loss_mask")
        end = getattr(alignment, f"{side}_bounds")[-1]
        if not len(ids) == len(mask) == end:
            raise ShapeError(
                f"a tokenized row has {len(ids)} {side} tokens, a mask of {len(mask)} and chunks "
                f"up to {end}; tokenize it again, and cut no column alone"
            )
    return example


class ColumnExamples(Sequence[Example]):
    """The examples in a dataset of tokenized rows, read as they are asked for.

    Args:
        rows: with the columns of `Pair.tokenize`; those that were left out are passed over.
        pair: which they must be of; None takes any.

    Attributes:
        left_out: those rows, by the number of the row that was tokenized (where the order was kept)
            and the reason.
        cut: number of examples that lost their tail.

    Raises:
        PairError: they are of another pair.
        DataError: all were left out.
    """

    def __init__(self, rows: Rows, pair: PairFingerprint | None = None) -> None:
        self._rows = rows
        self._pair = pair
        reasons = list(map(str, rows["left_out"]))
        number = np.cumsum(np.asarray(rows["part"]) == 0) - 1
        self._usable = np.array([not reason for reason in reasons], dtype=np.bool_).nonzero()[0]
        self.left_out = tuple(
            LeftOut(f"row {number[at]}", reason) for at, reason in enumerate(reasons) if reason
        )
        self.cut = int(np.asarray(rows["cut"], dtype=np.bool_).sum())
        if not len(self._usable):
            reason = f": row 0: {self.left_out[0].reason}" if self.left_out else ""
            raise DataError(f"none of {len(reasons)} tokenized rows can be used{reason}")
        if pair is not None:
            self[0]

    def __len__(self) -> int:
        return len(self._usable)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        return example_from_columns(self._rows[int(self._usable[index])], self._pair)


def _rows(made: Made, pair: str) -> list[dict[str, Any]]:
    """A row for each example of a document, and one for each that was left out."""
    rows: list[dict[str, Any]] = []
    for number, (example,) in enumerate(made.examples):
        alignment = example.alignment
        arrays = {
            "student_ids": example.student_ids,
            "teacher_ids": example.teacher_ids,
            "student_loss_mask": example.student_loss_mask,
            "teacher_loss_mask": example.teacher_loss_mask,
            "student_bounds": alignment.student_bounds,
            "teacher_bounds": alignment.teacher_bounds,
            "chunk_kinds": alignment.kind,
            "byte_counts": alignment.byte_counts,
        }
        # Which of several examples were cut is not known: the first are marked.
        lists = {name: values.tolist() for name, values in arrays.items()}
        rows.append(lists | {"cut": number < made.cut, "left_out": ""})
    rows += [_NOTHING | {"cut": False, "left_out": reason} for reason in made.reasons]
    for part, row in enumerate(rows):
        row |= {"pair": pair, "part": part}
    return rows


def _plain(value: Any) -> Any:
    """A value as JSON has it: NumPy's arrays and scalars, which Ray hands over, made plain."""
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return value.item() if isinstance(value, np.generic) else value
