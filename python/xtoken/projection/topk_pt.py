"""The dense top-k table of NeMo-RL: `indices` and `likelihoods` in a torch file.

NeMo-RL reads a dictionary of two tensors [V_s, K]: `indices` int64, teacher ids with -1 for
"no entry", and `likelihoods` float32, 0 there. Its strict common set is the rows whose first
likelihood is 1.0 and whose second index is -1. A row that splits into equal pieces, and with
`decay=0` every row, looks like that to it too.
"""

from __future__ import annotations

import warnings
import zipfile
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xtoken._extras import needs_extra
from xtoken._files import as_path, path_to_read, write_atomically
from xtoken.data.stops import vocab_with_stops
from xtoken.errors import FormatError, MissingFileError, ShapeError
from xtoken.projection.arrays import RULE_CODES, AnyProjection, ProjectionArrays
from xtoken.projection.csr import offsets
from xtoken.projection.file import check_pair
from xtoken.projection.options import ProjectionOptions
from xtoken.vocab import TokenizerSource
from xtoken.vocab.side import Side

_FINGERPRINTS = ("student_fingerprint", "teacher_fingerprint", "model_fingerprint")
# Sums of float32 or bfloat16 likelihoods; a row that misses 1 by more was cut without scaling.
_ROW_SUM_TOLERANCE = 1e-2


def export_topk_pt(projection: ProjectionArrays, path: str | PathLike[str]) -> None:
    """Write W as a dense table with `torch.save`, atomically.

    K is the longest row, at least 2. The vocabularies' fingerprints stand beside the two tensors;
    readers that do not know them pass them over.

    Raises:
        FailedWriteError: the directory does not exist or cannot be written.
        MissingExtraError: torch is not installed.
    """
    with needs_extra():
        import torch

    lengths = np.diff(projection.indptr)
    width = max(2, int(lengths.max(initial=0)))
    rows = projection.csr.row_of()
    column = np.arange(len(rows)) - projection.indptr[rows]
    indices = np.full((projection.shape[0], width), -1, dtype=np.int64)
    likelihoods = np.zeros((projection.shape[0], width), dtype=np.float32)
    indices[rows, column] = projection.indices
    likelihoods[rows, column] = projection.weights
    table = {
        "indices": torch.from_numpy(indices),
        "likelihoods": torch.from_numpy(likelihoods),
        # Its trimming tool asks for it: whether the last column is a sentinel.
        "enable_scale_trick": False,
        **{name: getattr(projection, name) for name in _FINGERPRINTS},
    }
    write_atomically(as_path("path", path), lambda file: torch.save(table, file))


def import_topk_pt(
    cls: type[AnyProjection],
    path: str | PathLike[str],
    student_tokenizer: TokenizerSource,
    teacher_tokenizer: TokenizerSource,
    *,
    normalize: bool = False,
) -> AnyProjection:
    """Read a dense table; no code in the file is run (`weights_only=True`).

    Entries with index -1 or likelihood 0 are left out, those of one id in a row added up. A row
    with one entry of equal bytes counts as exact, all others as imported. The table says nothing of
    pieces, so `pieces` is empty.

    Args:
        student_tokenizer, teacher_tokenizer: the pair that the table was built for. Rows past the
            student's vocabulary, as of a padded lm_head, must be empty.
        normalize: scale rows to sum to 1; otherwise one that does not is an error.

    Raises:
        FormatError: the file is no such table, or a row does not sum to 1.
        ShapeError: its rows or columns do not fit the pair.
        PairError: it was exported for another pair.
        MissingFileError: there is no such file.
        MissingExtraError: torch is not installed.
    """

    student = vocab_with_stops(Side("student", student_tokenizer))
    teacher = vocab_with_stops(Side("teacher", teacher_tokenizer))
    table = _read(path_to_read("path", path, "expected a .pt table of NeMo-RL"))
    indices, likelihoods = _arrays(table, path)
    used = (indices >= 0) & (likelihoods > 0)
    if len(indices) < len(student) or bool(used[len(student) :].any()):
        raise ShapeError(
            f"{path} holds {len(indices)} rows, the student tokenizer {len(student)} tokens; pass "
            "the student that the table was built for"
        )
    used = used[: len(student)]
    sums = np.where(used, likelihoods[: len(student)], 0).sum(axis=1)
    wrong = np.flatnonzero(used.any(axis=1) & (np.abs(sums - 1) > _ROW_SUM_TOLERANCE))
    if len(wrong) and not normalize:
        raise FormatError(
            f"{path}: row {wrong[0]} sums to {sums[wrong[0]]:.4f}, as do {len(wrong)} rows to "
            "other than 1; pass normalize=True to scale them"
        )
    rows, column = np.nonzero(used)
    rows, ids, weights = _added_up(
        rows, indices[rows, column], likelihoods[rows, column] / sums[rows]
    )
    # Stable: of equal weights the table's order stays.
    order = np.lexsort((-weights, rows))
    student_of, teacher_of, model_of = (str(table.get(name, "")) for name in _FINGERPRINTS)
    projection = cls(
        indptr=offsets(np.bincount(rows, minlength=len(student))),
        indices=ids[order],
        weights=weights[order].astype(np.float32),
        shape=(len(student), len(teacher)),
        rules=np.full(len(student), RULE_CODES["imported"], dtype=np.uint8),
        pieces_indptr=np.zeros(len(student) + 1, dtype=np.int64),
        pieces=np.zeros(0, dtype=np.int64),
        options=ProjectionOptions(top_k=max(1, indices.shape[1]), origin="imported"),
        student_fingerprint=student_of or student.fingerprint,
        teacher_fingerprint=teacher_of or teacher.fingerprint,
        model_fingerprint=model_of or teacher.model_fingerprint,
        student=student,
        teacher=teacher,
    )
    check_pair(projection, student, teacher, str(path))
    _name_rules(projection)
    return projection


