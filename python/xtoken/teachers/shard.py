"""One file of stored teacher predictions: written whole or not at all, read by memory map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xtoken._tensor_files import Array, read_tensors, write_tensors
from xtoken.errors import (
    DamagedStoreError,
    ForeignFileError,
    FormatError,
    MissingFileError,
    NonFiniteError,
    PairError,
    StoreError,
)

FORMAT = "xtoken-teacher-top-k-2"
DIGEST_BYTES = 16
# A softmax in float32 or bfloat16 sums to 1 within this.
_MASS_TOLERANCE = 1e-2


@dataclass(frozen=True)
class StoreKey:
    """What stored predictions depend on besides the token ids.

    Attributes:
        teacher: fingerprint of the teacher's weights.
        top_k: number of kept columns per position.
        dtype: `float32` or `float16`, of the stored log-probabilities.
        tokenizer: fingerprint of the teacher's vocabulary; empty where it is not known.
    """

    teacher: str
    top_k: int
    dtype: str
    tokenizer: str = ""

    def metadata(self) -> dict[str, str]:
        """The header entries that every file of the store carries."""
        return {"format": FORMAT} | {name: str(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Predictions:
    """Teacher predictions of one token sequence; row `i` predicts token `i + 1`.

    Attributes:
        ids: [T, K] int64, teacher columns, falling log-probability.
        log_probs: [T, K] float32, natural logarithm, of the full softmax.
        token_log_probs: [T] float32, of the token that follows; 0 at the last, which none follows.
    """

    ids: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    token_log_probs: NDArray[np.float32]

    def check(self) -> None:
        """Refuse what no softmax gives, before it is stored for good.

        Raises:
            NonFiniteError: a log-probability is NaN or above 0 without bound.
            StoreError: the rows of a position have more than all mass, or name a column twice.
        """
        for name in ("log_probs", "token_log_probs"):
            values = getattr(self, name)
            # -inf is a column that the teacher rules out.
            bad = np.isnan(values) | np.isposinf(values)
            if bad.any():
                position = int(np.argwhere(bad)[0][0])
                raise NonFiniteError(
                    f"the teacher predicts {values[bad][0]} at position {position} of a sequence "
                    f"of {len(values)} tokens; it overflows in its dtype: load it in float32, or "
                    "leave the text out"
                )
        mass = np.exp(self.log_probs.astype(np.float64)).sum(axis=-1)
        if len(mass) and float(mass.max()) > 1 + _MASS_TOLERANCE:
            position = int(mass.argmax())
            raise StoreError(
                f"the predictions of position {position} sum to {mass[position]:.4g}, expected at "
                "most 1; pass log-probabilities under the full softmax, not logits"
            )
        # -inf pads a short row, whatever its id.
        padding = -1 - np.arange(self.ids.shape[-1])
        ordered = np.sort(np.where(np.isneginf(self.log_probs), padding, self.ids), axis=-1)
        twice = ordered[:, 1:] == ordered[:, :-1]
        if twice.any() or (self.ids < 0).any():
            raise StoreError("a position names a teacher column twice or below 0; pass each once")


class Shard:
    """A read-only, memory-mapped file with the predictions of several sequences.

    Args:
        path: of the file.
        key: what it must have been written for; its tokenizer only where both are known.

    Raises:
        DamagedStoreError: the file is cut off or altered.
        StoreError: it cannot be opened, is another file, or is of another teacher or setting.
        PairError: it is of another tokenizer.
    """

    def __init__(self, path: Path, key: StoreKey) -> None:
        self.path = path
        try:
            file = read_tensors(path, FORMAT, "teacher predictions", "a file of this store")
        except ForeignFileError as error:
            raise StoreError(f"{error}; remove it or use another folder") from error
        except FormatError as error:
            raise DamagedStoreError(str(error)) from error
        except MissingFileError:
            raise
        except OSError as error:
            raise StoreError(
                f"{path} cannot be opened ({error.strerror or error}); correct its permissions, or "
                "use another folder"
            ) from error
        _check_key(path, file.metadata, key)
        self._arrays = file.arrays
        self._starts = _checked(self._arrays, key, path)
        self.digests: list[bytes] = [row.tobytes() for row in self._arrays["digests"]]

    def read(self, index: int) -> Predictions:
        """The predictions of the sequence at `index` of `digests`."""
        part = slice(int(self._starts[index]), int(self._starts[index + 1]))
        return Predictions(
            self._arrays["ids"][part].astype(np.int64),
            self._arrays["log_probs"][part].astype(np.float32),
            self._arrays["token_log_probs"][part].astype(np.float32),
        )


def _check_key(path: Path, found: dict[str, str], key: StoreKey) -> None:
    expected = key.metadata()
    tokenizer, wanted = found.get("tokenizer", ""), expected.pop("tokenizer")
    for name, value in expected.items():
        if found.get(name) != value:
            raise StoreError(
                f"{path} has {name} = {found.get(name)!r}, expected {value!r}; "
                "it was written for another teacher or setting: remove it or use another folder"
            )
    if tokenizer and wanted and tokenizer != wanted:
        raise PairError(
            f"{path} was made with the teacher tokenizer {tokenizer[:12]}, expected {wanted[:12]}; "
            "its ids are other tokens here: use another folder, or the tokenizer that it is of"
        )


def _checked(arrays: dict[str, Array], key: StoreKey, path: Path) -> NDArray[np.int64]:
    """The starts of the sequences, once all arrays are there and fit one another."""
    names = ("digests", "starts", "ids", "log_probs", "token_log_probs")
    missing = [name for name in names if name not in arrays]
    if missing:
        raise DamagedStoreError(f"{path} lacks the tensor {missing[0]}; remove it")
    shapes = {name: arrays[name].shape for name in names}
    starts = arrays["starts"].astype(np.int64)
    tokens, count = shapes["ids"][0] if shapes["ids"] else -1, len(arrays["digests"])
    fits = (
        shapes["digests"] == (count, DIGEST_BYTES)
        and shapes["ids"] == shapes["log_probs"] == (tokens, key.top_k)
        and shapes["token_log_probs"] == (tokens,)
        and starts.shape == (count + 1,)
        and starts[0] == 0
        and starts[-1] == tokens
        and bool((np.diff(starts) >= 0).all())
        and arrays["log_probs"].dtype == key.dtype
    )
    if not fits:
        raise DamagedStoreError(f"{path} holds tensors that do not fit one another; remove it")
    return starts


def write_shard(
    path: Path, key: StoreKey, digests: Sequence[bytes], predictions: Sequence[Predictions]
) -> None:
    """Write a file whole or not at all, with a checksum.

    Raises:
        NonFiniteError, StoreError: a prediction is none, see `Predictions.check`.
        OSError: the folder cannot be written or is full.
    """
    for item in predictions:
        item.check()
    lengths = [len(item.ids) for item in predictions]
    # Two bytes hold every id of most vocabularies of small models; it halves the index half.
    largest = max((int(item.ids.max(initial=0)) for item in predictions), default=0)
    id_type = np.uint16 if largest < 2**16 else np.int32
    arrays: dict[str, Array] = {
        "digests": np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1),
        "starts": np.cumsum([0, *lengths], dtype=np.int64),
        "ids": np.concatenate([item.ids for item in predictions]).astype(id_type),
        "log_probs": np.concatenate([item.log_probs for item in predictions]).astype(key.dtype),
        "token_log_probs": np.concatenate([item.token_log_probs for item in predictions]),
    }
    write_tensors(path, arrays, key.metadata())
