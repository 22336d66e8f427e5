"""`xtoken project`: build W, look into it, exchange it with other programs, audit a pair."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from xtoken._apart import check_apart
from xtoken._core import Vocab
from xtoken._files import write_text
from xtoken.cli import project_tables as tables
from xtoken.cli.audited_pair import Threshold, audit_sides
from xtoken.cli.command import App
from xtoken.cli.outputs import check_out
from xtoken.cli.plain_console import plain_console
from xtoken.cli.sides import (
    MaybeStudent,
    MaybeTeacher,
    Student,
    Teacher,
    read_text,
    sources_of,
    working,
)
from xtoken.data.stops import vocab_with_stops
from xtoken.errors import OptionError
from xtoken.projection import Projection
from xtoken.vocab.display import is_utf8
from xtoken.vocab.side import Side

project = App(
    help="The projection W between two vocabularies.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

File = Annotated[Path, typer.Argument(help="A file that `xtoken project build` wrote.")]
TopK = Annotated[int, typer.Option(help="The most entries of a row.")]
Decay = Annotated[float, typer.Option(help="Weight of a piece over that of the one before.")]
MaxPieces = Annotated[int, typer.Option(help="Of more pieces the first stay.")]
Canonical = Annotated[
    list[str] | None,
    typer.Option(help="Differences that do not count: punctuation_space, case. May be repeated."),
]
ReverseRule = Annotated[
    str, typer.Option(help="off, unmatched or all: teacher tokens that split give weight back.")
]
SpecialRole = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ROLE=STUDENT,TEACHER",
        help="Special tokens that correspond: 'eot=<|im_end|>,<|eot_id|>'. May be repeated.",
    ),
]


def register(app: App) -> None:
    """Add the group of commands."""
    app.add_typer(project, name="project")


@project.command()
def build(
    student: Student,
    teacher: Teacher,
    out: Annotated[Path, typer.Option(help="File to write (.safetensors).")],
    top_k: TopK = 4,
    decay: Decay = 0.1,
    max_pieces: MaxPieces = 4,
    canonical: Canonical = None,
    reverse: ReverseRule = "off",
    special_role: SpecialRole = None,
    threads: Annotated[int | None, typer.Option(help="Threads; one per core by default.")] = None,
) -> None:
    """Build W for two tokenizers and write it to a file."""
    check_out(out)
    check_apart(out, sources_of(student, teacher))
    vocabs = _read(student, teacher)
    with working("building W"):
        w = Projection.build(
            *vocabs,
            top_k=top_k,
            decay=decay,
            max_pieces=max_pieces,
            canonical=canonical or (),
            special_roles=dict(_special_role(text) for text in special_role or ()),
            reverse=reverse,  # type: ignore[arg-type]  # checked by build, with its own message
            threads=threads,
            cache_dir=False,
        )
        w.save(out)
    console = plain_console()
    console.print(tables.statistics(w))
    size = out.stat().st_size / 1e6
    console.print(f"{escape(str(out))}: {size:.1f} MB", soft_wrap=True)


@project.command()
def show(file: File, student: MaybeStudent = None, teacher: MaybeTeacher = None) -> None:
    """Print what a file holds; with the tokenizers, check that it is theirs."""
    plain_console().print(tables.statistics(_load(file, student, teacher)))


@project.command()
def explain(
    tokens: Annotated[list[str], typer.Argument(help=r"Tokens; \n, \t and \xNN are escapes.")],
    student: Student,
    teacher: Teacher,
    file: Annotated[
        Path | None, typer.Option("--file", help="W; built with the defaults if left out.")
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="TOKENS are student ids.")] = False,
) -> None:
    """Print rows of W: the rule that made each, the teacher's pieces and their weights."""
    if file is None:
        vocabs = _read(student, teacher)
        with working("building W"):
            w = Projection.build(*vocabs)
    else:
        w = _load(file, student, teacher)
    wanted = [_token(token, ids) for token in tokens]
    plain_console().print(tables.explanations([w.explain(token) for token in wanted]))


