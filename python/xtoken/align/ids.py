"""What callers hold token ids in, checked and brought into one flat form."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from xtoken.errors import ArgumentTypeError, OptionError, ShapeError

Ids: TypeAlias = "Sequence[int] | npt.NDArray[np.int64]"
Batch: TypeAlias = "Sequence[Ids] | npt.NDArray[np.int64]"

_NO_IDS = np.empty(0, np.int64)


class Ragged(NamedTuple):
    """Sequences that lie in one array: sequence b is `ids[starts[b]:ends[b]]`."""

    ids: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]
    """The column of each sequence's first token in its row."""


def as_ids(
    name: str, ids: Any, hint: str = "align takes one sequence, align_batch many"
) -> npt.NDArray[np.int64]:
    """One sequence as a contiguous int64 array; a list is converted, an array must be one already.

    Args:
        hint: what to pass where it is not one sequence.

    Raises:
        ArgumentTypeError: not integers, or an array of another dtype.
        ShapeError: not one-dimensional, or an array that is not contiguous.
    """
    return _array(name, ids, 1, hint)


def as_rows(side: str, sequences: Any) -> list[npt.NDArray[np.int64]]:
    """Each sequence of a batch as an array of its own.

    Raises:
        ArgumentTypeError, ShapeError: as `as_ids`; or it is no list of sequences.
    """
    ragged = as_ragged(side, sequences, None, None, None)
    return [ragged.ids[start:end] for start, end in zip(ragged.starts, ragged.ends, strict=True)]


def as_ragged(
    side: str,
    ids: Any,
    mask: npt.ArrayLike | None,
    lengths: npt.ArrayLike | None,
    indptr: npt.ArrayLike | None,
) -> Ragged:
    """A batch in any of its forms as one flat array.

    Raises:
        ArgumentTypeError: not integers, or an array of another dtype.
        ShapeError: the arrays do not fit together, or a mask has a hole.
        OptionError: more than one of mask, lengths and indptr.
    """
    if sum(given is not None for given in (mask, lengths, indptr)) > 1:
        raise OptionError(f"{side}_mask, {side}_lengths and {side}_indptr exclude one another")
    if indptr is not None:
        return _from_indptr(side, ids, indptr)
    if mask is None and lengths is None and not hasattr(ids, "__array__"):
        return _from_sequences(side, ids)
    rows = _array(f"{side}_ids", ids, 2, "align takes one sequence, align_batch many")
    count, width = rows.shape
    if mask is not None:
        first, last = _mask_spans(side, mask, rows.shape)
    else:
        first = np.zeros(count, np.int64)
        last = np.full(count, width) if lengths is None else _lengths(side, lengths, rows.shape)
    offsets = np.arange(count, dtype=np.int64) * width
    return Ragged(rows.reshape(-1), offsets + first, offsets + last, first)


def _array(name: str, ids: Any, dimensions: int, hint: str) -> npt.NDArray[np.int64]:
    array = as_int64(name, ids)
    if array.ndim != dimensions:
        raise ShapeError(
            f"{name} has {array.ndim} dimensions where {dimensions} is expected; {hint}"
        )
    if not array.flags.c_contiguous:
        raise ShapeError(
            f"{name} has gaps between its elements; pass numpy.ascontiguousarray of it"
        )
    return array


def as_int64(name: str, ids: Any) -> npt.NDArray[np.int64]:
    """Ids of any shape as an int64 array; lists are converted, an array must be one already.

    Raises:
        ArgumentTypeError: not integers, or an array of another dtype.
        ShapeError: rows of different lengths.
    """
    is_array = hasattr(ids, "__array__")
    array = _read(
        ids, name, "has rows of different lengths; pass a list of lists without mask, or pad it"
    )
    if not is_array and array.size == 0:
        array = array.astype(np.int64)
    if array.dtype != np.int64:
        if is_array or array.dtype.kind not in "iu":
            raise ArgumentTypeError(
                f"{name} is of dtype {array.dtype} where int64 is expected; "
                "pass .astype(numpy.int64) of it"
            )
        if array.dtype.kind == "u":  # what numpy makes of a list with more than int64 holds
            raise ArgumentTypeError(
                f"{name} has {array.max()}, which no id of 64 bits is; pass what the tokenizer made"
            )
        array = array.astype(np.int64)
    return array


