"""Slow, obvious twins of the alignment: the segmentation of equal bytes, and the exact optimum."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def finest_chunks(
    student: Sequence[bytes], teacher: Sequence[bytes]
) -> list[tuple[int, int, int, int]]:
    """The finest common segmentation (s0, s1, t0, t1) of two spellings of the same bytes, in which
    each token has bytes: a cut wherever a token ends on both sides."""
    student_ends = list(accumulate(map(len, student)))
    teacher_ends = list(accumulate(map(len, teacher)))
    cuts = [0, *sorted(set(student_ends) & set(teacher_ends))]
    at_student = {0: 0} | {end: index + 1 for index, end in enumerate(student_ends)}
    at_teacher = {0: 0} | {end: index + 1 for index, end in enumerate(teacher_ends)}
    return [
        (at_student[start], at_student[end], at_teacher[start], at_teacher[end])
        for start, end in pairwise(cuts)
    ]


def most_exact_bytes(student: Sequence[bytes], teacher: Sequence[bytes]) -> int:
    """The most bytes that EXACT chunks can hold: dynamic programming over all pairs of token
    boundaries. Quadratic in the tokens, and worse: for small inputs."""
    n, m = len(student), len(teacher)
    best = [[0] * (m + 1) for _ in range(n + 1)]
    for i in range(n, -1, -1):
        for j in range(m, -1, -1):
            here = best[i][j]
            if i < n:
                here = max(here, best[i + 1][j])
            if j < m:
                here = max(here, best[i][j + 1])
            end = _chunk_from(student, teacher, i, j)
            if end is not None:
                size = sum(map(len, student[i : end[0]]))
                here = max(here, size + best[end[0]][end[1]])
            best[i][j] = here
    return best[0][0]


def _chunk_from(
    student: Sequence[bytes], teacher: Sequence[bytes], i: int, j: int
) -> tuple[int, int] | None:
    """Where the shortest exact chunk from boundaries i and j ends."""
    left = right = b""
    while True:
        if len(left) <= len(right):
            if i == len(student):
                return None
            left, i = left + student[i], i + 1
        else:
            if j == len(teacher):
                return None
            right, j = right + teacher[j], j + 1
        shared = min(len(left), len(right))
        if left[:shared] != right[:shared]:
            return None
        if left and len(left) == len(right):
            return i, j
