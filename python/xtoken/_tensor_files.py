"""Our safetensors files: with a checksum when written, checked by the byte when read."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from xtoken._files import JsonValue, parse_json, path_to_read, write_atomically
from xtoken.errors import ForeignFileError, FormatError, MissingFileError

Array: TypeAlias = NDArray[np.generic]

# Ours have a dozen tensors; that of a model with thousands still fits.
_MAX_HEADER = 16 << 20
_DTYPES: dict[str, type[np.generic]] = {
    "U8": np.uint8,
    "U16": np.uint16,
    "I32": np.int32,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
}
_CHECKSUM = "sha256"


@dataclass(frozen=True)
class TensorFile:
    """A file that was read whole and is as it was written.

    Attributes:
        arrays: its tensors, read-only, mapped into memory.
        metadata: its entries, without the checksum.
    """

    arrays: dict[str, Array]
    metadata: dict[str, str]


def write_tensors(
    path: Path | str, arrays: Mapping[str, Array], metadata: Mapping[str, str]
) -> None:
    """Write arrays and metadata whole or not at all, with a checksum over both.

    Args:
        path: of the file.
        arrays: of the dtypes uint8, uint16, int32, int64, float16 and float32.
        metadata: has `format`, which `read_tensors` asks for.
    """
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    entries = {**metadata, _CHECKSUM: _checksum(contiguous, metadata)}
    content = save(contiguous, metadata=entries)
    header, start = _ordered_header(content)

    def write(file: BinaryIO) -> None:
        file.write(header)
        file.write(memoryview(content)[start:])

    write_atomically(path, write)


def _ordered_header(content: bytes) -> tuple[bytes, int]:
    """The length and header of a safetensors file with its keys in order, and where its data start.

    safetensors writes the metadata in an order of their own in each file, and equal files were not
    equal by the byte.
    """
    (length,) = struct.unpack_from("<Q", content)
    values = json.loads(content[8 : 8 + length])
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    return struct.pack("<Q", len(text)) + text, 8 + length


def read_metadata(path: Path | str, expected: str) -> dict[str, str]:
    """The metadata of a safetensors file, whatever its tensors; their checksum is not compared.

    Raises:
        MissingFileError: there is no such file.
        FormatError: it is something else, or cut off within its header.
        OSError: it cannot be opened.
    """
    path = path_to_read("path", path, f"expected {expected}")
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; expected {expected}")
    header, _, _ = _header(path, expected)
    return _metadata(header, path)


def read_tensors(
    path: Path | str, file_format: str | tuple[str, ...], content: str, expected: str
) -> TensorFile:
    """Read what `write_tensors` wrote.

    Args:
        path: of the file.
        file_format: its `format` entry, or those that are read; the first is what is written.
        content: what that is, for the messages, as in "projection".
        expected: which file holds one, as in "one that Projection.save wrote".

    Raises:
        MissingFileError: there is no such file.
        ForeignFileError: it is a safetensors file of another format.
        FormatError: it is something else, cut off, or altered.
        OSError: it cannot be opened.
    """
    path = path_to_read("path", path, f"expected {expected}")
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; expected {expected}")
    header, start, size = _header(path, expected)
    metadata = _metadata(header, path)
    formats = (file_format,) if isinstance(file_format, str) else file_format
    if metadata.get("format") not in formats:
        raise ForeignFileError(
            f"{path} is a safetensors file but holds no {content} (format = "
            f"{metadata.get('format')!r}, expected {formats[0]!r}); expected {expected}"
        )
    arrays = _map(path, header, start, size)
    checksum = metadata.pop(_CHECKSUM, "")
    if _checksum(arrays, metadata) != checksum:
        raise FormatError(f"{path} was altered: its checksum differs; remove it and make it again")
    return TensorFile(arrays, metadata)


def _header(path: Path, expected: str) -> tuple[dict[str, JsonValue], int, int]:
    """The header, where the data start, and the size of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(9)
        length = struct.unpack("<Q", prefix[:8])[0] if len(prefix) > 8 else size
        if prefix[8:] not in (b"{", b"") or length > _MAX_HEADER:
            raise FormatError(f"{path} is not a safetensors file; expected {expected}")
        if 8 + length > size:
            raise FormatError(
                f"{path} is truncated: {size} bytes end within its header; copy it again"
            )
        try:
            header = parse_json(prefix[8:] + file.read(length - 1))
        except FormatError as error:
            raise FormatError(f"{path} is not a safetensors file: its header {error}") from error
    if not isinstance(header, dict):
        raise FormatError(f"{path} is not a safetensors file; expected {expected}")
    return header, 8 + length, size


def _metadata(header: dict[str, JsonValue], path: Path) -> dict[str, str]:
    found = header.pop("__metadata__", {})
    if not isinstance(found, dict):
        raise FormatError(f"{path} is not a safetensors file: its metadata are no object")
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _map(path: Path, header: dict[str, JsonValue], start: int, size: int) -> dict[str, Array]:
    places = {name: _place(name, entry, path) for name, entry in header.items()}
    # In the order of the file the tensors follow one another without a gap, up to its end.
    position = 0
    for name, (_, _, begin, end) in sorted(places.items(), key=lambda item: item[1][2:]):
        if begin != position:
            raise FormatError(f"{path} is damaged: tensor {name} begins at byte {begin} of the "
                              f"data, expected {position}; make it again")  # fmt: skip
        position = end
    if size != start + position:
        word = "truncated" if size < start + position else "damaged"
        raise FormatError(
            f"{path} is {word}: {size} bytes where {start + position} were expected; copy it again"
        )
    if not position:
        return {name: np.empty(shape, dtype) for name, (dtype, shape, _, _) in places.items()}
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=start, shape=(position,))
    return {
        name: data[begin:end].view(dtype).reshape(shape)
        if begin % np.dtype(dtype).itemsize == 0
        else np.frombuffer(data[begin:end].tobytes(), dtype).reshape(shape)
        for name, (dtype, shape, begin, end) in places.items()
    }


def _place(
    name: str, entry: JsonValue, path: Path
) -> tuple[type[np.generic], tuple[int, ...], int, int]:
    fields = entry if isinstance(entry, dict) else {}
    shape, offsets, dtype = fields.get("shape"), fields.get("data_offsets"), fields.get("dtype")
    known = _DTYPES.get(dtype) if isinstance(dtype, str) else None
    if known is None:
        raise FormatError(
            f"{path}: tensor {name} has dtype {str(dtype)[:20]!r}, expected one of "
            f"{', '.join(_DTYPES)}; make it again"
        )
    sizes, places = _naturals(shape), _naturals(offsets)
    if sizes is None or places is None or len(places) != 2:
        raise FormatError(f"{path}: tensor {name} has no shape or place; make it again")
    if places[1] - places[0] != math.prod(sizes) * np.dtype(known).itemsize:
        raise FormatError(
            f"{path}: tensor {name} of shape {list(sizes)[:4]} does not fit its "
            f"{places[1] - places[0]} bytes; make it again"
        )
    return known, sizes, places[0], places[1]


def _naturals(value: JsonValue) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(value) > 8:
        return None
    numbers = [n for n in value if isinstance(n, int) and not isinstance(n, bool)]
    if len(numbers) != len(value) or not all(0 <= n < 2**62 for n in numbers):
        return None
    return tuple(numbers)


def _checksum(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
