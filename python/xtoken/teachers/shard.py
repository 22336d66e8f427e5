"""One file of stored teacher predictions: written whole or not at all, read by memory map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xtoken._checks import check_number, expect
from xtoken._tensor_files import Array, read_metadata, read_tensors, write_tensors
from xtoken.errors import (
    DamagedStoreError,
    ForeignFileError,
    FormatError,
    MissingFileError,
    OptionError,
    PairError,
    StoreError,
)
from xtoken.teachers.kept_rows import KeptRows, Rest, pack_rows, read_prior, rows_fit, unpack_rows
from xtoken.teachers.packed import STORE_DTYPES, fits, pack, split_ids, tokens_of, unpack
from xtoken.teachers.predictions import Predictions as Predictions

FORMAT = "xtoken-teacher-top-k-3"
SPREAD_FORMAT = "xtoken-teacher-spread-1"
# Rows of one length, without the tokens that they are of.
_FIXED_FORMAT = "xtoken-teacher-top-k-2"
_FORMATS = (FORMAT, _FIXED_FORMAT, SPREAD_FORMAT)
DIGEST_BYTES = 16


@dataclass(frozen=True)
class StoreKey:
    """What stored predictions depend on besides the token ids.

    Attributes:
        teacher: fingerprint of the teacher's weights.
        top_k: number of kept columns per position, at most.
        dtype: `float32`, `float16` or `uint8`, of the stored log-probabilities: in steps of 0.05,
            and each row's sum beside them, which is restored. Or `spread`: the columns of at least
            `min_prob` in about a byte each, and a prior by which the rest is spread.
        tokenizer: fingerprint of the teacher's vocabulary; empty where it is not known.
        mass: of each row only the likeliest columns that reach this much are kept; None for all
            `top_k`.
        min_prob: with `spread` alone: the probability from which a column is kept.

    Raises:
        OptionError: a value is out of range.
        ArgumentTypeError: a fingerprint is none.
    """

    teacher: str
    top_k: int
    dtype: str
    tokenizer: str = ""
    mass: float | None = None
    min_prob: float | None = None

    def __post_init__(self) -> None:
        expect(self.teacher, str, "teacher", "pass teacher.fingerprint")
        expect(self.tokenizer, str, "tokenizer", "pass vocab.fingerprint")
        if self.dtype not in STORE_DTYPES:
            expected = ", ".join(map(repr, STORE_DTYPES))
            raise OptionError(f"dtype = {self.dtype!r}, expected one of {expected}")
        check_number("top_k", self.top_k, 1, rule=", expected at least 1", whole=True)
        if self.mass is not None and not 0 < self.mass < 1:
            raise OptionError(
                f"mass = {self.mass}, expected a share inside (0, 1), or None for all top_k columns"
            )
        if self.dtype != "spread" and self.min_prob is not None:
            raise OptionError(
                f"min_prob = {self.min_prob} with dtype = {self.dtype!r}; pass dtype='spread', "
                "which keeps what reaches it, or a mass"
            )
        if self.dtype == "spread" and self.mass is not None:
            raise OptionError(
                f"mass = {self.mass} with dtype = 'spread', which keeps columns by their own "
                "probability; pass min_prob, or another dtype"
            )
        if self.dtype == "spread" and not (self.min_prob and 1e-9 <= self.min_prob <= 0.1):
            raise OptionError(
                f"min_prob = {self.min_prob}, expected a probability from 1e-9 to 0.1 with dtype = "
                "'spread', such as 2e-5"
            )

    @property
    def is_spread(self) -> bool:
        """Whether what is not kept is spread by a prior, so that it is read as full logits are."""
        return self.dtype == "spread"

    def metadata(self) -> dict[str, str]:
        """The header entries that every file of the store carries."""
        found = {name: str(value) for name, value in asdict(self).items()}
        if not self.is_spread:
            del found["min_prob"]
        return {"format": SPREAD_FORMAT if self.is_spread else FORMAT} | found

    @classmethod
    def of(cls, path: Path) -> StoreKey:
        """The key that a file was written with.

        Raises:
            DamagedStoreError: its header is damaged.
            MissingFileError: there is no such file.
            StoreError: it is no file of a store, or cannot be opened.
        """
        try:
            found = read_metadata(path, "a file of a store of teacher predictions")
            if found.get("format") not in _FORMATS:
                raise StoreError(
                    f"{path} holds no teacher predictions (format = {found.get('format')!r}); "
                    "pass the folder that xtoken teach wrote"
                )
            mass, min_prob = (found.get(name, "None") for name in ("mass", "min_prob"))
            return cls(
                found["teacher"],
                int(found["top_k"]),
                found["dtype"],
                found.get("tokenizer", ""),
                None if mass == "None" else float(mass),
                None if min_prob == "None" else float(min_prob),
            )
        except MissingFileError:
            raise
        except OSError as error:
            raise _unopened(path, error) from error
        except (FormatError, KeyError, ValueError) as error:
            if isinstance(error, StoreError):
                raise
            raise DamagedStoreError(f"{path} is damaged ({error}); remove it") from error


class Shard:
    """A read-only, memory-mapped file with the predictions of several sequences.

    Args:
        path: of the file.
        key: what it must have been written for; its tokenizer only where both are known.

    Attributes:
        digests: of the sequences, in their order.
        has_tokens: whether the sequences themselves are stored, as in all but old files.

    Raises:
        DamagedStoreError: the file is cut off or altered.
        StoreError: it cannot be opened, is another file, or is of another teacher or setting.
        PairError: it is of another tokenizer.
    """

    def __init__(self, path: Path, key: StoreKey) -> None:
        self.path = path
        try:
            file = read_tensors(path, _FORMATS, "teacher predictions", "a file of this store")
        except ForeignFileError as error:
            raise StoreError(f"{error}; use another folder, or move the file elsewhere") from error
        except FormatError as error:
            raise DamagedStoreError(str(error)) from error
        except MissingFileError:
            raise
        except OSError as error:
            raise _unopened(path, error) from error
        _check_key(path, file.metadata, key)
        self._key = key
        self._arrays: Mapping[str, Array] = file.arrays
        self.has_tokens = file.metadata["format"] != _FIXED_FORMAT
        if not self.has_tokens:
            self._arrays = _of_fixed_rows(file.arrays, key, path)
        elif not (
            rows_fit(self._arrays, key.top_k)
            if key.is_spread
            else fits(self._arrays, key.dtype, key.top_k)
        ):
            raise DamagedStoreError(f"{path} holds tensors that do not fit one another; remove it")
        self.digests: list[bytes] = [row.tobytes() for row in self._arrays["digests"]]

    def length(self, index: int) -> int:
        """Number of tokens of the sequence at `index` of `digests`."""
        starts = self._arrays["starts"]
        return int(starts[index + 1] - starts[index])

    def tokens(self, index: int, length: int | None = None) -> NDArray[np.int64]:
        """The first `length` tokens of a sequence, or all."""
        return tokens_of(self._arrays, index, length)

    def read(self, index: int, length: int | None = None) -> Predictions:
        """The predictions of the sequence at `index` of `digests`, or of its first tokens."""
        if self._key.is_spread:
            return self.rows(index, length).predictions()
        return unpack(self._arrays, index, self._key.dtype, length)

    def rows(self, index: int, length: int | None = None) -> KeptRows:
        """As `read`, with the prior; of `spread` alone.

        Raises:
            DamagedStoreError: they cannot be read, though the file is as it was written.
        """
        assert self._key.min_prob is not None
        tokens = self.tokens(index)
        try:
            return unpack_rows(self._arrays, tokens, index, self._key.min_prob, length)
        except DamagedStoreError as error:
            raise DamagedStoreError(f"{self.path}: {error}") from error

    @property
    def columns(self) -> int:
        """Columns of all rows together, of `spread` alone."""
        return int(self._arrays["counts"].sum(dtype=np.int64))

    @property
    def rows_held(self) -> int:
        """Rows of all sequences, of `spread` alone."""
        return len(self._arrays["counts"])

    @property
    def log_prior(self) -> NDArray[np.float32]:
        """[V], of `spread` alone."""
        return read_prior(self._arrays["prior"].tobytes())[0]

    @property
    def prior_bytes(self) -> int:
        """Bytes of the prior, which do not grow with the tokens."""
        return int(self._arrays["prior"].nbytes) if self._key.is_spread else 0


def _unopened(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{path} cannot be opened ({error.strerror or error}); correct its permissions, or use "
        "another folder"
    )


def _check_key(path: Path, found: dict[str, str], key: StoreKey) -> None:
    expected = key.metadata()
    expected.pop("format")
    tokenizer, wanted = found.get("tokenizer", ""), expected.pop("tokenizer")
    for name, value in expected.items():
        given = found.get(name, "None")
        if given != value:
            raise StoreError(
                f"{path} has {name} = {given!r}, expected {value!r}; "
                "it was written for another teacher or setting: use another folder, or move the "
                "file elsewhere"
            )
    if tokenizer and wanted and tokenizer != wanted:
        raise PairError(
            f"{path} was made with the teacher tokenizer {tokenizer[:12]}, expected {wanted[:12]}; "
            "its ids are other tokens here: use another folder, or the tokenizer that it is of"
        )


def _of_fixed_rows(arrays: Mapping[str, Array], key: StoreKey, path: Path) -> dict[str, Array]:
    """The arrays of `pack`, but for the tokens, from rows of `top_k` columns each."""
    names = ("digests", "starts", "ids", "log_probs", "token_log_probs")
    missing = [name for name in names if name not in arrays]
    if missing:
        raise DamagedStoreError(f"{path} lacks the tensor {missing[0]}; remove it")
    shapes = {name: arrays[name].shape for name in names}
    starts = arrays["starts"].astype(np.int64)
    tokens, count = shapes["ids"][0] if shapes["ids"] else -1, len(arrays["digests"])
    fit = (
        shapes["digests"] == (count, DIGEST_BYTES)
        and shapes["ids"] == shapes["log_probs"] == (tokens, key.top_k)
        and shapes["token_log_probs"] == (tokens,)
        and starts.shape == (count + 1,)
        and starts[0] == 0
        and starts[-1] == tokens
        and bool((np.diff(starts) >= 0).all())
        and arrays["log_probs"].dtype == key.dtype
    )
    if not fit:
        raise DamagedStoreError(f"{path} holds tensors that do not fit one another; remove it")
    return {
        "digests": arrays["digests"],
        "starts": starts,
        "column_starts": starts * key.top_k,
        "counts": np.full(tokens, key.top_k, np.int32),
        "ids": arrays["ids"].reshape(-1),
        "log_probs": arrays["log_probs"].reshape(-1),
        "token_log_probs": arrays["token_log_probs"],
    }


def write_rows(
    path: Path,
    key: StoreKey,
    digests: Sequence[bytes],
    sequences: Sequence[NDArray[np.int64]],
    rows: Sequence[KeptRows],
    rest: Rest,
) -> None:
    """Write a file of `spread` whole or not at all, with a checksum.

    Raises:
        FailedWriteError: the folder cannot be written or is full.
    """
    assert key.min_prob is not None
    arrays = pack_rows(sequences, rows, rest, key.min_prob)
    arrays |= split_ids("tokens", np.concatenate(sequences))
    arrays["digests"] = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)
    write_tensors(path, arrays, key.metadata())


def write_shard(
    path: Path,
    key: StoreKey,
    digests: Sequence[bytes],
    sequences: Sequence[NDArray[np.int64]],
    predictions: Sequence[Predictions],
) -> None:
    """Write a file whole or not at all, with a checksum.

    Raises:
        NonFiniteError, StoreError: a prediction is none, see `Predictions.check`.
        FailedWriteError: the folder cannot be written or is full.
    """
    for item in predictions:
        item.check()
    arrays = pack(sequences, predictions, key.dtype)
    arrays["digests"] = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)
    write_tensors(path, arrays, key.metadata())
