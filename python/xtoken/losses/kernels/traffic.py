"""Bytes that the kernels move per chunk, from shapes and W's non-zeros, and the least there is.

Counted is what a launch reads and writes of memory: a pass over a row in full, a gather by what it
gathers, each byte once in a launch, as a row is small beside a GPU's cache; `top_k.largest`, which
goes over a row several times, each time. W's arrays are read once in a launch of `rows` rows. The
parts of rows and the offsets, some hundred bytes, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from xtoken.losses.kernels.launch import SCRATCH
from xtoken.losses.kernels.w_map import w_map
from xtoken.tensors.projection import SparseProjection

Scope = Literal["chunk", "microbatch", "stored"]
Way = Literal["alone", "added", "joined"]


@dataclass(frozen=True)
class Sizes:
    """Of a chunk's rows.

    Attributes:
        student, teacher: V_s and V_t.
        width: columns of the student's logits, V_s or more.
        student_bytes, teacher_bytes: of a logit.
        rows: chunks in a launch; of a stored top-k no more than `launch.SCRATCH` has room for.
    """

    student: int
    teacher: int
    width: int
    student_bytes: int = 2
    teacher_bytes: int = 2
    rows: int = 2048

    @property
    def floor(self) -> float:
        """Both rows read once, the gradient written once."""
        return self._z + self.teacher * self.teacher_bytes + self._grad

    @property
    def _z(self) -> int:
        return self.student * self.student_bytes

    @property
    def _grad(self) -> int:
        return self.width * self.student_bytes


@dataclass(frozen=True)
class Nonzeros:
    """Of W.

    Attributes:
        more: but for the first of each student token.
        alone, several: columns of one token, and of more.
        entries: of the columns of several tokens.
        alone_tokens, several_tokens: distinct tokens in either.
    """

    more: int
    alone: int
    several: int
    entries: int
    alone_tokens: int
    several_tokens: int

    @classmethod
    def of(cls, projection: SparseProjection) -> Nonzeros:
        """Counted in a W."""
        made = w_map(projection)
        alone = made.code[made.code >= 0]
        return cls(
            len(made.more), len(alone), made.several, len(made.source),
            len(torch.unique(alone)), len(torch.unique(made.source)),
        )  # fmt: skip


def same_vocab_bytes(sizes: Sizes) -> dict[str, float]:
    """By kernel, of `same-vocab-kl`."""
    rows = sizes._z + sizes.teacher * sizes.teacher_bytes
    return {"stats": rows, "gradient": rows + sizes._grad}


def cross_entropy_bytes(sizes: Sizes, way: Way = "alone") -> dict[str, float]:
    """By kernel, of cross-entropy.

    Args:
        way: a gradient of its own; `added` to one that is there already; `joined`: another loss's
            kernel writes it with its own, and has read the row anyway.
    """
    writes = {"alone": 1, "added": 2, "joined": 0}[way]
    found: dict[str, float] = {"row_parts": sizes._z}
    if writes:
        found["gradient"] = sizes._z + writes * sizes._grad
    return found


def p_kl_bytes(
    sizes: Sizes,
    w: Nonzeros,
    kept: int | None = None,
    scope: Scope = "chunk",
    *,
    tail: bool = False,
) -> dict[str, float]:
    """By kernel, of `p-kl`.

    Args:
        kept: how many columns; None for all that W reaches.
        scope: whose they are.
        tail: whether there is a tail, which needs columns that are not kept.
    """
    supported, words = w.alone + w.several, -(-sizes.teacher // 32)
    logits = sizes.teacher * sizes.teacher_bytes
    # Of the columns of several tokens, the share that is kept.
    said = 1.0 if kept is None else kept / supported
    if scope == "stored":
        logits, said = 0, 0.0
        room = SCRATCH // (sizes.teacher + 2 * w.several)
        sizes = replace(sizes, rows=min(sizes.rows, room))
    by_row = (12 * sizes.student + 8 * w.more) / sizes.rows
    found: dict[str, float] = {
        "shared_columns": w.several_tokens * sizes.student_bytes
        + (8 + said * sizes.teacher_bytes) * w.several
        + (8 * w.several + 8 * w.entries) / sizes.rows
    }
    if kept is None:
        codes = 4 * (sizes.teacher + w.alone) / sizes.rows
        found["columns"] = logits + w.alone_tokens * sizes.student_bytes + 4 * w.several + codes
        gathered = w.alone * sizes.teacher_bytes + 4 * w.several
        found["gradient"] = sizes._z + gathered + sizes._grad + by_row
        return found
    bits = 4 * words / (sizes.rows if scope == "microbatch" else 1)
    if scope == "chunk":
        passes = {2: 2, 4: 4}[sizes.teacher_bytes] + 1
        reached = supported * sizes.teacher_bytes
        found["largest"] = passes * reached + bits + 4 * sizes.teacher / sizes.rows
    elif scope == "microbatch":
        # The sums of 64 rows are written and read once more.
        found["row_parts"], found["column_mass"] = logits, logits + 8 * sizes.teacher / 64
        if not tail:
            logits = kept * sizes.teacher_bytes
    else:
        # Ids and log-probabilities; the words of the bits read and written.
        found["zeros"], found["mark"] = bits, kept * 8 + min(kept, words) * 8
        logits = kept * 8
    # Of all rows together, what any of them keeps.
    any_row = kept if scope == "microbatch" else min(sizes.rows * kept, supported)
    found["columns"] = logits + kept * sizes.student_bytes + 8 * any_row / sizes.rows
    # What is between log q and log s is written of listed columns, and of logits computed again.
    again = sizes.teacher_bytes * kept
    found["columns"] += 4 * kept if scope == "stored" else bits
    if tail:
        found["student_sums"] = sizes._z + bits + 4 * w.several + by_row
    found["gradient"] = sizes._z + bits + 4 * w.several + sizes._grad + by_row
    found["gradient"] += 4 * kept if scope == "stored" else again
    return found


def exact_bytes(
    sizes: Sizes, groups: float, tokens: float, *, by_depth: bool = False
) -> dict[str, float]:
    """By kernel, of `exact-kl`, with so many groups and tokens in them a position; without the
    chain rule groups have weights."""
    bits = 4 * -(-sizes.student // 32)
    gathered = tokens * (16 + sizes.student_bytes)
    return {
        "mark": 16 * tokens + 2 * bits,
        "group_logs": gathered - 8 * tokens + 20 * groups,
        "tail_parts": sizes._z + bits,
        "positions": (20 + 8 * by_depth) * groups,
        "tail_gradient": sizes._z + bits + sizes._grad - tokens * sizes.student_bytes,
        "group_gradient": gathered + tokens * sizes.student_bytes + (20 + 16 * by_depth) * groups,
    }


@dataclass(frozen=True)
class Prefixes:
    """What prefix KL compares beyond the root, in the mean of a chunk.

    Attributes:
        slots: of the student's tokens below nodes.
        tokens: below all nodes.
        first_tokens: below each chunk's first one.
        mirrored: prefixes at which the student says the next piece, each a row of its own.
    """

    slots: float
    tokens: float
    first_tokens: float
    mirrored: float


def prefix_bytes(sizes: Sizes, root: dict[str, float], found: Prefixes) -> dict[str, float]:
    """By kernel, of `prefix-kl` with this root."""
    bits = 4 * -(-sizes.student // 32)
    return {
        **{f"root {name}": value for name, value in root.items()},
        "slots": found.tokens * (8 + sizes.student_bytes) + 20 * found.slots,
        "items": found.slots * (4 + 8 + 4 + 1 + 12),
        "prefix gradient": found.tokens * 8
        + 12 * found.slots
        + found.first_tokens * (8 + 3 * sizes.student_bytes),
        "mirrored": found.mirrored * (2 * sizes._z + 2 * sizes._grad + 4 * bits),
    }
