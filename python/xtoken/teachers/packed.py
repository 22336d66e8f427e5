"""Predictions of several sequences as flat arrays: short rows, ids of two or three bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from xtoken._tensor_files import Array
from xtoken.teachers.predictions import Predictions

StoreDtype: TypeAlias = Literal["float32", "float16", "uint8", "spread"]
STORE_DTYPES: tuple[str, ...] = get_args(StoreDtype)

# Of uint8, in nats: rounding changes a probability by 2.5 % at most, and what lies below
# exp(-12.75) is raised to it. The kept mass of each row is stored beside, and restored.
STEP = 0.05


def pack(
    sequences: Sequence[NDArray[np.int64]], predictions: Sequence[Predictions], dtype: str
) -> dict[str, Array]:
    """The arrays of a file, N tokens and M columns over all sequences.

    `starts` [S + 1] and `column_starts` [S + 1]: where each sequence begins; `tokens` [N]: the
    sequences themselves; `counts` [N]: columns of each row; `ids` [M] and `log_probs` [M];
    `log_mass` [N], of uint8: the log of each row's sum, which is restored; `token_log_probs` [N];
    what exceeds 16 bits of ids is in `ids_high`, `tokens_high`.
    """
    kept = [~np.isneginf(item.log_probs) for item in predictions]
    counts = np.concatenate([rows.sum(-1) for rows in kept]) if kept else np.zeros(0, np.int64)
    values = _joined([item.log_probs[rows] for item, rows in zip(predictions, kept, strict=True)])
    arrays: dict[str, Array] = {
        "starts": np.cumsum([0, *map(len, sequences)], dtype=np.int64),
        "column_starts": np.cumsum([0, *(int(rows.sum()) for rows in kept)], dtype=np.int64),
        "counts": counts.astype(np.uint16 if counts.max(initial=0) < 2**16 else np.int32),
        "token_log_probs": _joined([item.token_log_probs for item in predictions]).astype(
            np.float32
        ),
        **split_ids("tokens", _joined(sequences)),
        **split_ids(
            "ids", _joined([item.ids[rows] for item, rows in zip(predictions, kept, strict=True)])
        ),
    }
    if dtype == "uint8":
        codes = np.rint(-values.astype(np.float64) / STEP)
        arrays["log_probs"] = np.clip(codes, 0, 255).astype(np.uint8)
    else:
        arrays["log_probs"] = values.astype(dtype)
    if dtype == "uint8":
        masses = [_log_mass(item.log_probs.astype(np.float64)) for item in predictions]
        arrays["log_mass"] = np.minimum(_joined(masses), 0.0).astype(np.float16)
    return arrays


def unpack(
    arrays: Mapping[str, Array], sequence: int, dtype: str, length: int | None = None
) -> Predictions:
    """The predictions of the sequence at an index, or of its first `length` tokens."""
    start, stop = (int(place) for place in arrays["starts"][sequence : sequence + 2])
    whole = length is None or length == stop - start
    if length is not None:
        stop = start + length
    counts = arrays["counts"][start:stop].astype(np.int64)
    first = int(arrays["column_starts"][sequence])
    part = slice(first, first + int(counts.sum()))
    width = int(counts.max(initial=1))
    flat = arrays["log_probs"][part].astype(np.float32)
    if dtype == "uint8":
        flat *= np.float32(-STEP)
    if bool((counts == width).all()):
        ids = _whole("ids", arrays, part).reshape(-1, width)
        log_probs = flat.reshape(-1, width)
    else:
        named = np.arange(width) < counts[:, None]  # [T, K]
        ids = np.zeros(named.shape, np.int64)
        ids[named] = _whole("ids", arrays, part)
        log_probs = np.full(named.shape, -np.inf, np.float32)
        log_probs[named] = flat
    if dtype != "float32":
        found = _log_mass(log_probs)
        # Rounded up, what is nearly all mass may be more than all.
        bound = arrays["log_mass"][start:stop] if dtype == "uint8" else np.minimum(found, 0.0)
        log_probs -= np.where(counts > 0, found - bound, 0.0)[:, None].astype(np.float32)
    tokens = arrays["token_log_probs"][start:stop].astype(np.float32)
    if not whole:
        tokens[-1:] = 0.0  # none follows the last
    return Predictions(ids, log_probs, tokens)


def tokens_of(
    arrays: Mapping[str, Array], sequence: int, length: int | None = None
) -> NDArray[np.int64]:
    """The tokens of the sequence at an index, or its first ones."""
    start, stop = (int(place) for place in arrays["starts"][sequence : sequence + 2])
    return _whole("tokens", arrays, slice(start, stop if length is None else start + length))


def fits(arrays: Mapping[str, Array], dtype: str, top_k: int) -> bool:
    """Whether all arrays are there and fit one another."""
    names = ["digests", "starts", "column_starts", "counts", "ids", "log_probs", "tokens"]
    names += ["token_log_probs"] + (["log_mass"] if dtype == "uint8" else [])
    if any(name not in arrays for name in names):
        return False
    counts, sequences = arrays["counts"].astype(np.int64), len(arrays["digests"])
    tokens, columns = len(counts), int(counts.sum())
    sizes = {
        "starts": sequences + 1,
        "column_starts": sequences + 1,
        **dict.fromkeys(("tokens", "tokens_high", "token_log_probs", "log_mass"), tokens),
        **dict.fromkeys(("ids", "ids_high", "log_probs"), columns),
    }
    if any(arrays[name].shape != (size,) for name, size in sizes.items() if name in arrays):
        return False
    for name, total in (("starts", tokens), ("column_starts", columns)):
        places = arrays[name]
        if places[0] != 0 or places[-1] != total or (np.diff(places) < 0).any():
            return False
    ends = np.cumsum([0, *counts])[arrays["starts"]]
    return (
        bool((ends == arrays["column_starts"]).all())
        and int(counts.max(initial=0)) <= top_k
        and arrays["log_probs"].dtype == dtype
    )


def _log_mass(log_probs: NDArray[Any]) -> NDArray[Any]:
    with np.errstate(divide="ignore", invalid="ignore"):
        mass: NDArray[Any] = np.log(np.exp(log_probs).sum(-1))
    return mass


def split_ids(name: str, values: NDArray[np.int64]) -> dict[str, Array]:
    """Ids as arrays of 16 bits, with a second one of what exceeds them; beyond 24 bits whole."""
    low: dict[str, Array] = {name: (values & 0xFFFF).astype(np.uint16)}
    if values.max(initial=0) < 2**16:
        return low
    if values.max() < 2**24:
        return low | {f"{name}_high": (values >> 16).astype(np.uint8)}
    return {name: values.astype(np.int64)}


def _whole(name: str, arrays: Mapping[str, Array], part: slice) -> NDArray[np.int64]:
    values: NDArray[np.int64] = arrays[name][part].astype(np.int64)
    high = arrays.get(f"{name}_high")
    return values if high is None else values + (high[part].astype(np.int64) << 16)


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0)
