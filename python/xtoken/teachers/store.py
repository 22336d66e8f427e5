"""Teacher predictions computed once: the top-k log-probabilities of every position, on disk."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from xtoken._files import locked, remove_unfinished, warn_of_cache
from xtoken.errors import DamagedStoreError, MissingFileError, OptionError, PairError, StoreError
from xtoken.losses import TeacherTopK
from xtoken.teachers.live import LiveTeacher
from xtoken.teachers.shard import DIGEST_BYTES, Predictions, Shard, StoreKey, write_shard

TOKENS_PER_SHARD = 16_384
TOKENS_PER_FORWARD = 1_024

# The names that the store gives its files.
_OWN_NAME = re.compile(r"[0-9a-f]{24}\.safetensors")

Ids: TypeAlias = NDArray[np.int64]


class TopKStore:
    """The teacher's top-k log-probabilities of token sequences, kept over epochs and over runs.

    One folder holds one teacher at one setting. A sequence is found by the digest of its ids, so
    that two runs with other texts share what they have in common. Files are written whole or not at
    all, each with a checksum that is compared when the store is opened. A file of the store that is
    damaged is renamed to `*.damaged`, and its sequences are computed again; no file is deleted.

    Args:
        directory: the folder, made if absent.
        key: teacher, number of columns, dtype and tokenizer that the files must have.
        required: whether a folder that cannot be written ends the call, as where predictions are
            made to be kept; otherwise they stay in memory, and one warning says so.

    Raises:
        OptionError: a setting of the key is out of range.
        StoreError: the folder holds files of another teacher or setting, foreign files, or files
            that cannot be opened.
        PairError: it holds predictions of another tokenizer.
    """

    def __init__(self, directory: Path | str, key: StoreKey, *, required: bool = False) -> None:
        if key.dtype not in ("float32", "float16"):
            raise OptionError(f"dtype = {key.dtype!r}, expected 'float32' or 'float16'")
        if key.top_k < 1:
            raise OptionError(f"top_k = {key.top_k}, expected at least 1")
        self.directory = Path(directory)
        self.key = key
        self.required = required
        self.sequences_computed = 0
        self.files_discarded = 0
        self._places: dict[bytes, tuple[Shard, int]] = {}
        self._in_memory: dict[bytes, Predictions] = {}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._cannot_write(error)
        remove_unfinished(self.directory)
        for path in sorted(self.directory.glob("*.safetensors")):
            self._open(path)

    def __len__(self) -> int:
        return len(self._places) + len(self._in_memory)

    def __contains__(self, ids: Ids) -> bool:
        return self._has(_digest(ids))

    def _has(self, digest: bytes) -> bool:
        return digest in self._places or digest in self._in_memory

    def _open(self, path: Path) -> None:
        try:
            shard = Shard(path, self.key)
        except MissingFileError:
            return  # another process has just found it damaged
        except DamagedStoreError as error:
            # Whatever has another name is not ours to move.
            if _OWN_NAME.fullmatch(path.name) is None:
                raise StoreError(f"{error}; it is not of this store: move it elsewhere") from error
            self._set_aside(path)
            return
        self._places |= {digest: (shard, index) for index, digest in enumerate(shard.digests)}

    def _set_aside(self, path: Path) -> None:
        """Rename a damaged file, unless another process has put a whole one in its place."""
        self.files_discarded += 1
        try:
            with locked(self.directory / ".lock"):
                try:
                    shard = Shard(path, self.key)
                except DamagedStoreError:
                    os.replace(path, path.with_name(path.name + ".damaged"))
                    return
                except MissingFileError:
                    return
        except OSError as error:
            self._cannot_write(error)
            return
        self._places |= {digest: (shard, index) for index, digest in enumerate(shard.digests)}

    def _cannot_write(self, error: OSError) -> None:
        if self.required:
            raise error
        warn_of_cache(self.directory, error)

    def require_tokenizer(self, fingerprint: str) -> None:
        """Refuse a store whose predictions are of another teacher tokenizer than this.

        Raises:
            PairError: names both.
        """
        if self.key.tokenizer not in ("", fingerprint):
            raise PairError(
                f"the predictions in {self.directory} are of the teacher tokenizer "
                f"{self.key.tokenizer[:12]}, this pair's is {fingerprint[:12]}; fill a store of "
                "another folder with this pair's teacher"
            )

    def fill(
        self,
        teacher: LiveTeacher,
        sequences: Sequence[Ids],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Compute what is not stored yet.

        Args:
            teacher: its fingerprint must be that of the key.
            sequences: [T] int64 each, teacher ids.
            progress: called with (tokens done, tokens to do) after each file.

        Returns: the number of sequences that had to be computed.

        Raises:
            StoreError: the teacher is another.
            OptionError: it has fewer columns than `top_k`.
            NonFiniteError: it predicts NaN; nothing of that file is stored.
            OSError: the folder cannot be written, and the store is `required`.
        """
        if teacher.fingerprint != self.key.teacher:
            raise StoreError(
                f"the store in {self.directory} is for teacher {self.key.teacher}, this one is "
                f"{teacher.fingerprint}; use another folder"
            )
        missing = {_digest(ids): ids for ids in sequences if len(ids)}
        missing = {key: ids for key, ids in missing.items() if not self._has(key)}
        total, done = sum(map(len, missing.values())), 0
        for group in _by_tokens(sorted(missing.values(), key=len), TOKENS_PER_SHARD):
            self._write(teacher, group)
            done += sum(map(len, group))
            if progress is not None:
                progress(done, total)
        self.sequences_computed += len(missing)
        return len(missing)

    def _write(self, teacher: LiveTeacher, group: list[Ids]) -> None:
        predictions: list[Predictions] = []
        for batch in _by_tokens(group, TOKENS_PER_FORWARD):
            predictions += _predict(teacher, batch, self.key.top_k)
        self.add(group, predictions)

    def add(self, sequences: Sequence[Ids], predictions: Sequence[Predictions]) -> Path | None:
        """Write the predictions of sequences, made elsewhere, into one file.

        Args:
            sequences: [T] int64 each, teacher ids.
            predictions: one per sequence, of the teacher and the `top_k` of the key.

        Returns: the file; None where the folder cannot be written and they stay in memory.

        Raises:
            StoreError: predictions are of another size than their sequence or the key, or none.
            NonFiniteError: a prediction is NaN.
            OSError: the folder cannot be written, and the store is `required`.
        """
        for ids, item in zip(sequences, predictions, strict=True):
            if item.ids.shape != (len(ids), self.key.top_k):
                raise StoreError(
                    f"predictions of a sequence have shape {item.ids.shape}, expected "
                    f"{(len(ids), self.key.top_k)}: its tokens and top_k of the store"
                )
        digests = [_digest(ids) for ids in sequences]
        name = hashlib.blake2b(b"".join(digests), digest_size=12).hexdigest()
        path = self.directory / f"{name}.safetensors"
        try:
            write_shard(path, self.key, digests, predictions)
        except OSError as error:
            self._cannot_write(error)
            self._in_memory |= dict(zip(digests, predictions, strict=True))
            return None
        self._open(path)
        return path

    def get(self, ids: Ids) -> Predictions:
        """The stored predictions of a sequence.

        Raises:
            StoreError: the sequence was never computed.
        """
        digest = _digest(ids)
        if digest in self._in_memory:
            return self._in_memory[digest]
        place = self._places.get(digest)
        if place is None:
            raise StoreError(
                f"no predictions for this sequence of {len(ids)} teacher tokens in "
                f"{self.directory} ({len(self)} sequences stored); call fill() with it first"
            )
        return place[0].read(place[1])

    def signal(self, ids: Tensor, attention_mask: Tensor) -> TeacherTopK:
        """The stored predictions of a padded batch.

        Args:
            ids: [B, T] int64.
            attention_mask: [B, T], 1 for a token and 0 for padding on either side.

        Returns: ids and log_probs [B, T, K], token_log_probs [B, T]; padded positions hold the
            first K columns with equal probability, which no loss reads.
        """
        return padded_signal(self.get, ids, attention_mask, self.key.top_k, self.key.tokenizer)


