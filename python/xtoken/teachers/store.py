"""Teacher predictions computed once: the likeliest columns of every position, on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken._checks import expect
from xtoken._files import as_path, path_to_read, remove_unfinished, warn_of_cache, writes
from xtoken._locks import locked
from xtoken.align.ids import as_ids
from xtoken.errors import (
    DamagedStoreError,
    MissingFileError,
    PairError,
    StoreError,
    TokenIdError,
    XTokenError,
)
from xtoken.losses import TeacherTopK
from xtoken.teachers.kept_rows import KeptRows, Rest
from xtoken.teachers.live import LiveTeacher
from xtoken.teachers.predict import by_tokens, padded_signal, padded_spread, predict, predict_rows
from xtoken.teachers.shard import (
    DIGEST_BYTES,
    Predictions,
    Shard,
    StoreKey,
    write_rows,
    write_shard,
)
from xtoken.teachers.store_notes import StoreNotes
from xtoken.tensors.teacher_spread import TeacherSpread

TOKENS_PER_SHARD = 16_384
TOKENS_PER_FORWARD = 1_024

# The names that the store gives its files.
_OWN_NAME = re.compile(r"[0-9a-f]{24}\.safetensors")

Ids: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class _Place:
    """Where a sequence, or one that begins with it, is stored."""

    shard: Shard
    index: int
    length: int | None = None

    def read(self) -> Predictions:
        return self.shard.read(self.index, self.length)


def is_store(folder: object) -> bool:
    """Whether a path is that of a folder with files of stored predictions."""
    if not isinstance(folder, str | os.PathLike) or not os.path.isdir(folder):
        return False
    return any(_OWN_NAME.fullmatch(name) is not None for name in os.listdir(folder))


class TopKStore:
    """The teacher's likeliest log-probabilities of token sequences, kept over epochs and runs.

    One folder holds one teacher at one setting. A sequence is found by its ids, also where a longer
    one that begins with it was stored, as the teacher is causal: one store serves students that cut
    texts elsewhere. Files are written whole or not at all, each with a checksum that is compared
    when the store is opened. A file of the store that is damaged is renamed to `*.damaged`, and its
    sequences are computed again; no file is deleted.

    Args:
        directory: the folder, made if absent.
        key: teacher, columns, dtype and tokenizer that the files must have.
        required: whether a folder that cannot be written ends the call, always with dtype `spread`;
            with False predictions stay in memory, as those of a cache may, and one warning says so.

    Raises:
        StoreError: the folder holds files of another teacher or setting, foreign files, or files
            that cannot be opened.
        PairError: it holds predictions of another tokenizer.
    """

    def __init__(self, directory: Path | str, key: StoreKey, *, required: bool = True) -> None:
        self.directory = as_path("directory", directory)
        if os.path.isfile(self.directory):
            raise StoreError(f"directory = {self.directory} is a file; pass a folder")
        self.key = expect(key, StoreKey, "key", "pass StoreKey(teacher.fingerprint, ...)")
        self.required = required or key.is_spread
        self.sequences_computed = 0
        self.files_discarded = 0
        self._damaged: set[str] = set()
        self._shards: list[Shard] = []
        self._places: dict[bytes, _Place] = {}
        self._in_memory: dict[bytes, Predictions] = {}
        # By length, a power of two: the sequences that have as many tokens, by the digest of these.
        self._heads: dict[int, dict[bytes, list[_Place]]] = {}
        try:
            with writes(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._cannot_write(error)
        remove_unfinished(self.directory)
        if os.path.isdir(self.directory):  # asks where pathlib raises
            for path in sorted(self.directory.glob("*.safetensors")):
                self._open(path)

    @classmethod
    def open(cls, directory: Path | str) -> TopKStore:
        """The store in a folder, whoever its teacher was: no weights are needed.

        Raises:
            MissingFileError: there is no such folder.
            StoreError: it holds no predictions; otherwise as above.
        """
        folder = path_to_read("teacher store", directory, "pass a folder that xtoken teach wrote")
        if os.path.isfile(folder):
            raise MissingFileError(
                f"teacher store {folder} is a file; pass a folder that xtoken teach wrote"
            )
        if not folder.is_dir():
            raise MissingFileError(
                f"teacher store {folder} does not exist; fill one with xtoken teach --out {folder}"
            )
        key: StoreKey | None = None
        damaged: DamagedStoreError | None = None
        for path in sorted(folder.glob("*.safetensors")):
            if _OWN_NAME.fullmatch(path.name) is None:
                continue
            try:
                found = StoreKey.of(path)
                key = key or found
                Shard(path, found)
            except MissingFileError:
                continue
            except DamagedStoreError as error:
                damaged = damaged or error
                continue
            key = found
            break
        # What is damaged is set aside there, whichever file it is.
        if key is not None:
            store = cls(folder, key, required=False)  # to read it nothing need be written
            store.required = True
            return store
        if damaged is not None:
            raise damaged
        raise StoreError(
            f"{folder} holds no teacher predictions; pass the folder that xtoken teach wrote"
        )

    @property
    def notes(self) -> StoreNotes | None:
        """How `xtoken teach` made the store; None where something else did."""
        return StoreNotes.of(self.directory)

    @property
    def file_bytes(self) -> int:
        """Size of the files that this process knows, which others may add to."""
        return sum(each.path.stat().st_size for each in self._shards if each.path.exists())

    @property
    def files(self) -> int:
        """Files that this process knows."""
        return len(self._shards)

    @property
    def prior_bytes(self) -> int:
        """Of `file_bytes`, the priors of dtype `spread`: one a file, whatever its tokens."""
        return sum(each.prior_bytes for each in self._shards)

    @property
    def columns_per_token(self) -> float:
        """With dtype `spread`, the mean number of columns, in the files that this process knows."""
        columns = sum(each.columns for each in self._shards)
        return columns / max(1, sum(each.rows_held for each in self._shards))

    def __len__(self) -> int:
        return len(self._places) + len(self._in_memory)

    def __contains__(self, ids: Ids) -> bool:
        return _digest(ids) in self._in_memory or self._place(ids) is not None

    def _place(self, ids: Ids) -> _Place | None:
        found = self._places.get(_digest(ids))
        return self._longer(ids) if found is None else found

    def _longer(self, ids: Ids) -> _Place | None:
        """Where a sequence that begins with `ids` is stored."""
        length = len(ids)
        if not length:
            return None
        size = 1 << (length.bit_length() - 1)
        if size not in self._heads:
            self._heads[size] = {}
            for shard in self._shards:
                self._add_heads(shard, size)
        for place in self._heads[size].get(_digest(ids[:size]), ()):
            shard, index = place.shard, place.index
            if shard.length(index) >= length and np.array_equal(shard.tokens(index, length), ids):
                return _Place(shard, index, length)
        return None

    def _add_heads(self, shard: Shard, size: int) -> None:
        for index in range(len(shard.digests) if shard.has_tokens else 0):
            if shard.length(index) > size:
                head = _digest(shard.tokens(index, size))
                self._heads[size].setdefault(head, []).append(_Place(shard, index))

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
        self._take(shard)

    def _take(self, shard: Shard) -> None:
        self._damaged.discard(shard.path.name)  # whole again
        self._shards.append(shard)
        self._places |= {digest: _Place(shard, i) for i, digest in enumerate(shard.digests)}
        for size in self._heads:
            self._add_heads(shard, size)

    def _set_aside(self, path: Path) -> None:
        """Rename a damaged file, unless another process has put a whole one in its place."""
        self.files_discarded += 1
        self._damaged.add(path.name)
        try:
            with locked(self.directory / ".lock", needed=False):
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
        self._take(shard)

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

    def require(self, sequences: Sequence[Ids]) -> None:
        """Refuse a store that lacks predictions of some of these sequences.

        Raises:
            StoreError: how many, the likely cause, and the command that adds them.
        """
        missing = [ids for ids in sequences if ids not in self]
        if not missing:
            return
        notes = self.notes
        found = f"lacks {len(missing):,} of the {len(sequences):,} teacher sequences of this data"
        cause, remedy = self._likely_cause(notes, max(map(len, missing)))
        raise StoreError(f"the teacher store {self.directory} {found}; {cause}; {remedy}")

    def _likely_cause(self, notes: StoreNotes | None, longest: int) -> tuple[str, str]:
        """Why it lacks sequences of up to so many tokens, damage first, and what adds them."""
        known, changes, run = None, {}, "run: "
        if notes is not None and not notes.complete:
            known = "it was not filled to the end"
        elif notes is not None and notes.max_tokens and longest > notes.max_tokens:
            known = (
                f"its texts were cut at {notes.max_tokens} tokens, one here has {longest}: pass "
                f"max_tokens = {notes.max_tokens} or less, or add the longer ones"
            )
            changes = {"max_tokens": str(longest)}
        other = known or "it was filled with other texts, or another chat template or date"
        damage = self._damage()
        if damage is None:
            cause = other
            if known is None:
                changes, run = {"data": "DATA"}, "run, with this data as DATA: "
        # What an earlier process set aside may have been computed again, in files of other names.
        elif self._damaged or (notes and notes.complete and len(self) < notes.sequences):
            cause = damage if known is None else f"{damage}, and {known}"
        else:
            cause = f"{damage}, or {other}"
        if notes is None:
            return cause, "run: xtoken teach with this data adds the rest"
        return cause, run + notes.command(self.directory, **changes)

    def _damage(self) -> str | None:
        """Which of its files are damaged, unless they are there again."""
        aside = [path.stem for path in self.directory.glob("*.safetensors.damaged")]
        # Those of a folder that cannot be written have their own name still.
        gone = {name for name in aside if not (self.directory / name).exists()}
        names = sorted(self._damaged | gone)
        if len(names) < 2:
            return f"its file {names[0]} is damaged" if names else None
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        return f"its files {', '.join(names[:2])}{more} are damaged"

    def fill(
        self,
        teacher: LiveTeacher,
        sequences: Sequence[Ids],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Compute what is not stored yet; each forward pass is kept at once.

        Args:
            teacher: its fingerprint must be that of the key.
            sequences: [T] int64 each, teacher ids.
            progress: called with (tokens done, tokens to do) after each forward pass.

        Returns: the number of sequences that had to be computed.

        Raises:
            StoreError: the teacher is another.
            OptionError: it has fewer columns than `top_k`.
            NonFiniteError: it predicts NaN; nothing of that pass is stored.
            FailedWriteError: the folder cannot be written, and the store is `required`.
        """
        expect(teacher, LiveTeacher, "teacher", "pass LiveTeacher(model)")
        hint = "pass a list of sequences"
        sequences = [
            ids if isinstance(ids, np.ndarray) else as_ids("a sequence", ids, hint)
            for ids in sequences
        ]
        lowest = min((int(ids.min()) for ids in sequences if len(ids)), default=0)
        if lowest < 0:
            raise TokenIdError(
                f"a sequence holds {lowest}, which no token is; leave masked places out"
            )
        if teacher.fingerprint != self.key.teacher:
            raise StoreError(
                f"the store in {self.directory} is for teacher {self.key.teacher}, this one is "
                f"{teacher.fingerprint}; use another folder"
            )
        missing = {_digest(ids): ids for ids in sequences if len(ids) and ids not in self}
        total, done = sum(map(len, missing.values())), 0
        writer = RowsWriter(self) if self.key.is_spread else ShardWriter(self)
        for group in by_tokens(sorted(missing.values(), key=len), TOKENS_PER_SHARD):
            for batch in by_tokens(group, TOKENS_PER_FORWARD):
                if isinstance(writer, RowsWriter):
                    assert self.key.min_prob is not None
                    writer.add(
                        batch, *predict_rows(teacher, batch, self.key.top_k, self.key.min_prob)
                    )
                else:
                    writer.add(batch, predict(teacher, batch, self.key.top_k))
                done += sum(map(len, batch))
                if progress is not None:
                    progress(done, total)
            writer.merge()
        self.sequences_computed += len(missing)
        return len(missing)

    def add(self, sequences: Sequence[Ids], predictions: Sequence[Predictions]) -> Path | None:
        """Write the predictions of sequences, made elsewhere, into one file.

        Args:
            sequences: [T] int64 each, teacher ids.
            predictions: one per sequence, of the teacher, with at most the `top_k` of the key; of
                each row what reaches its `mass` is kept.

        Returns: the file; None where the folder cannot be written and they stay in memory.

        Raises:
            StoreError: predictions are of another size than their sequence or the key, or none.
            NonFiniteError: a prediction is NaN.
            FailedWriteError: the folder cannot be written, and the store is `required`.
        """
        if self.key.is_spread:
            raise StoreError(
                f"the store in {self.directory} has dtype 'spread', which needs the teacher's full "
                "logits; fill it with fill(), or make one of another dtype"
            )
        for ids, item in zip(sequences, predictions, strict=True):
            if len(item.ids) != len(ids) or item.ids.shape[1] > self.key.top_k:
                raise StoreError(
                    f"predictions of a sequence have shape {item.ids.shape}, expected "
                    f"{(len(ids), self.key.top_k)}: its tokens and top_k of the store"
                )
        if self.key.mass is not None:
            predictions = [item.within(self.key.mass) for item in predictions]
        digests, path = self._file_of(sequences)
        try:
            write_shard(path, self.key, digests, sequences, predictions)
        except OSError as error:
            self._cannot_write(error)
            self._in_memory |= dict(zip(digests, predictions, strict=True))
            return None
        self._open(path)
        return path

    def add_rows(self, sequences: Sequence[Ids], rows: Sequence[KeptRows], rest: Rest) -> Path:
        """Write the kept rows of sequences into one file, with the prior of what they leave.

        Raises:
            FailedWriteError: the folder cannot be written.
        """
        digests, path = self._file_of(sequences)
        write_rows(path, self.key, digests, sequences, rows, rest)
        self._open(path)
        return path

    def _file_of(self, sequences: Sequence[Ids]) -> tuple[list[bytes], Path]:
        digests = [_digest(ids) for ids in sequences]
        name = hashlib.blake2b(b"".join(digests), digest_size=12).hexdigest()
        return digests, self.directory / f"{name}.safetensors"

    def drop(self, paths: Sequence[Path]) -> None:
        """Delete files; sequences of theirs that are in no other one are stored no more."""
        for path in paths:
            # A file that another process reads stays on Windows, and does no harm.
            with contextlib.suppress(OSError):
                path.unlink()
        gone = [shard for shard in self._shards if shard.path in paths]
        self._shards = [shard for shard in self._shards if shard.path not in paths]
        for shard in gone:
            for digest in shard.digests:
                place = self._places.get(digest)
                if place is not None and place.shard is shard:
                    del self._places[digest]
        self._heads = {}

    def get(self, ids: Ids) -> Predictions:
        """The stored predictions of a sequence.

        Raises:
            StoreError: the sequence was never computed.
        """
        in_memory = self._in_memory.get(_digest(ids))
        return self._found(ids).read() if in_memory is None else in_memory

    def _found(self, ids: Ids) -> _Place:
        place = self._place(ids)
        if place is None:
            damage = self._damage()
            raise StoreError(
                f"no predictions for this sequence of {len(ids)} teacher tokens in "
                f"{self.directory} ({len(self)} sequences stored"
                f"{'' if damage is None else f'; {damage}'}); call fill() with it first"
            )
        return place

    def _rows(self, ids: Ids) -> KeptRows:
        place = self._found(ids)
        return place.shard.rows(place.index, place.length)

    def signal(self, ids: Tensor, attention_mask: Tensor) -> TeacherTopK | TeacherSpread:
        """The stored predictions of a padded batch.

        Args:
            ids: [B, T] int64.
            attention_mask: [B, T], 1 for a token and 0 for padding on either side.

        Returns: ids and log_probs [B, T, K] with the K of the longest row, shorter ones padded with
            -inf; token_log_probs [B, T]; padded positions hold the first K columns with equal
            probability, which no loss reads. With dtype `spread`, what is read as full logits are.
        """
        if self.key.is_spread:
            return padded_spread(self._rows, ids, attention_mask, self.key.tokenizer)
        # They were checked before they were written; a file has its checksum.
        return padded_signal(
            self.get, ids, attention_mask, self.key.tokenizer, checked=not self._in_memory
        )

    def unread(self, ids: Tensor) -> TeacherSpread:
        """With dtype `spread`, for a batch [B, T] that asks for nothing: what `signal` gives, but
        that nothing is looked up.

        Raises:
            StoreError: there is no file yet.
        """
        if not self._shards:
            raise StoreError(f"{self.directory} holds nothing yet; fill it with xtoken teach")
        return TeacherSpread.of_prior(torch.from_numpy(self._shards[0].log_prior), ids)