def _read(values: Any, name: str, ragged: str) -> npt.NDArray[Any]:
    """The array of a caller's values; `ragged` is said of rows of different lengths."""
    try:
        return np.asarray(values)
    except (ValueError, OverflowError) as error:
        raise ShapeError(f"{name} {ragged}") from error
    # What torch says of a tensor on another device, with a gradient, or of a dtype of its own.
    except (TypeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ArgumentTypeError(
            f"{name} cannot be read as an array ({reason}); pass it on the CPU, in a dtype that "
            "NumPy has"
        ) from error


def _from_sequences(side: str, sequences: Any) -> Ragged:
    try:
        rows = list(sequences)
    except TypeError as error:
        raise ArgumentTypeError(
            f"{side}_ids is a {type(sequences).__name__}; pass a list of sequences or an array"
        ) from error
    if rows and all(isinstance(row, list | tuple) for row in rows):
        flat = _from_lists(rows)
        if flat is None:  # refused there, or by its row's number
            flat = as_ids(f"{side}_ids", list(chain.from_iterable(rows)))
    else:
        arrays = [as_ids(f"{side}_ids[{at}]", row) for at, row in enumerate(rows)]
        flat = arrays[0] if len(arrays) == 1 else np.concatenate([_NO_IDS, *arrays])
    sizes = np.array([len(row) for row in rows], dtype=np.int64)
    ends = sizes.cumsum()
    return Ragged(flat, ends - sizes, ends, np.zeros(len(rows), np.int64))


def _from_lists(rows: list[list[int] | tuple[int, ...]]) -> npt.NDArray[np.int64] | None:
    """The ids of lists, one after the other, in half the time of one numpy array; None where they
    are not all integers."""
    ids = array("q")
    try:
        for row in rows:
            if len(row) and isinstance(row[0], bool):
                return None
            ids.fromlist(row if isinstance(row, list) else list(row))
    except (TypeError, OverflowError):
        return None
    return np.frombuffer(ids, dtype=np.int64) if ids else _NO_IDS


def _from_indptr(side: str, ids: Any, indptr: npt.ArrayLike) -> Ragged:
    flat = as_ids(f"{side}_ids", ids)
    offsets = as_ids(f"{side}_indptr", indptr)
    falls = (offsets[1:] < offsets[:-1]).any()
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(flat) or falls:
        raise ShapeError(
            f"{side}_indptr does not rise from 0 to the {len(flat)} ids of {side}_ids; "
            "pass B + 1 offsets, the first 0 and the last the number of ids"
        )
    return Ragged(flat, offsets[:-1], offsets[1:], np.zeros(len(offsets) - 1, np.int64))


def _lengths(side: str, lengths: npt.ArrayLike, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    checked = as_ids(f"{side}_lengths", lengths)
    if checked.shape != shape[:1]:
        raise ShapeError(
            f"{side}_lengths has {len(checked)} entries where {side}_ids has {shape[0]} rows; "
            "pass one length per row"
        )
    outside = np.flatnonzero((checked < 0) | (checked > shape[1]))
    if len(outside):
        at = int(outside[0])
        raise ShapeError(
            f"{side}_lengths[{at}] = {checked[at]} is outside 0..{shape[1]}, the width of "
            f"{side}_ids; pass the number of tokens in the row"
        )
    return checked


def _mask_spans(
    side: str, mask: npt.ArrayLike, shape: tuple[int, ...]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First column and end of the tokens of each row."""
    array = _read(
        mask,
        f"{side}_mask",
        f"has rows of other lengths where {side}_ids has {list(shape)}; pass the attention mask "
        "that belongs to these ids",
    )
    if array.dtype.kind not in "buif":
        raise ArgumentTypeError(
            f"{side}_mask is of dtype {array.dtype}, expected booleans or 0 and 1"
        )
    if array.shape != shape:
        raise ShapeError(
            f"{side}_mask has shape {list(array.shape)} where {side}_ids has {list(shape)}; "
            "pass the attention mask that belongs to these ids"
        )
    tokens = array.astype(np.bool_)
    lengths = tokens.sum(axis=1, dtype=np.int64)
    first = tokens.argmax(axis=1).astype(np.int64) if shape[1] else np.zeros(shape[0], np.int64)
    last = first + lengths
    columns = np.arange(shape[1])
    span = (columns >= first[:, None]) & (columns < last[:, None])
    holes = np.argwhere(span & ~tokens)
    if len(holes):
        row, column = holes[0].tolist()
        raise ShapeError(
            f"{side}_mask[{row}, {column}] is a hole between tokens; padding must be before or "
            "after them: pass the attention mask, not a loss mask"
        )
    return first, last
