"""Rows of all columns above a probability, and what spreads the rest: in memory, and in bytes."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from xtoken._tensor_files import Array
from xtoken.errors import DamagedStoreError
from xtoken.teachers.predictions import Predictions

# A prior's code c is exp(-0.1 c) of its largest: 25 nats, in steps that change no mass by 5 %.
_PRIOR_STEP = 0.1
# What a row may leave: below, 1 - mass has lost its digits.
_LEAST_REST = 1e-7


@dataclass(frozen=True)
class KeptRows:
    """The likeliest columns of each position of one sequence, as many as a row has.

    Attributes:
        counts: [T] int64, columns of each row.
        ids: [M] int64, all rows' columns one after another, rising within a row.
        log_probs: [M] float32, under the full softmax.
        log_mass: [T] float32, of each row's kept columns together.
        token_log_probs: [T] float32, of the token that follows; 0 at the last, which none follows.
        log_prior: [V] float32, how the rest is spread over what is not kept; None where rows are
            made, before the rows of a whole file say it.
    """

    counts: NDArray[np.int64]
    ids: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    log_mass: NDArray[np.float32]
    token_log_probs: NDArray[np.float32]
    log_prior: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.counts)

    def head(self, length: int) -> KeptRows:
        """Those of the first `length` tokens alone."""
        columns = int(self.counts[:length].sum())
        tokens = self.token_log_probs[:length].copy()
        tokens[-1:] = 0.0
        return replace(
            self,
            counts=self.counts[:length],
            ids=self.ids[:columns],
            log_probs=self.log_probs[:columns],
            log_mass=self.log_mass[:length],
            token_log_probs=tokens,
        )

    def log_scale(self) -> NDArray[np.float32]:
        """[T] what each row adds to `log_prior` at the columns that it does not keep."""
        assert self.log_prior is not None
        priors = np.exp(self.log_prior[self.ids].astype(np.float64))
        others = 1.0 - np.bincount(self._rows(), weights=priors, minlength=len(self))
        rest = -np.expm1(self.log_mass.astype(np.float64))
        scale = np.log(np.maximum(rest, _LEAST_REST)) - np.log(np.maximum(others, 1e-12))
        found: NDArray[np.float32] = scale.astype(np.float32)
        return found

    def predictions(self) -> Predictions:
        """The same by falling log-probability, without the prior."""
        rows, width = self._rows(), int(self.counts.max(initial=1))
        order = np.lexsort((-self.log_probs, rows))
        named = np.arange(width) < self.counts[:, None]
        ids = np.zeros(named.shape, np.int64)
        ids[named] = self.ids[order]
        log_probs = np.full(named.shape, -np.inf, np.float32)
        log_probs[named] = self.log_probs[order]
        return Predictions(ids, log_probs, self.token_log_probs)

    def _rows(self) -> NDArray[np.int64]:
        return np.repeat(np.arange(len(self)), self.counts)


@dataclass(frozen=True)
class Rest:
    """What some rows leave to the columns that they do not keep, of which a prior is made.

    A column's share of the rest is estimated over those rows alone that do not keep it, as where
    it is kept nothing of it is in the rest.

    Attributes:
        mass: [V] float64, by column: the mass of the rows that do not keep it.
        left: [V] float64, by column: all the rest of these rows.
    """

    mass: NDArray[np.float64]
    left: NDArray[np.float64]

    def __add__(self, other: Rest) -> Rest:
        return Rest(self.mass + other.mass, self.left + other.left)

    def codes(self) -> NDArray[np.uint8]:
        """[V] uint8: the prior as it is stored."""
        prior = np.divide(self.mass, self.left, out=np.zeros_like(self.mass), where=self.left > 0)
        with np.errstate(divide="ignore"):
            steps = np.log(np.maximum(prior / max(prior.max(initial=0.0), 1e-300), 1e-300))
        found: NDArray[np.uint8] = np.clip(np.rint(-steps / _PRIOR_STEP), 0, 255).astype(np.uint8)
        return found


def pack_rows(
    sequences: Sequence[NDArray[np.int64]], rows: Sequence[KeptRows], rest: Rest, min_prob: float
) -> dict[str, Array]:
    """The arrays of a file of such rows, but for the digests and the tokens.

    `prior` [V] uint8; `starts` [S + 1] and `data_starts` [S + 1]: where each sequence begins among
    the tokens and in `data`; `counts`, `log_mass`, `token_log_probs` [N]; `data` [D] uint8: each
    sequence's zlib streams, see `_block`.
    """
    codes = rest.codes()
    rank = np.empty(len(codes), np.int64)
    rank[_by_prior(codes)] = np.arange(len(codes))
    blocks = [_block(each, rank, min_prob) for each in rows]
    counts = np.concatenate([each.counts for each in rows])
    return {
        "prior": codes,
        "starts": np.cumsum([0, *map(len, sequences)], dtype=np.int64),
        "data_starts": np.cumsum([0, *map(len, blocks)], dtype=np.int64),
        "counts": counts.astype(np.uint16 if counts.max(initial=0) < 2**16 else np.int32),
        "log_mass": np.concatenate([each.log_mass for each in rows]).astype(np.float16),
        "token_log_probs": np.concatenate([each.token_log_probs for each in rows]),
        "data": np.frombuffer(b"".join(blocks), np.uint8),
    }


def unpack_rows(
    arrays: Mapping[str, Array],
    tokens: NDArray[np.int64],
    sequence: int,
    min_prob: float,
    length: int | None = None,
) -> KeptRows:
    """The rows of the sequence at an index, or of its first `length` tokens.

    Args:
        tokens: all of the sequence, which its rows keep.

    Raises:
        DamagedStoreError: they cannot be read.
    """
    start, stop = (int(place) for place in arrays["starts"][sequence : sequence + 2])
    first, last = (int(place) for place in arrays["data_starts"][sequence : sequence + 2])
    log_prior, order = read_prior(arrays["prior"].tobytes())
    counts = arrays["counts"][start:stop].astype(np.int64)
    row = np.repeat(np.arange(len(counts)), counts)
    ranks, codes = _read_block(arrays["data"][first:last].tobytes(), counts, len(order))
    # By column within a row; so far they are by rank.
    keys = row * len(order) + order[ranks]
    by_column = np.argsort(keys)
    keys = keys[by_column]
    mass = np.exp(arrays["log_mass"][start:stop].astype(np.float64))
    token = arrays["token_log_probs"][start:stop].astype(np.float32)
    probs = _probs_of(codes[by_column], min_prob)
    # The token that follows is exact; the others share what it leaves of the row's mass.
    wanted = np.arange(len(tokens) - 1) * len(order) + tokens[1:]
    at = np.searchsorted(keys, wanted)
    if (at >= len(keys)).any() or (keys[at] != wanted).any():
        raise DamagedStoreError("a row lacks the token that follows; remove the file")
    known = np.exp(token[:-1].astype(np.float64))
    probs[at] = 0.0
    others = np.bincount(row, weights=probs, minlength=len(counts))
    left = mass - np.append(known, 0.0)
    factor = np.maximum(left, 1e-3 * others) / np.maximum(others, 1e-300)
    probs *= factor[row]
    probs[at] = known
    log_probs = np.log(np.maximum(probs, 1e-38)).astype(np.float32)
    log_probs[at] = token[:-1]
    found = KeptRows(
        counts,
        keys - row * len(order),
        log_probs,
        np.log(mass).astype(np.float32),
        token,
        log_prior,
    )
    return found if length is None or length == len(counts) else found.head(length)


def rows_fit(arrays: Mapping[str, Array], top_k: int) -> bool:
    """Whether all arrays of a file are there and fit one another."""
    names = ["digests", "tokens", "prior", "starts", "data_starts", "counts", "log_mass"]
    if any(name not in arrays for name in [*names, "token_log_probs", "data"]):
        return False
    sequences, tokens = len(arrays["digests"]), len(arrays["counts"])
    sizes = {
        "starts": sequences + 1,
        "data_starts": sequences + 1,
        **dict.fromkeys(("tokens", "tokens_high", "log_mass", "token_log_probs"), tokens),
    }
    if any(arrays[name].shape != (size,) for name, size in sizes.items() if name in arrays):
        return False
    for name, total in (("starts", tokens), ("data_starts", len(arrays["data"]))):
        places = arrays[name].astype(np.int64)
        if places[0] != 0 or places[-1] != total or (np.diff(places) < 0).any():
            return False
    counts = arrays["counts"].astype(np.int64)
    # The likeliest, and the token that follows.
    most = min(top_k + 1, len(arrays["prior"]))
    return bool(((counts >= 1) & (counts <= most)).all()) and arrays["prior"].dtype == np.uint8


def _by_prior(codes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """[V] the columns by falling prior, equal ones by id."""
    return np.argsort(codes, kind="stable")


@functools.lru_cache(maxsize=16)
def read_prior(codes: bytes) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Log of a prior [V], and the columns by it [V]."""
    found = np.frombuffer(codes, np.uint8)
    log_prior = -_PRIOR_STEP * found.astype(np.float64)
    log_prior -= np.log(np.exp(log_prior).sum())
    return log_prior.astype(np.float32), _by_prior(found)


