"""`xtoken report`: an alignment, a pair or runs as one HTML page that needs nothing but itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from xtoken._apart import check_apart
from xtoken._files import write_text
from xtoken.cli.audited_pair import Threshold, audit_sides
from xtoken.cli.command import App
from xtoken.cli.outputs import check_out
from xtoken.cli.plain_console import plain_console
from xtoken.cli.run_records import read_run, run_names
from xtoken.cli.sides import Student, Teacher, page_names, read_document, sources_of, working
from xtoken.errors import OptionError
from xtoken.pair import Pair
from xtoken.vocab.side import Side

if TYPE_CHECKING:
    from torch import nn

report = App(
    help="Pages that show an alignment, a pair or a run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path, typer.Option(help="HTML file to write.")]
StudentName = Annotated[
    str | None, typer.Option(help="What the page calls the student; its folder by default.")
]
TeacherName = Annotated[str | None, typer.Option(help="The same for the teacher.")]


def register(app: App) -> None:
    """Add the group of commands."""
    app.add_typer(report, name="report")


@report.command()
def alignment(
    student: Student,
    teacher: Teacher,
    out: Out,
    text: Annotated[
        str,
        typer.Option(
            metavar="FILE|TEXT",
            help="A UTF-8 file (of a .jsonl the row of --row), - for standard input, or the text.",
        ),
    ] = "-",
    row: Annotated[int, typer.Option(help="Row of a .jsonl file, from 1.")] = 1,
    student_model: Annotated[
        str | None,
        typer.Option(help="Directory or hub name of the student's model, for probabilities."),
    ] = None,
    teacher_model: Annotated[
        str | None,
        typer.Option(help="The same for the teacher, for what each loss makes of a chunk."),
    ] = None,
    limit: Annotated[int, typer.Option(help="Chunks that are shown, from the first.")] = 500,
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens/--no-special-tokens",
            help="Let each tokenizer add its own special tokens to a text.",
        ),
    ] = True,
    student_name: StudentName = None,
    teacher_name: TeacherName = None,
) -> None:
    """Write the alignment of a text or a conversation as a page."""
    from xtoken.report.aligned_text import aligned_text
    from xtoken.report.alignment_page import alignment_page
    from xtoken.report.page import PageNames

    check_out(out)
    models = ("--student-model", student_model), ("--teacher-model", teacher_model)
    check_apart(out, [*sources_of(student, teacher), ("--text", text), *models])
    document, source = read_document(text, row)
    if not special_tokens and not isinstance(document, str):
        raise OptionError(
            f"--no-special-tokens with {source}: what prints a conversation or a completion adds "
            "them; leave it out"
        )
    sides = Side("student", student), Side("teacher", teacher)
    for side in sides:  # first, as the vocabulary is then the tokenizer's own
        _ = side.tokenizer
    with working("aligning"):
        aligned = aligned_text(
            Pair(*sides), document, limit=limit, add_special_tokens=special_tokens
        )
    names = page_names(*sides, student_name, teacher_name)
    page = alignment_page(
        aligned,
        PageNames(*names, source),
        student=_model("student", student_model),
        teacher=_model("teacher", teacher_model),
    )
    _write(out, page)


@report.command()
def pair(
    student: Student,
    teacher: Teacher,
    out: Out,
    threshold: Threshold = 0.6,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|TEXT", help="Also count what prefix KL compares in this file or text."
        ),
    ] = None,
    rows: Annotated[int, typer.Option(help="The most rows of W on the page.")] = 20_000,
    student_name: StudentName = None,
    teacher_name: TeacherName = None,
) -> None:
    """Write what suits a pair, and why, as a page: the one of `xtoken project audit --html`."""
    check_out(out)
    check_apart(out, [*sources_of(student, teacher), ("--text", text)])
    document, source = (None, "") if text is None else read_document(text)
    if document is not None and not isinstance(document, str):
        raise OptionError(f"--text {text} holds no plain text; an audit counts one: pass a text")
    found = audit_sides(Side("student", student), Side("teacher", teacher), threshold, document)
    with working("writing the page"):
        page = found.page(source, student_name, teacher_name, rows)
    _write(out, page)


@report.command("run")
def runs(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="1 to 8 directories that `xtoken distill` wrote, or a Trainer with checkpoints.",
        ),
    ],
    out: Out,
) -> None:
    """Write what runs logged as a page, several runs over each other."""
    from xtoken.report.run_page import Run, run_page

    check_out(out)
    check_apart(out, [("the page of", each) for each in folders])
    with working("reading the runs"):
        found = [
            Run(name, *read_run(folder))
            for folder, name in zip(folders, run_names(folders), strict=True)
        ]
    _write(out, run_page(found))


def _model(side: str, source: str | None) -> nn.Module | None:
    if source is None:
        return None
    with working(f"reading the {side}'s model"):
        from xtoken.cli.console import quiet_transformers
        from xtoken.teachers.load_model import load_causal_lm

        quiet_transformers()
        return load_causal_lm(source, side=side)


def _write(out: Path, page: str) -> None:
    write_text(out, page)
    size = len(page) / 1e6
    plain_console().print(f"page: {escape(str(out))}, {size:.1f} MB", soft_wrap=True)
