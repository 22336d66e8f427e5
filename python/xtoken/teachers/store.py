"""Teacher predictions computed once: the top-k log-probabilities of every position, on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from xtoken.errors import StoreError
from xtoken.losses import TeacherTopK
from xtoken.teachers.live import LiveTeacher
from xtoken.teachers.shard import Predictions, Shard, StoreKey, write_shard

TOKENS_A_SHARD = 16_384
TOKENS_A_FORWARD = 1_024

Ids = NDArray[np.int64]


class TopKStore:
    """The teacher's top-k log-probabilities of token sequences, kept over epochs and over runs.

    One folder holds one teacher at one setting. A sequence is found by the digest of its ids, so
    that two runs with other texts share what they have in common. Files are written whole or not at
    all; a truncated one is deleted when the store is opened, and its sequences are computed again.

    Args:
        directory: the folder, made if absent.
        key: teacher, number of columns and dtype that the files must have.
    Raises: StoreError if the folder holds files of another teacher or setting.
    """

    def __init__(self, directory: Path | str, key: StoreKey) -> None:
        if key.dtype not in ("float32", "float16"):
            raise StoreError(f"dtype = {key.dtype!r}, expected 'float32' or 'float16'")
        if key.top_k < 1:
            raise StoreError(f"top_k = {key.top_k}, expected at least 1")
        self.directory = Path(directory)
        self.key = key
        self.sequences_computed = 0
        self.files_discarded = 0
        self._places: dict[bytes, tuple[Shard, int]] = {}
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.directory.glob("*.safetensors")):
            self._open(path)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, ids: Ids) -> bool:
        return _digest(ids) in self._places

    def _open(self, path: Path) -> None:
        try:
            shard = Shard(path, self.key)
        except StoreError:
            if _is_readable(path):
                raise
            path.unlink(missing_ok=True)
            self.files_discarded += 1
            return
        self._places |= {digest: (shard, index) for index, digest in enumerate(shard.digests)}

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
        Raises: StoreError if the teacher is another, or has fewer columns than `top_k`.
        """
        if teacher.fingerprint != self.key.teacher:
            raise StoreError(
                f"the store in {self.directory} is for teacher {self.key.teacher}, this one is "
                f"{teacher.fingerprint}; use another folder"
            )
        missing = {_digest(ids): ids for ids in sequences if len(ids)}
        missing = {key: ids for key, ids in missing.items() if key not in self._places}
        total, done = sum(map(len, missing.values())), 0
        for group in _by_tokens(sorted(missing.values(), key=len), TOKENS_A_SHARD):
            self._write(teacher, group)
            done += sum(map(len, group))
            if progress is not None:
                progress(done, total)
        self.sequences_computed += len(missing)
        return len(missing)

    def _write(self, teacher: LiveTeacher, group: list[Ids]) -> None:
        predictions: list[Predictions] = []
        for batch in _by_tokens(group, TOKENS_A_FORWARD):
            predictions += _predict(teacher, batch, self.key.top_k)
        digests = [_digest(ids) for ids in group]
        name = hashlib.blake2b(b"".join(digests), digest_size=12).hexdigest()
        path = self.directory / f"{name}.safetensors"
        write_shard(path, self.key, digests, predictions)
        self._open(path)

    def get(self, ids: Ids) -> Predictions:
        """Return the stored predictions of a sequence.

        Raises: StoreError if the sequence was never computed.
        """
        place = self._places.get(_digest(ids))
        if place is None:
            raise StoreError(
                f"no predictions for this sequence of {len(ids)} teacher tokens in "
                f"{self.directory} ({len(self)} sequences stored); call fill() with it first"
            )
        return place[0].read(place[1])

    def signal(self, ids: Tensor, attention_mask: Tensor) -> TeacherTopK:
        """Return the stored predictions of a padded batch.

        Args:
            ids: [B, T] int64.
            attention_mask: [B, T], 1 for a token and 0 for padding on either side.
        Returns: ids and log_probs [B, T, K], token_log_probs [B, T]; padded positions hold the
            first K columns with equal probability, which no loss reads.
        """
        rows, width = ids.shape
        top_k = self.key.top_k
        columns = torch.arange(top_k).expand(rows, width, top_k).clone()
        log_probs = torch.full((rows, width, top_k), -float(np.log(top_k)))
        token_log_probs = torch.zeros(rows, width)
        for row in range(rows):
            mask = attention_mask[row].bool().cpu()
            stored = self.get(ids[row].cpu()[mask].numpy())
            columns[row, mask] = torch.from_numpy(stored.ids)
            log_probs[row, mask] = torch.from_numpy(stored.log_probs)
            token_log_probs[row, mask] = torch.from_numpy(stored.token_log_probs)
        signal = TeacherTopK(columns, log_probs, token_log_probs=token_log_probs)
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
        raise StoreError(
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
    return hashlib.blake2b(data.tobytes(), digest_size=16).digest()


def _is_readable(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            return True
    except (SafetensorError, OSError):
        return False


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
