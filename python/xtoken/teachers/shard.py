"""One file of stored teacher predictions: written whole or not at all, read by memory map."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from xtoken.errors import StoreError

FORMAT = "xtoken-teacher-top-k-1"


@dataclass(frozen=True)
class StoreKey:
    """What stored predictions depend on besides the token ids.

    Args:
        teacher: fingerprint of the teacher's weights.
        top_k: number of kept columns a position.
        dtype: `float32` or `float16`, of the stored log-probabilities.
    """

    teacher: str
    top_k: int
    dtype: str

    def metadata(self) -> dict[str, str]:
        """Return the header entries that every file of the store carries."""
        return {"format": FORMAT} | {name: str(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Predictions:
    """Teacher predictions of one token sequence; row `i` predicts token `i + 1`.

    Args:
        ids: [T, K] int64, teacher columns, falling log-probability.
        log_probs: [T, K] float32, natural logarithm, of the full softmax.
        token_log_probs: [T] float32, of the token that follows; 0 at the last, which none follows.
    """

    ids: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    token_log_probs: NDArray[np.float32]


def _open_file(path: Path) -> Any:
    # Through Any: safetensors declares its reader without types.
    reader: Any = safe_open
    return reader(path, framework="numpy")


class Shard:
    """A read-only, memory-mapped file with the predictions of several sequences."""

    def __init__(self, path: Path, key: StoreKey) -> None:
        """Open a file.

        Raises: StoreError if the file is truncated, is not of this format, or has another key.
        """
        self.path = path
        try:
            self._file = _open_file(path)
        except (SafetensorError, OSError) as error:
            raise StoreError(f"{path} is truncated or not a safetensors file ({error})") from error
        found = self._file.metadata() or {}
        for name, expected in key.metadata().items():
            if found.get(name) != expected:
                raise StoreError(
                    f"{path} has {name} = {found.get(name)!r}, expected {expected!r}; "
                    "it was written for another teacher or setting: remove it or use another folder"
                )
        self._starts: NDArray[np.int64] = self._file.get_tensor("starts")
        digests: NDArray[np.uint8] = self._file.get_tensor("digests")
        self.digests: list[bytes] = [row.tobytes() for row in digests]

    def read(self, index: int) -> Predictions:
        """Return the predictions of the sequence at `index` of `digests`."""
        start, end = int(self._starts[index]), int(self._starts[index + 1])
        ids, log_probs, tokens = (
            self._file.get_slice(name)[start:end]
            for name in ("ids", "log_probs", "token_log_probs")
        )
        return Predictions(
            ids.astype(np.int64), log_probs.astype(np.float32), tokens.astype(np.float32)
        )


def write_shard(
    path: Path, key: StoreKey, digests: Sequence[bytes], predictions: Sequence[Predictions]
) -> None:
    """Write a file under a temporary name and rename it, so that no reader sees a part of it."""
    lengths = [len(item.ids) for item in predictions]
    # Two bytes hold every id of most vocabularies of small models; it halves the index half.
    largest = max((int(item.ids.max(initial=0)) for item in predictions), default=0)
    id_type = np.uint16 if largest < 2**16 else np.int32
    tensors: dict[str, NDArray[Any]] = {
        "digests": np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1),
        "starts": np.cumsum([0, *lengths], dtype=np.int64),
        "ids": np.concatenate([item.ids for item in predictions]).astype(id_type),
        "log_probs": np.concatenate([item.log_probs for item in predictions]).astype(key.dtype),
        "token_log_probs": np.concatenate([item.token_log_probs for item in predictions]),
    }
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    os.close(handle)
    try:
        save_file(tensors, name, metadata=key.metadata())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