@project.command("export")
def export_table(
    file: File, out: Annotated[Path, typer.Option(help="File to write (.pt).")]
) -> None:
    """Write W as the dense top-k table that NeMo-RL reads."""
    check_out(out)
    check_apart(out, [("FILE", file)])
    with working("writing the table"):
        Projection.load(file).export_topk_pt(out)
    size = out.stat().st_size / 1e6
    plain_console().print(f"{escape(str(out))}: {size:.1f} MB", soft_wrap=True)


@project.command("import")
def import_table(
    table: Annotated[Path, typer.Argument(help="A .pt table of NeMo-RL.")],
    student: Student,
    teacher: Teacher,
    out: Annotated[Path, typer.Option(help="File to write (.safetensors).")],
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale rows to sum to 1.")] = False,
) -> None:
    """Read such a table and write it as W for this pair."""
    check_out(out)
    check_apart(out, [*sources_of(student, teacher), ("TABLE", table)])
    vocabs = _read(student, teacher)
    with working("reading the table"):
        w = Projection.import_topk_pt(table, *vocabs, normalize=normalize)
        w.save(out)
    plain_console().print(tables.statistics(w))


@project.command()
def audit(
    student: Student,
    teacher: Teacher,
    threshold: Threshold = 0.6,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Also write the page of `xtoken report pair` here.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Also count what prefix KL compares in this text file.")
    ] = None,
    teacher_model: Annotated[
        str | None,
        typer.Option(
            help="The teacher, or a store of its predictions: show where its mass goes in the text."
        ),
    ] = None,
) -> None:
    """Say what two vocabularies share, where it matters, and which loss that speaks for."""
    if html is not None:
        check_out(html, "--html")
        read = ("--text", text), ("--teacher-model", teacher_model)
        check_apart(html, [*sources_of(student, teacher), *read], "--html")
    content = None if text is None else read_text(text)
    if teacher_model is not None and content is None:
        raise OptionError("--teacher-model predicts a text, and none was given; pass --text FILE")
    sides = Side("student", student), Side("teacher", teacher)
    found = audit_sides(*sides, threshold, content, teacher_model)
    result = found.audit
    if html is not None:
        write_text(html, found.page("the given text" if text is None else text.name))
    if as_json:
        json.dump(result.to_dict(), sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    console = plain_console()
    console.print(tables.overlap(result), tables.coverage(result), sep="\n")
    if result.supervision:
        console.print(tables.supervision(result))
    if result.placement:
        console.print(tables.placement(result))
    console.print(tables.recommendation(result))
    if html is not None:
        console.print(f"page: {escape(str(html))}", soft_wrap=True)


def _read(student: str, teacher: str) -> tuple[Vocab, Vocab]:
    with working("reading the tokenizers"):
        return (
            vocab_with_stops(Side("student", student)),
            vocab_with_stops(Side("teacher", teacher)),
        )


def _load(file: Path, student: str | None, teacher: str | None) -> Projection:
    with working("reading W"):
        return Projection.load(file, student, teacher)


def _token(text: str, is_id: bool) -> int | str | bytes:
    if is_id:
        if not re.fullmatch(r"[0-9]{1,10}", text):
            raise typer.BadParameter(f"{text!r} is not an id; leave --ids out for tokens")
        return int(text)
    # Bytes that the shell's encoding does not know come as halves of characters.
    spelled = text.encode("utf-8", "surrogateescape")
    if "\\" not in text:
        return text if is_utf8(spelled) else spelled
    escapes = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"\\": b"\\"}
    return re.sub(
        rb"\\(?:([ntr\\])|x([0-9a-fA-F]{2}))",
        lambda found: escapes[found[1]] if found[1] else bytes.fromhex(found[2].decode()),
        spelled,
    )


def _special_role(text: str) -> tuple[str, tuple[str, str]]:
    role, _, tokens = text.partition("=")
    student, comma, teacher = tokens.partition(",")
    if not (role and student and comma and teacher) or "," in teacher:
        raise typer.BadParameter(f"{text!r} is not of the form ROLE=STUDENT,TEACHER")
    return role, (student, teacher)
