"""`xtoken align`: what two tokenizers make of one text, for a person, a program or a corpus."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from xtoken._apart import check_apart
from xtoken.align import Aligner, Alignment, ChunkKind, Coverage
from xtoken.cli.align_view import alignment_view
from xtoken.cli.command import App
from xtoken.cli.outputs import check_out_folder
from xtoken.cli.plain_console import plain_console
from xtoken.cli.sides import Student, Teacher, read_side, read_text, sources_of
from xtoken.data.low_coverage import low_exact_bytes
from xtoken.data.stops import vocab_with_stops
from xtoken.errors import LowCoverageWarning, OptionError
from xtoken.vocab.display import visible_token
from xtoken.vocab.side import Side


def register(app: App) -> None:
    """Add the command."""
    app.command()(align)


def align(
    student: Student,
    teacher: Teacher,
    file: Annotated[
        Path | None,
        typer.Argument(help="UTF-8 text; - for standard input.", allow_dash=True, show_default="-"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for machines.")] = False,
    batch: Annotated[
        Path | None, typer.Option(help="Align a corpus: a .jsonl or .parquet of texts.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --batch: directory to write, or to complete.")
    ] = None,
    text_field: Annotated[
        str | None, typer.Option(help="With --batch: the column of texts.", show_default="text")
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(help="With --batch: rows in each file that is written.", show_default="10000"),
    ] = None,
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens/--no-special-tokens",
            help="Let each tokenizer add its own special tokens.",
        ),
    ] = True,
    whole_characters: Annotated[
        bool, typer.Option("--whole-characters", help="Never cut a UTF-8 character.")
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(help="Chunks that are shown; --json has all.", show_default="2000"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="With --batch; default one per core.")] = None,
) -> None:
    """Align two tokenizations of one text, or of each text of a corpus.

    With --batch, files that an earlier run made whole are kept: the rows are read again, and only
    those without a file are tokenized and aligned.
    """
    if (batch is None) != (out is None):
        raise OptionError("--batch and --out go together; pass both or neither")
    _check_read(batch, file, limit, as_json, text_field, rows, threads)
    if out is not None:
        check_out_folder(out)
        check_apart(out, sources_of(student, teacher), folder=True)
    sides = read_side("student", student), read_side("teacher", teacher)
    vocabs = [vocab_with_stops(side) for side in sides]
    aligner = Aligner(*vocabs, whole_characters=whole_characters, threads=threads)
    if batch is not None and out is not None:
        from xtoken.cli.align_corpus import Corpus, align_corpus

        corpus = Corpus(
            batch,
            "text" if text_field is None else text_field,
            out,
            10_000 if rows is None else rows,
            special_tokens,
        )
        result = align_corpus(corpus, aligner, *sides)
        _print_corpus(result, out, as_json)
        _warn_of_coverage(sides, result.coverage)
        return
    text = read_text(Path("-") if file is None else file)
    student_ids, teacher_ids = (
        side.encode([text], add_special_tokens=special_tokens)[0] for side in sides
    )
    alignment = aligner.align(student_ids, teacher_ids)
    if as_json:
        typer.echo(json.dumps(_as_json(alignment, *sides, student_ids, teacher_ids)))
    else:
        view = alignment_view(
            alignment, *sides, student_ids, teacher_ids, 2000 if limit is None else limit
        )
        plain_console().print(view)
    _warn_of_coverage(sides, alignment.coverage)


def _check_read(
    batch: Path | None,
    file: Path | None,
    limit: int | None,
    as_json: bool,
    text_field: str | None,
    rows: int | None,
    threads: int | None,
) -> None:
    """Refuse what would not be read of the other way to call the command."""
    if batch is None:
        for name, value in (("text-field", text_field), ("rows", rows), ("threads", threads)):
            if value is not None:
                raise OptionError(
                    f"--{name} {value} is for --batch; pass --batch and --out, or leave it out"
                )
        if limit is not None and as_json:
            raise OptionError(f"--limit {limit} with --json, which has all chunks; leave one out")
    elif file is not None:
        raise OptionError(f"{file} beside --batch {batch}, which is aligned; leave one out")
    elif limit is not None:
        raise OptionError(f"--limit {limit} with --batch, which aligns all; leave it out")


def _warn_of_coverage(sides: Sequence[Side], coverage: Coverage) -> None:
    advice = low_exact_bytes(sides, coverage)
    if advice is not None:
        warnings.warn(advice, LowCoverageWarning, stacklevel=2)


def _as_json(
    alignment: Alignment,
    student: Side,
    teacher: Side,
    student_ids: list[int],
    teacher_ids: list[int],
) -> dict[str, Any]:
    return {
        "student": _side_json(student, student_ids, alignment.student_bounds.tolist()),
        "teacher": _side_json(teacher, teacher_ids, alignment.teacher_bounds.tolist()),
        "kind": [ChunkKind(kind).name for kind in alignment.kind.tolist()],
        "coverage": coverage_json(alignment.coverage),
        "shapes": {f"{n}:{m}": count for (n, m), count in alignment.shapes().items()},
    }


def _side_json(side: Side, ids: list[int], bounds: list[int]) -> dict[str, Any]:
    tokens = [side.vocab.token_bytes(token_id) for token_id in ids]
    names = [visible_token(side.vocab, token_id) for token_id in ids]
    return {
        "vocab": side.vocab.fingerprint,
        "ids": ids,
        "bounds": bounds,
        "tokens": names,
        "hex": [token.hex() for token in tokens],
    }


def coverage_json(coverage: Coverage) -> dict[str, float]:
    """The counts of a coverage with its shares."""
    return asdict(coverage) | {
        "student_byte_share": coverage.student_byte_share,
        "teacher_byte_share": coverage.teacher_byte_share,
        "student_token_share": coverage.student_token_share,
        "teacher_token_share": coverage.teacher_token_share,
    }


def _print_corpus(result: Any, out: Path, as_json: bool) -> None:
    if as_json:
        summary = {
            "rows": result.rows,
            "left_out": result.left_out,
            "files": result.files,
            "made_now": result.made_now,
        }
        typer.echo(json.dumps(summary | {"coverage": coverage_json(result.coverage)}))
        return
    from xtoken.cli.align_view import coverage_table

    console = plain_console()
    console.print(coverage_table(result.coverage))
    console.print(
        f"{result.rows:,} rows in {result.files} files of {escape(str(out))}, "
        f"{result.made_now} made now; {result.left_out:,} with a blank text left out; "
        f"read them with datasets.load_dataset({escape(repr(str(out)))})",
        soft_wrap=True,
    )