def _block(rows: KeptRows, rank: NDArray[np.int64], min_prob: float) -> bytes:
    """A sequence's columns: zlib streams of the bytes of the gaps between ranks, the lowest
    first, and of the codes of the probabilities, by rising rank within a row."""
    row = rows._rows()
    ranks = rank[rows.ids]
    order = np.lexsort((ranks, row))
    ranks = ranks[order]
    gaps = np.diff(ranks, prepend=-1) - 1
    first = np.cumsum(rows.counts) - rows.counts
    gaps[first] = ranks[first]
    planes = [(gaps >> 8 * at & 0xFF).astype(np.uint8) for at in range(_planes(len(rank)))]
    codes = _codes_of(np.exp(rows.log_probs[order].astype(np.float64)), min_prob)
    # Repeats are found among the high bytes alone; the others are noise to be counted.
    parts = [_deflated(planes[0], zlib.Z_HUFFMAN_ONLY)]
    parts += [_deflated(plane, zlib.Z_DEFAULT_STRATEGY) for plane in planes[1:]]
    return b"".join([*parts, _deflated(codes, zlib.Z_HUFFMAN_ONLY)])


def _read_block(
    data: bytes, counts: NDArray[np.int64], columns: int
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    size = int(counts.sum())
    parts = []
    for _ in range(_planes(columns) + 1):
        stream = zlib.decompressobj()
        try:
            found = stream.decompress(data, size + 1)
        except zlib.error as error:
            raise DamagedStoreError(f"a row cannot be read ({error}); remove the file") from error
        if len(found) != size:
            raise DamagedStoreError(
                f"a sequence has {len(found)} columns, expected {size}; remove the file"
            )
        data = stream.unused_data
        parts.append(np.frombuffer(found, np.uint8))
    gaps = np.zeros(size, np.int64)
    for at, plane in enumerate(parts[:-1]):
        gaps += plane.astype(np.int64) << 8 * at
    ranks = np.cumsum(gaps + 1)
    first = np.cumsum(counts) - counts
    # Where a row begins, what came before counts no more.
    ranks -= np.repeat(ranks[first] - gaps[first], counts)
    if size and not 0 <= int(ranks.min()) <= int(ranks.max()) < columns:
        raise DamagedStoreError(f"a row names a column beyond {columns}; remove the file")
    return ranks, parts[-1]


def _planes(columns: int) -> int:
    """Bytes of a gap."""
    return 2 if columns <= 2**16 else 3


def _deflated(values: NDArray[np.uint8], strategy: int) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, strategy)
    return stream.compress(values.tobytes()) + stream.flush()


def _codes_of(probs: NDArray[np.float64], min_prob: float) -> NDArray[np.uint8]:
    """Fourth roots in 256 steps from that of `min_prob` to 1. Square roots would cost a KL the
    same in each column, but are coarse where a flat row has most of its columns."""
    least = min_prob**0.25
    steps = np.floor((probs**0.25 - least) / (1.0 - least) * 256)
    found: NDArray[np.uint8] = np.clip(steps, 0, 255).astype(np.uint8)
    return found


def _probs_of(codes: NDArray[np.uint8], min_prob: float) -> NDArray[np.float64]:
    least = min_prob**0.25
    found: NDArray[np.float64] = (least + (codes + 0.5) / 256 * (1.0 - least)) ** 4
    return found
