"""Checks of a teacher's rows: parts of a distribution over distinct columns."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xtoken._checks import expect
from xtoken.errors import ArgumentTypeError, NonFiniteError, OptionError, ShapeError

# Rows of half precision sum to a little more than 1.
_MASS_TOLERANCE = 0.06
# Numbers that are looked at together: whole rows of a vocabulary are never copied at once.
_BLOCK = 1 << 22


def repeated_column(
    ids: NDArray[np.int64], log_probs: NDArray[np.floating]
) -> tuple[int, int] | None:
    """The first row that names a column twice, and that column; None where none does.

    Args:
        ids: [N, K] columns.
        log_probs: [N, K]; -inf pads a row, whatever its id.

    >>> repeated_column(np.array([[4, 2, 4]]), np.array([[-1.0, -2.0, -3.0]]))
    (0, 4)
    """
    if ids.size == 0:
        return None
    # Pads get ids of their own, so that only a column named twice is found beside itself.
    pads = -1 - np.arange(ids.shape[-1], dtype=np.int64)
    rows = np.where(np.isneginf(log_probs), pads, ids)
    if ids.max() < 2**31:
        rows = rows.astype(np.int32)
    rows.sort(axis=-1)
    twice = np.argwhere(rows[:, 1:] == rows[:, :-1])
    if not len(twice):
        return None
    row, place = twice[0].tolist()
    return row, int(rows[row, place])


def within(ids: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Columns as a `TargetExample` takes them: those beyond the vocabulary, which pad a model's
    head, are none.

    >>> within(np.array([[4, 2, 7]]), 5)
    array([[ 4,  2, -1]])
    """
    return np.where(ids < size, ids, -1)


def check_log_probs(log_probs: NDArray[np.float32]) -> None:
    """Refuse what is no table of floats; the numbers are not looked at.

    Raises:
        ArgumentTypeError: it is no array, or one of another kind of numbers.
        ShapeError: it has not two dimensions.
    """
    hint = "pass a float32 array [T_t, K]"
    expect(log_probs, np.ndarray, "log_probs", hint)
    if log_probs.dtype.kind != "f":
        raise ArgumentTypeError(f"log_probs is of dtype {log_probs.dtype}, expected floats; {hint}")
    if log_probs.ndim != 2:
        raise ShapeError(f"log_probs has shape {log_probs.shape}, expected [T_t, K]; {hint}")


def check_rows(log_probs: NDArray[np.float32], ids: NDArray[np.int64] | None) -> None:
    """Refuse rows that no softmax gives.

    Args:
        log_probs: [N, K].
        ids: [N, K] columns, -1 for none; None for all of the vocabulary.

    Raises:
        NonFiniteError: a log-probability is NaN.
        OptionError: a row has more than all mass, or names a column twice.
    """
    step = max(1, _BLOCK // max(1, log_probs.shape[-1]))
    for start in range(0, len(log_probs), step):
        mass = np.exp(log_probs[start : start + step]).sum(axis=-1, dtype=np.float64)
        bad = np.flatnonzero(~(mass <= 1 + _MASS_TOLERANCE))
        if not len(bad):
            continue
        row = start + int(bad[0])
        if np.isnan(mass[bad[0]]):
            raise NonFiniteError(
                f"log_probs[{row}] holds NaN, expected log-probabilities or -inf; the teacher "
                "overflowed: compute its predictions again"
            )
        raise OptionError(
            f"log_probs[{row}] sums to {mass[bad[0]]:.4g} as probabilities, expected 1 at most; "
            "pass log-probabilities under the full softmax, not logits"
        )
    if ids is None:
        return
    # No id is a pad, too.
    repeated = repeated_column(ids, np.where(ids == -1, -np.inf, log_probs))
    if repeated is not None:
        raise OptionError(
            f"column_ids[{repeated[0]}] names token {repeated[1]} twice, expected distinct tokens; "
            "pad a short row with -1"
        )
