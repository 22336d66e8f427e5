"""A corpus, aligned file by file: what is whole stays when the command is started again."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xtoken._extras import needs_extra
from xtoken._files import (
    read_json,
    sealed,
    sha256_of,
    temporary_beside,
    unsealed,
    write_text,
    writes,
)
from xtoken._locks import locked_alone
from xtoken.align import Aligner, AlignmentBatch, Coverage
from xtoken.cli.plain_console import plain_console
from xtoken.errors import DataError, FormatError, MissingFileError, OptionError
from xtoken.vocab.side import Side

# Hidden, so that `datasets` reads the parquet files beside it and nothing else.
_STATE = ".xtoken-align"
_LOCK_FILE = ".lock"
_ENCODED_AT_ONCE = 512


@dataclass(frozen=True)
class Corpus:
    """What is aligned, and where the answer goes.

    Args:
        source: .jsonl or .parquet.
        text_field: the column of texts.
        out: directory of `part-NNNNN.parquet`.
        rows_per_file: rows in each of them but the last.
        special_tokens: whether each tokenizer adds its own.
    """

    source: Path
    text_field: str
    out: Path
    rows_per_file: int
    special_tokens: bool


@dataclass(frozen=True)
class CorpusResult:
    """What the directory holds at the end, and how many of its files this run made.

    Args:
        rows: that are aligned.
        left_out: rows of the source with a blank text.
    """

    rows: int
    left_out: int
    files: int
    made_now: int
    coverage: Coverage


def align_corpus(corpus: Corpus, aligner: Aligner, student: Side, teacher: Side) -> CorpusResult:
    """Align each text that is not blank; files that an earlier run finished are kept.

    Raises:
        OptionError: the source is of no known kind, or the directory is of another alignment.
        FormatError: a row holds no text.
        OSError: a file cannot be read.
        FailedWriteError: one cannot be written.
    """
    if corpus.rows_per_file < 1:
        raise OptionError(f"--rows {corpus.rows_per_file} is out of range; expected 1 or more")
    total, texts = _read_texts(corpus)
    state = corpus.out / _STATE
    if not state.is_dir():
        if corpus.out.is_dir() and any(corpus.out.iterdir()):
            raise _foreign(corpus.out)
        with writes(state):
            state.mkdir(parents=True)
    refused = OptionError(
        f"another process aligns into {corpus.out}; wait for its end, or pass another --out"
    )
    with locked_alone(state / _LOCK_FILE, refused):
        _claim(corpus, aligner, student, teacher, state)
        return _aligned(corpus, aligner, student, teacher, total, texts)


def _aligned(
    corpus: Corpus,
    aligner: Aligner,
    student: Side,
    teacher: Side,
    total: int,
    texts: Iterator[tuple[int, str]],
) -> CorpusResult:
    state = corpus.out / _STATE
    rows, files, made_now, coverage = 0, 0, 0, None
    with _progress() as progress:
        task = progress.add_task("aligning", total=total)
        told = ((row, text) for row, text in texts if text.strip())
        while True:
            part = list(islice(told, corpus.rows_per_file))
            if not part:
                break
            name = f"part-{files:05d}"
            done, file = state / f"{name}.json", corpus.out / f"{name}.parquet"
            own = _read_finished(done, file)
            if own is None:
                own = _write_part(file, part, aligner, student, teacher, corpus)
                write_text(done, sealed({"sha256": sha256_of(file), **asdict(own)}))
                made_now += 1
            coverage = own if coverage is None else coverage + own
            rows, files = rows + len(part), files + 1
            progress.update(task, completed=part[-1][0] + 1)
        progress.update(task, completed=total)
    if coverage is None:
        raise FormatError(f"{corpus.source} holds no text; pass a file with texts")
    return CorpusResult(rows, total - rows, files, made_now, coverage)


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=plain_console(stderr=True))


def _claim(corpus: Corpus, aligner: Aligner, student: Side, teacher: Side, state: Path) -> None:
    """Writes down what the directory is of, or checks that it is of the same."""
    claim = {
        "aligner": aligner.fingerprint,
        # The aligner is of the vocabularies; how a text is cut is told by the tokenizer alone.
        "student_tokenizer": student.content,
        "teacher_tokenizer": teacher.content,
        "numbering": "rows of the source, those with a blank text too",
        "source": sha256_of(corpus.source),
        "text_field": corpus.text_field,
        "rows_per_file": corpus.rows_per_file,
        "special_tokens": corpus.special_tokens,
    }
    file = state / "claim.json"
    if file.is_file():
        found = read_json(file, "the mark of an alignment,")
        held = found if isinstance(found, dict) else {}
        differing = [name for name, value in claim.items() if held.get(name) != value]
        if differing:
            raise OptionError(
                f"{corpus.out} holds the alignment of another {', '.join(differing)}; "
                "pass another --out, or the arguments it was begun with"
            )
        return
    # A run that ended before it wrote its claim had made nothing.
    if any(each != state for each in corpus.out.iterdir()):
        raise _foreign(corpus.out)
    write_text(file, json.dumps(claim))


def _foreign(out: Path) -> OptionError:
    return OptionError(
        f"{out} is not empty and was not written by `xtoken align --batch`; choose another --out"
    )


def _read_texts(corpus: Corpus) -> tuple[int, Iterator[tuple[int, str]]]:
    """The number of rows, and each row's number, from 0, with its text, which may be blank."""
    if corpus.source.suffix == ".jsonl":
        texts = list(_jsonl_texts(corpus))
        if not any(text.strip() for _, text in texts):
            raise FormatError(f"{corpus.source} holds no text; pass a file with texts")
        return len(texts), iter(texts)
    if corpus.source.suffix == ".parquet":
        parquet = _pyarrow("pyarrow.parquet")
        if not corpus.source.is_file():
            raise MissingFileError(f"{corpus.source} does not exist; pass a .jsonl or .parquet")
        try:
            source = parquet.ParquetFile(corpus.source)
        except _pyarrow().lib.ArrowException as error:
            raise FormatError(
                f"{corpus.source} is not a parquet file ({error}); write it again"
            ) from error
        if corpus.text_field not in source.schema_arrow.names:
            raise FormatError(
                f"{corpus.source} has the columns {', '.join(source.schema_arrow.names)} and no "
                f"{corpus.text_field!r}; pass --text-field"
            )
        return source.metadata.num_rows, _parquet_texts(source, corpus)
    raise OptionError(f"--batch {corpus.source} is neither .jsonl nor .parquet; convert it first")


