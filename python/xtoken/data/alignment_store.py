"""Alignments on disk: files of records that only grow, one file a writing process.

A file begins with `MAGIC`. A record is the key (16 bytes), the length of its body (4), the CRC-32
of key and body (4), and the body: the number of chunks, the four byte counts, the kinds, and the
steps of both bounds in the narrowest width that holds them. No file is ever changed but at its end
and by the process that made it, so writers need no lock, and what a writer left unfinished ends its
file: it is passed over, and made anew in another file.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple

import numpy as np

from xtoken.alignment import Alignment

MAGIC = b"xtoken alignments 1\n"
_HEAD = struct.Struct("<16sII")
_BODY = struct.Struct("<I4qBB")
_WIDTHS = (np.uint8, np.uint16, np.uint32)


class _Place(NamedTuple):
    file: Path
    offset: int
    length: int


class AlignmentStore:
    """The records of one directory.

    Raises:
        OSError: the directory cannot be made or read.
    """

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._places: dict[bytes, _Place] = {}
        self._indexed: dict[Path, int] = {}
        self._own: tuple[int, Path] | None = None
        self._refresh()

    def read(self, keys: Iterable[bytes]) -> tuple[dict[bytes, Alignment], int]:
        """The alignments that are stored, and the number of those that were found damaged."""
        keys = list(keys)
        if any(key not in self._places for key in keys):
            self._refresh()
        found: dict[bytes, Alignment] = {}
        damaged = 0
        places = [(self._places[key], key) for key in keys if key in self._places]
        for place, key in sorted(places):
            alignment = _read_record(place, key)
            if alignment is None:
                damaged += 1
                del self._places[key]
            else:
                found[key] = alignment
        return found, damaged

    def write(self, alignments: Mapping[bytes, Alignment]) -> None:
        """Appends alignments to this process's file.

        Raises:
            OSError: the file cannot be written.
        """
        records = {key: _encode(key, alignment) for key, alignment in alignments.items()}
        file = self._own_file()
        with file.open("ab") as out:
            start = out.tell()
            out.write(b"".join(records.values()))
        for key, record in records.items():
            self._places[key] = _Place(file, start, len(record))
            start += len(record)
        self._indexed[file] = start

    def _own_file(self) -> Path:
        # A forked process must not write to its parent's file.
        if self._own is None or self._own[0] != os.getpid() or not self._own[1].exists():
            file = self._directory / f"{os.getpid()}-{token_hex(8)}.alignments"
            file.write_bytes(MAGIC)
            self._own = (os.getpid(), file)
        return self._own[1]

    def _refresh(self) -> None:
        """Takes in what this and other processes wrote since."""
        for file in sorted(self._directory.glob("*.alignments")):
            # Another process may tidy up while we look.
            with contextlib.suppress(FileNotFoundError):
                if file.stat().st_size > self._indexed.get(file, 0):
                    self._index(file)

    def _index(self, file: Path) -> None:
        size = file.stat().st_size
        with file.open("rb") as records:
            at = self._indexed.get(file, 0)
            if at == 0:
                if records.read(len(MAGIC)) != MAGIC:
                    # A foreign file, or one that is only just begun: looked at again when it grows.
                    return
                at = len(MAGIC)
            while True:
                records.seek(at)
                head = records.read(_HEAD.size)
                if len(head) < _HEAD.size:
                    break
                key, length, _ = _HEAD.unpack(head)
                end = at + _HEAD.size + length
                if end > size:
                    # Not written to its end, or not yet.
                    break
                self._places.setdefault(key, _Place(file, at, end - at))
                at = end
            self._indexed[file] = at


def _encode(key: bytes, alignment: Alignment) -> bytes:
    steps = [np.diff(alignment.student_bounds), np.diff(alignment.teacher_bounds)]
    widths = [_width(int(step.max(initial=0))) for step in steps]
    body = b"".join(
        [
            _BODY.pack(len(alignment), *alignment.byte_counts.tolist(), *widths),
            alignment.kind.tobytes(),
            *(step.astype(_WIDTHS[w]).tobytes() for step, w in zip(steps, widths, strict=True)),
        ]
    )
    return _HEAD.pack(key, len(body), zlib.crc32(body, zlib.crc32(key))) + body


def _width(largest: int) -> int:
    """Index of the narrowest of `_WIDTHS` that holds a number."""
    return next(at for at, bits in enumerate((8, 16, 32)) if largest < 2**bits)


def _read_record(place: _Place, key: bytes) -> Alignment | None:
    """None for a record that is not whole or not what it was."""
    try:
        with place.file.open("rb") as records:
            records.seek(place.offset)
            record = records.read(place.length)
    except FileNotFoundError:
        return None
    if len(record) < place.length or len(record) < _HEAD.size + _BODY.size:
        return None
    stored_key, length, checksum = _HEAD.unpack_from(record)
    body = record[_HEAD.size :]
    if stored_key != key or length != len(body) or checksum != zlib.crc32(body, zlib.crc32(key)):
        return None
    return _decode(body)


def _decode(body: bytes) -> Alignment | None:
    chunks, *rest = _BODY.unpack_from(body)
    counts, widths = rest[:4], rest[4:]
    if any(width >= len(_WIDTHS) for width in widths):
        return None
    sizes = [chunks, *(chunks * np.dtype(_WIDTHS[width]).itemsize for width in widths)]
    if len(body) != _BODY.size + sum(sizes):
        return None
    kind = np.frombuffer(body, np.uint8, chunks, _BODY.size).copy()
    bounds = []
    at = _BODY.size + chunks
    for width, size in zip(widths, sizes[1:], strict=True):
        steps = np.frombuffer(body, _WIDTHS[width], chunks, at)
        bounds.append(np.concatenate((np.zeros(1, np.int64), np.cumsum(steps, dtype=np.int64))))
        at += size
    return Alignment(bounds[0], bounds[1], kind, np.array(counts, np.int64))
