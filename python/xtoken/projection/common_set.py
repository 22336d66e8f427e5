"""Pairs of tokens that correspond one to one: what H-KL and GOLD match before anything else."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from xtoken._checks import check_number
from xtoken.errors import OptionError
from xtoken.projection.arrays import RULE_CODES, ProjectionArrays


def common_set(
    projection: ProjectionArrays, mode: Literal["strict", "relaxed"], threshold: float
) -> NDArray[np.int64]:
    """See `Projection.common_set`."""

    if mode not in ("strict", "relaxed"):
        raise OptionError(f"mode = {mode!r} is out of range; expected 'strict' or 'relaxed'")
    rule = "is out of range; expected 0 < t <= 1"
    check_number("threshold", threshold, 0, inside=True, rule=rule)
    if threshold > 1:
        raise OptionError(f"threshold = {threshold} {rule}")
    claims = np.diff(projection.indptr) > 0
    claims &= projection.rules != RULE_CODES["duplicate"]
    if mode == "strict":
        claims &= np.isin(projection.rules, [RULE_CODES["exact"], RULE_CODES["role"]])
    student_ids = np.flatnonzero(claims)
    heaviest = projection.indptr[student_ids]  # rows are sorted by falling weight
    if mode == "relaxed":
        # A weight is stored as float32, so it is compared with the threshold as float32.
        enough = projection.weights[heaviest] >= np.float32(threshold)
        student_ids, heaviest = student_ids[enough], heaviest[enough]
    # Several stop tokens may claim one of the teacher's: the preferred one is its partner.
    stops = projection.student_stops
    rank = np.full(projection.shape[0], 0 if stops is None else len(stops), dtype=np.int64)
    if stops is not None:
        rank[stops[::-1]] = np.arange(len(stops))[::-1]
    order = np.lexsort((student_ids, rank[student_ids], -projection.weights[heaviest]))
    _, first = np.unique(projection.indices[heaviest][order], return_index=True)
    winners = np.sort(order[first])
    return np.stack([student_ids[winners], projection.indices[heaviest[winners]]], axis=1)