def _added_up(
    rows: NDArray[np.int64], ids: NDArray[np.int64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Entries [n] by rising row, with those of one row and id as one, where the first was."""
    order = np.lexsort((ids, rows))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(rows[order]) != 0) | (np.diff(ids[order]) != 0)
    firsts = order[new]
    sums = np.bincount(np.cumsum(new) - 1, weights[order], len(firsts)).astype(np.float64)
    place = np.argsort(firsts)
    firsts = firsts[place]
    return rows[firsts], ids[firsts], sums[place]


def _read(path: Path) -> dict[str, object]:
    with needs_extra():
        import torch

    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; expected a .pt table of NeMo-RL")
    _check_zip(path)
    try:
        with warnings.catch_warnings():
            # torch warns of the pickles that it refuses next.
            warnings.simplefilter("ignore")
            table = torch.load(path, map_location="cpu", weights_only=True)
    # Of damaged or foreign pickles torch raises whatever its reader meets, down to IndexError.
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else "no reason"
        raise FormatError(
            f"{path} is not a torch file of plain tensors ({reason}); only those are read, as a "
            "pickle can run code"
        ) from error
    if not isinstance(table, dict):
        raise FormatError(
            f"{path} holds a {type(table).__name__}; expected a dictionary with 'indices' and "
            "'likelihoods'"
        )
    return table


def _check_zip(path: Path) -> None:
    """Compare the checksums of a torch file, which is a zip of stored parts; torch does not."""
    try:
        with zipfile.ZipFile(path) as file:
            packed = [part for part in file.infolist() if part.compress_type != zipfile.ZIP_STORED]
            damaged = packed[0].filename if packed else file.testzip()
    # Of damaged directories zipfile raises its own class and whatever its reader meets.
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, zipfile.BadZipFile):
            with path.open("rb"):
                pass  # not to be read at all: the system's own words
        raise FormatError(
            f"{path} is truncated or not a torch file ({error}); copy it again, or write it "
            "with torch.save"
        ) from error
    if damaged is not None:
        raise FormatError(f"{path} was altered: the checksum of {damaged} differs; copy it again")


def _arrays(
    table: dict[str, object], path: str | PathLike[str]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    import torch

    indices, likelihoods = table.get("indices"), table.get("likelihoods")
    if not (isinstance(indices, torch.Tensor) and isinstance(likelihoods, torch.Tensor)):
        keys = ", ".join(repr(key)[:40] for key in list(table)[:4])
        raise FormatError(
            f"{path} holds {keys or 'nothing'}; expected tensors 'indices' and 'likelihoods' "
            "(NeMo-RL's dense layout; its dictionary of pairs goes through its own sort_and_cut "
            "tool first)"
        )
    indices, likelihoods = indices.detach(), likelihoods.detach()
    whole = indices.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
    dense = all(tensor.layout == torch.strided for tensor in (indices, likelihoods))
    if (
        indices.dim() != 2
        or indices.shape != likelihoods.shape
        or not (whole and dense and likelihoods.dtype.is_floating_point)
    ):
        raise FormatError(
            f"{path}: indices is {indices.dtype} {tuple(indices.shape)}, likelihoods "
            f"{likelihoods.dtype} {tuple(likelihoods.shape)}; expected dense tensors of whole "
            "numbers and of floats, both of one shape [V_s, K]"
        )
    ids, weights = indices.long().numpy(), likelihoods.double().numpy()
    if not bool((np.isfinite(weights) & (weights >= 0)).all()):
        raise FormatError(f"{path}: likelihoods holds negative or non-finite values")
    if bool((ids < -1).any()):
        raise FormatError(f"{path}: indices holds {ids.min()}; expected teacher ids and -1")
    return ids, weights


def _name_rules(projection: ProjectionArrays) -> None:
    """Fills in the rules that the table itself shows."""

    student, teacher = projection.student, projection.teacher
    assert student is not None
    assert teacher is not None
    lengths = np.diff(projection.indptr)
    for s in np.flatnonzero(lengths <= 1).tolist():
        token = student.token_bytes(s)
        if lengths[s] == 1:
            partner = int(projection.indices[projection.indptr[s]])
            if not token or teacher.token_bytes(partner) != token:
                continue
            rule = "exact" if student.id_of(token) == s else "duplicate"
        elif token:
            rule = "unspellable"
        else:
            rule = "unpaired" if student.is_special(s) else "unused"
        projection.rules[s] = RULE_CODES[rule]
