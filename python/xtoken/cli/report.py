"""`xtoken report`: an alignment, a pair or runs as one HTML page that needs nothing but itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from xtoken._files import write_text
from xtoken.cli.command import App
from xtoken.cli.sides import Student, Teacher, read_document, working
from xtoken.data.conversations import Conversation
from xtoken.errors import OptionError
from xtoken.pair import Pair
from xtoken.vocab.side import Side, labels

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
    from xtoken.report.alignment_page import PageNames, alignment_page

    document, source = read_document(text, row)
    sides = Side("student", student), Side("teacher", teacher)
    for side in sides:  # first, as the vocabulary is then the tokenizer's own
        _ = side.tokenizer
    with working("aligning"):
        aligned = aligned_text(
            Pair(*sides), document, limit=limit, add_special_tokens=special_tokens
        )
    if isinstance(document, Conversation) and not special_tokens:
        raise OptionError(
            "--no-special-tokens with a conversation: its chat template prints them; leave it out"
        )
    names = page_names(*sides, student_name, teacher_name)
    page = alignment_page(
        aligned,
        PageNames(*names, source),
        student=_model("student", student_model),
        teacher=_model("teacher", teacher_model),
    )
    _write(out, page)


def page_names(
    student: Side, teacher: Side, student_name: str | None, teacher_name: str | None
) -> tuple[str, str]:
    """What a page calls the two: as asked, else as their folders are called."""
    found = labels(student, teacher)
    return student_name or found[0], teacher_name or found[1]


def _model(side: str, source: str | None) -> nn.Module | None:
    if source is None:
        return None
    with working(f"reading the {side}'s model"):
        from xtoken.teachers.load_model import load_causal_lm

        return load_causal_lm(source, side=side)


def _write(out: Path, page: str) -> None:
    if not out.parent.is_dir():
        raise OptionError(f"--out {out}: there is no directory {out.parent}; make it first")
    write_text(out, page)
    Console().print(f"page: {out}, {len(page) / 1e6:.1f} MB", highlight=False, soft_wrap=True)