class ShardWriter:
    """Makes each batch of predictions a file at once, and of small files large ones.

    Args:
        confirm: called before that; where it raises, the small files are dropped.
    """

    def __init__(self, store: TopKStore, confirm: Callable[[], None] | None = None) -> None:
        self._store = store
        self._confirm = confirm
        self._small: list[tuple[Path, Sequence[Ids], Sequence[Predictions]]] = []
        self._tokens = 0

    def add(self, sequences: Sequence[Ids], predictions: Sequence[Predictions]) -> None:
        """Write a batch."""
        path = self._store.add(sequences, predictions)
        if path is not None:
            self._small.append((path, sequences, predictions))
            self._tokens += sum(map(len, sequences))
        if self._tokens >= TOKENS_PER_SHARD:
            self.merge()

    def merge(self) -> None:
        """Make one file of those written since the last time."""
        if self._small and self._confirm is not None:
            try:
                self._confirm()
            except XTokenError:
                self._store.drop([path for path, _, _ in self._small])
                raise
        if len(self._small) > 1:
            merged = self._store.add(
                [ids for _, sequences, _ in self._small for ids in sequences],
                [item for _, _, predictions in self._small for item in predictions],
            )
            if merged is not None:
                self._store.drop([path for path, _, _ in self._small])
        self._small, self._tokens = [], 0


class RowsWriter:
    """As `ShardWriter`, of kept rows."""

    def __init__(self, store: TopKStore) -> None:
        self._store = store
        self._small: list[tuple[Path, Sequence[Ids], Sequence[KeptRows], Rest]] = []
        self._tokens = 0

    def add(self, sequences: Sequence[Ids], rows: Sequence[KeptRows], rest: Rest) -> None:
        """Write a batch."""
        path = self._store.add_rows(sequences, rows, rest)
        self._small.append((path, sequences, rows, rest))
        self._tokens += sum(map(len, sequences))
        if self._tokens >= TOKENS_PER_SHARD:
            self.merge()

    def merge(self) -> None:
        """Make one file, with one prior, of those written since the last time."""
        if len(self._small) > 1:
            paths, sequences, rows, rests = zip(*self._small, strict=True)
            self._store.add_rows(
                [ids for part in sequences for ids in part],
                [item for part in rows for item in part],
                sum(rests[1:], rests[0]),
            )
            self._store.drop(paths)
        self._small, self._tokens = [], 0


def _digest(ids: Ids) -> bytes:
    data = np.ascontiguousarray(ids, dtype=np.int64)
    return hashlib.blake2b(data.tobytes(), digest_size=DIGEST_BYTES).digest()