def padded_signal(
    read: Callable[[Ids], Predictions],
    ids: Tensor,
    attention_mask: Tensor,
    top_k: int,
    tokenizer: str = "",
) -> TeacherTopK:
    """The predictions of the sequences of a padded batch, on the device of its ids.

    Args:
        read: gives the predictions of one sequence without padding.
        tokenizer: fingerprint of the teacher's vocabulary; empty where it is not known.
        ids, attention_mask, and what is returned: as in `TopKStore.signal`.
    """
    rows, width = ids.shape
    columns = torch.arange(top_k).expand(rows, width, top_k).clone()
    log_probs = torch.full((rows, width, top_k), -float(np.log(top_k)))
    token_log_probs = torch.zeros(rows, width)
    for row in range(rows):
        mask = attention_mask[row].bool().cpu()
        stored = read(ids[row].cpu()[mask].numpy())
        columns[row, mask] = torch.from_numpy(stored.ids)
        log_probs[row, mask] = torch.from_numpy(stored.log_probs)
        token_log_probs[row, mask] = torch.from_numpy(stored.token_log_probs)
    signal = TeacherTopK(
        columns,
        log_probs,
        token_log_probs=token_log_probs,
        teacher_fingerprint=tokenizer or None,
    )
    return signal.to(ids.device)


def _predict(teacher: LiveTeacher, batch: list[Ids], top_k: int) -> list[Predictions]:
    width = max(map(len, batch))
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence)] = torch.from_numpy(sequence)
        mask[row, : len(sequence)] = 1
    logits = teacher.logits(ids, mask)
    if logits.shape[-1] < top_k:
        raise OptionError(
            f"top_k = {top_k}, but the teacher has {logits.shape[-1]} columns; pass a smaller top_k"
        )
    predictions = []
    for row, sequence in enumerate(batch):
        values = logits[row, : len(sequence)].float()  # [T, V]
        total = values.logsumexp(-1, keepdim=True)  # [T, 1]
        top = values.topk(top_k, dim=-1)
        following = ids[row, 1 : len(sequence), None].to(values.device)
        tokens = F.pad((values[:-1].gather(1, following) - total[:-1])[:, 0], (0, 1))  # [T]
        stored = (top.indices, top.values - total, tokens)
        predictions.append(Predictions(*(value.cpu().numpy() for value in stored)))
    return predictions


def _digest(ids: Ids) -> bytes:
    data = np.ascontiguousarray(ids, dtype=np.int64)
    return hashlib.blake2b(data.tobytes(), digest_size=DIGEST_BYTES).digest()


def _by_tokens(sequences: Sequence[Ids], limit: int) -> Iterator[list[Ids]]:
    """Cut a list of rising lengths into groups of at most `limit` padded tokens, or of one item."""
    group: list[Ids] = []
    for sequence in sequences:
        if group and len(sequence) * (len(group) + 1) > limit:
            yield group
            group = []
        group.append(sequence)
    if group:
        yield group