def _jsonl_texts(corpus: Corpus) -> Iterator[tuple[int, str]]:
    # They bring torch with them, which the other commands on tokenizers do without.
    from xtoken.data.file_rows import file_rows
    from xtoken.data.read import check_source
    from xtoken.data.rows import check_text

    check_source(corpus.source)
    for row, (place, value) in enumerate(file_rows(corpus.source)):
        if isinstance(value, DataError):
            raise value
        text = value.get(corpus.text_field) if isinstance(value, Mapping) else value
        yield row, _checked(text, corpus, place)
        check_text(str(text), f"{place}: field {corpus.text_field!r}")


def _parquet_texts(source: Any, corpus: Corpus) -> Iterator[tuple[int, str]]:
    row = 0
    for batch in source.iter_batches(batch_size=1024, columns=[corpus.text_field]):
        for text in batch.column(0).to_pylist():
            yield row, _checked(text, corpus, f"{corpus.source} row {row}")
            row += 1


def _checked(text: Any, corpus: Corpus, where: str) -> str:
    if isinstance(text, str):
        return text
    raise FormatError(
        f"{where} has no string in field {corpus.text_field!r}; pass --text-field, or leave the "
        "row out"
    )


def _write_part(
    file: Path,
    numbered: list[tuple[int, str]],
    aligner: Aligner,
    student: Side,
    teacher: Side,
    corpus: Corpus,
) -> Coverage:
    pa, parquet = _pyarrow(), _pyarrow("pyarrow.parquet")
    texts = [text for _, text in numbered]
    ids = [
        [
            row
            for start in range(0, len(texts), _ENCODED_AT_ONCE)
            for row in side.encode(
                texts[start : start + _ENCODED_AT_ONCE], add_special_tokens=corpus.special_tokens
            )
        ]
        for side in (student, teacher)
    ]
    batch = aligner.align_batch(*ids)
    columns = {
        "row": pa.array([row for row, _ in numbered], pa.int64()),
        "student_ids": pa.array(ids[0], pa.list_(pa.int64())),
        "teacher_ids": pa.array(ids[1], pa.list_(pa.int64())),
        **_alignment_columns(batch),
    }
    with temporary_beside(file) as temporary:
        # Checksums for readers that ask for them; our own is beside the file.
        parquet.write_table(pa.table(columns), temporary, write_page_checksum=True)
    return batch.coverage


def _alignment_columns(batch: AlignmentBatch) -> dict[str, Any]:
    pa = _pyarrow()
    offsets = batch.chunk_indptr
    bound_offsets = offsets + np.arange(len(offsets))

    def lists(values: Any, ends: Any) -> Any:
        return pa.LargeListArray.from_arrays(pa.array(ends), pa.array(values))

    return {
        "student_bounds": lists(batch.student_bounds, bound_offsets),
        "teacher_bounds": lists(batch.teacher_bounds, bound_offsets),
        "kind": lists(batch.kind, offsets),
        "byte_counts": lists(batch.byte_counts.reshape(-1), np.arange(len(offsets)) * 4),
    }


def _read_finished(done: Path, file: Path) -> Coverage | None:
    """The coverage of a part that is there as it was written; otherwise it is made again."""
    if not (done.is_file() and file.is_file()):
        return None
    try:
        values = unsealed(read_json(done, "the coverage of a finished part,"))
        if values is None or values.pop("sha256") != sha256_of(file):
            return None
        return Coverage(**values)
    except (FormatError, KeyError, TypeError):
        return None


def _pyarrow(module: str = "pyarrow") -> Any:
    with needs_extra():
        return importlib.import_module(module)
