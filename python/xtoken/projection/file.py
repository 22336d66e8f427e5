"""Projections on disk: one safetensors file with both fingerprints, the options and a checksum."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from xtoken._core import PROJECTION_RULES, Vocab, __version__
from xtoken._files import write_atomically
from xtoken.errors import FormatError, PairError, ShapeError
from xtoken.projection.arrays import AnyProjection, ProjectionArrays
from xtoken.projection.csr import Csr
from xtoken.projection.options import ProjectionOptions

Arrays = dict[str, NDArray[Any]]

FORMAT = "xtoken-projection"
# Raised when a tensor changes its meaning; tensors may be added without.
FORMAT_VERSION = 1
# What safetensors itself takes.
_MAX_HEADER = 100_000_000
_DTYPES = {
    "indptr": np.int64,
    "indices": np.int64,
    "weights": np.float32,
    "rules": np.uint8,
    "pieces_indptr": np.int64,
    "pieces": np.int64,
}
# Present where the student's tokenizer can segment.
_OPTIONAL = ("teacher_pieces_indptr", "teacher_pieces")


def save(projection: ProjectionArrays, path: str | PathLike[str]) -> None:
    """Write W; a reader never sees half a file.

    Raises:
        OSError: the directory does not exist or cannot be written.
    """
    write_arrays(
        path,
        {
            name: array
            for name in (*_DTYPES, *_OPTIONAL)
            if (array := getattr(projection, name)) is not None
        },
        {
            "shape": json.dumps(projection.shape),
            "options": projection.options.to_json(),
            "student_fingerprint": projection.student_fingerprint,
            "teacher_fingerprint": projection.teacher_fingerprint,
            "model_fingerprint": projection.model_fingerprint,
            "student_model_fingerprint": projection.student_model_fingerprint,
        },
    )


def load(
    cls: type[AnyProjection],
    path: str | PathLike[str],
    student_tokenizer: Any = None,
    teacher_tokenizer: Any = None,
) -> AnyProjection:
    """Read W back and check that it is whole and, given the tokenizers, theirs.

    Raises: as `Projection.load`.
    """

    arrays, metadata = read_arrays(path)
    student = None if student_tokenizer is None else Vocab.from_tokenizer(student_tokenizer)
    teacher = None if teacher_tokenizer is None else Vocab.from_tokenizer(teacher_tokenizer)
    try:
        optional = {name: np.int64 for name in _OPTIONAL if name in arrays}
        for name, dtype in (_DTYPES | optional).items():
            if arrays[name].dtype != dtype:
                raise FormatError(f"{path}: {name} is {arrays[name].dtype}, expected {dtype}")
        rows, columns = json.loads(metadata["shape"])
        projection = cls(
            indptr=arrays["indptr"],
            indices=arrays["indices"],
            weights=arrays["weights"],
            shape=(rows, columns),
            rules=arrays["rules"],
            pieces_indptr=arrays["pieces_indptr"],
            pieces=arrays["pieces"],
            options=ProjectionOptions.from_json(metadata["options"]),
            student_fingerprint=metadata["student_fingerprint"],
            teacher_fingerprint=metadata["teacher_fingerprint"],
            model_fingerprint=metadata["model_fingerprint"],
            student_model_fingerprint=metadata.get("student_model_fingerprint", ""),
            student=student,
            teacher=teacher,
            **{name: arrays[name] for name in optional},
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} lacks a part of a projection: {error}") from error
    check(projection)
    check_pair(projection, student, teacher, str(path))
    return projection


def check(projection: ProjectionArrays) -> None:
    """Refuse arrays that do not fit one another.

    Raises:
        ShapeError: names the array.
    """
    rows, columns = projection.shape
    Csr(projection.indptr, projection.indices, projection.weights, projection.shape)
    rules = len(PROJECTION_RULES)
    if len(projection.rules) != rows or int(projection.rules.max(initial=0)) >= rules:
        raise ShapeError(f"rules must hold {rows} codes below {rules}")
    Csr(
        projection.pieces_indptr,
        projection.pieces,
        np.ones(len(projection.pieces), dtype=np.float32),
        (rows, columns),
    )
    if projection.teacher_pieces_indptr is not None and projection.teacher_pieces is not None:
        Csr(
            projection.teacher_pieces_indptr,
            projection.teacher_pieces,
            np.ones(len(projection.teacher_pieces), dtype=np.float32),
            (columns, rows),
        )


def check_pair(
    projection: ProjectionArrays, student: Vocab | None, teacher: Vocab | None, source: str
) -> None:
    """Refuse a projection that was built for other vocabularies than these.

    Raises:
        PairError: names the side that differs, and both sizes and fingerprints.
    """
    sides = (
        ("student", student, projection.student_fingerprint, projection.shape[0]),
        ("teacher", teacher, projection.teacher_fingerprint, projection.shape[1]),
    )
    for side, vocab, fingerprint, size in sides:
        if vocab is not None and vocab.fingerprint != fingerprint:
            other = sides[side == "student"]
            swapped = vocab.fingerprint == other[2]
            raise PairError(
                f"{source} was built for another {side}: V = {size}, fingerprint "
                f"{fingerprint[:12]}…, but the {side} tokenizer has V = {len(vocab)}, fingerprint "
                f"{vocab.fingerprint[:12]}…; "
                + ("student and teacher are swapped" if swapped else "build W for this pair")
            )
    models = (
        ("student", student, projection.student_model_fingerprint),
        ("teacher", teacher, projection.model_fingerprint),
    )
    for side, vocab, fingerprint in models:
        if vocab is not None and fingerprint not in ("", vocab.model_fingerprint):
            raise PairError(
                f"{source} was built for a {side} with the same tokens that segments text in "
                "another way; build W for this pair"
            )


def write_arrays(
    path: str | PathLike[str], arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]
) -> None:
    """Write arrays and metadata atomically, with a checksum over both."""
    path = Path(path)
    metadata = {
        **metadata,
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "library_version": __version__,
    }
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata["sha256"] = _checksum(contiguous, metadata)
    content = to_safetensors(contiguous, metadata=metadata)
    write_atomically(path, lambda file: file.write(content))


def read_arrays(path: str | PathLike[str]) -> tuple[Arrays, dict[str, str]]:
    """Read what `write_arrays` wrote.

    Raises:
        FormatError: says whether the file is something else, truncated, of a newer format, or
            altered.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; write it with Projection.save")
    _check_length(path)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise FormatError(
                    f"{path} is a safetensors file but holds no projection; expected one that "
                    "Projection.save wrote"
                )
            if int(metadata.get("format_version", "0")) > FORMAT_VERSION:
                raise FormatError(
                    f"{path} has format {metadata['format_version']}, this version of xtoken "
                    f"reads up to {FORMAT_VERSION}; update xtoken or build W again"
                )
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} is not a whole safetensors file: {error}") from error
    expected = metadata.pop("sha256", "")
    if _checksum(arrays, metadata) != expected:
        raise FormatError(f"{path} was altered: its checksum differs; build W again")
    return arrays, metadata


def _check_length(path: Path) -> None:
    """A clear word on files that are cut off, where safetensors speaks of an invalid header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(9)
        header_size = struct.unpack("<Q", prefix[:8])[0] if len(prefix) > 8 else size
        if prefix[8:] not in (b"{", b"") or header_size > _MAX_HEADER:
            raise FormatError(
                f"{path} is not a safetensors file; expected one that Projection.save wrote (a .pt "
                "table is read by import_topk_pt)"
            )
        if 8 + header_size > size:
            raise FormatError(
                f"{path} is truncated: {size} bytes end within its header; copy it again"
            )
        try:
            header = json.loads(prefix[8:] + file.read(header_size - 1))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key[:2] != "__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{path} is not a safetensors file: {error}") from error
    expected = 8 + header_size + max(ends, default=0)
    if size < expected:
        raise FormatError(
            f"{path} is truncated: {size} bytes where {expected} were expected; copy it again"
        )


def _checksum(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()
