"""Projections on disk: one safetensors file with both fingerprints, the options and a checksum."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike

import numpy as np

from xtoken._core import Vocab, __version__
from xtoken._files import as_path, parse_json
from xtoken._tensor_files import Array, read_tensors, write_tensors
from xtoken.data.stops import vocab_with_stops
from xtoken.errors import FormatError, OptionError, PairError, ShapeError
from xtoken.projection.arrays import AnyProjection, ProjectionArrays
from xtoken.projection.options import ProjectionOptions
from xtoken.vocab import TokenizerSource
from xtoken.vocab.side import Side, SideName

FORMAT = "xtoken-projection"
# Raised when a tensor changes its meaning; tensors may be added without.
FORMAT_VERSION = 1
_DTYPES = {
    "indptr": np.int64,
    "indices": np.int64,
    "weights": np.float32,
    "rules": np.uint8,
    "pieces_indptr": np.int64,
    "pieces": np.int64,
    "teacher_pieces_indptr": np.int64,
    "teacher_pieces": np.int64,
    "stop_fold_from": np.int64,
    "stop_fold_to": np.int64,
    "student_stops": np.int64,
    "teacher_stops": np.int64,
}
# Present where the student's tokenizer can segment, and where the stops are known.
_OPTIONAL = (
    *("teacher_pieces_indptr", "teacher_pieces"),
    *("stop_fold_from", "stop_fold_to", "student_stops", "teacher_stops"),
)
_ENTRIES = (
    *("shape", "options", "student_fingerprint", "teacher_fingerprint", "model_fingerprint"),
)


def save(projection: ProjectionArrays, path: str | PathLike[str]) -> None:
    """Write W; a reader never sees half a file.

    Raises:
        OptionError: it is a part of W.
        FailedWriteError: the directory does not exist or cannot be written.
    """
    if projection.is_part:
        rows, columns = projection.shape
        raise OptionError(
            f"this is W between the first {rows} student and {columns} teacher tokens alone, and a "
            "file is of a whole pair; save W itself, and call limited on what load returns"
        )
    write_arrays(
        path,
        {name: array for name in _DTYPES if (array := getattr(projection, name)) is not None},
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
    student_tokenizer: TokenizerSource | None = None,
    teacher_tokenizer: TokenizerSource | None = None,
) -> AnyProjection:
    """Read W back; given the tokenizers, check that it is theirs.

    Raises: as `Projection.load`.
    """

    arrays, metadata = read_arrays(path)
    student = _vocab("student", student_tokenizer)
    teacher = _vocab("teacher", teacher_tokenizer)
    for name, dtype in _DTYPES.items():
        if name in arrays and arrays[name].dtype != dtype:
            raise FormatError(f"{path}: {name} is {arrays[name].dtype}, expected {dtype.__name__}")
    missing = [name for name in _DTYPES if name not in arrays and name not in _OPTIONAL]
    missing += [name for name in _ENTRIES if name not in metadata]
    if missing:
        raise FormatError(f"{path} lacks {missing[0]}, a part of a projection; build W again")
    projection = cls(
        shape=_shape(metadata["shape"], path),
        options=ProjectionOptions.from_json(metadata["options"]),
        student_fingerprint=metadata["student_fingerprint"],
        teacher_fingerprint=metadata["teacher_fingerprint"],
        model_fingerprint=metadata["model_fingerprint"],
        student_model_fingerprint=metadata.get("student_model_fingerprint", ""),
        student=student,
        teacher=teacher,
        # The dtypes were checked above, which the type of a dictionary cannot say.
        **{name: arrays[name] for name in _DTYPES if name in arrays},  # type: ignore[arg-type]
    )
    check_pair(projection, student, teacher, str(path))
    return projection


def _vocab(name: SideName, tokenizer: TokenizerSource | None) -> Vocab | None:
    """Of a tokenizer as `Projection.build` reads it, with all that stops its side."""
    return None if tokenizer is None else vocab_with_stops(Side(name, tokenizer))


def _shape(text: str, path: str | PathLike[str]) -> tuple[int, int]:
    try:
        shape = parse_json(text)
    except FormatError as error:
        raise FormatError(f"{path}: its shape {error}") from error
    numbers = [n for n in shape if isinstance(n, int)] if isinstance(shape, list) else []
    if len(numbers) != 2 or not all(0 <= n < 2**31 for n in numbers):
        raise FormatError(f"{path} has the shape {text[:40]!r}, expected [V_s, V_t]; build W again")
    return numbers[0], numbers[1]


def check_pair(
    projection: ProjectionArrays, student: Vocab | None, teacher: Vocab | None, source: str
) -> None:
    """Refuse a projection that was built for other vocabularies than these, or for other stops.

    Raises:
        PairError: names the side that differs, and both sizes and fingerprints, or both stops.
        ShapeError: it is between some tokens of the pair alone.
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
        if vocab is not None and len(vocab) != size:
            raise ShapeError(
                f"{source} is W for {size} tokens of the {side}, whose tokenizer has {len(vocab)}: "
                "a part that Projection.limited cut; build W again, and save it whole"
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
    stopped = (
        ("student", student, projection.student_stops),
        ("teacher", teacher, projection.teacher_stops),
    )
    for side, vocab, stops in stopped:
        # W's rows and folds are those of its stops, and a target's last event of the vocabulary's.
        if vocab is not None and stops is not None and set(stops.tolist()) != set(vocab.stops):
            raise PairError(
                f"{source} was built for a {side} that stops at {sorted(stops.tolist())}, this one "
                f"stops at {sorted(vocab.stops)} (its end of text, chat template and generation "
                "config); build W again, or pass a Vocab that has those stops (Vocab.with_stops)"
            )


def write_arrays(
    path: str | PathLike[str], arrays: Mapping[str, Array], metadata: Mapping[str, str]
) -> None:
    """Write arrays and metadata whole or not at all, with a checksum over both."""
    entries = {
        **metadata,
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "library_version": __version__,
    }
    write_tensors(as_path("path", path), arrays, entries)


def read_arrays(path: str | PathLike[str]) -> tuple[dict[str, Array], dict[str, str]]:
    """Read what `write_arrays` wrote.

    Raises:
        FormatError: says whether the file is something else, truncated, of a newer format, or
            altered.
        MissingFileError: there is no such file.
    """
    found = read_tensors(
        as_path("path", path),
        FORMAT,
        "projection",
        "one that Projection.save wrote (a .pt table is read by import_topk_pt)",
    )
    version = found.metadata.get("format_version", "0")
    if not version.isascii() or not version.isdigit() or int(version[:9]) > FORMAT_VERSION:
        raise FormatError(
            f"{path} has format {version[:20]}, this version of xtoken reads up to "
            f"{FORMAT_VERSION}; update xtoken or build W again"
        )
    # Copies, as a mapped file cannot be replaced on Windows.
    return {name: array.copy() for name, array in found.arrays.items()}, found.metadata
