"""What commands that train or predict share: bars, quiet libraries, chat templates of files."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers.utils import logging as transformers_logging

from xtoken.data import Documents, LeftOut, read_documents
from xtoken.errors import DataError, MissingFileError, OptionError
from xtoken.training.prepare import Update


class Bars:
    """Shows progress as bars on a console."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextlib.contextmanager
    def progress(self, title: str, total: int | None) -> Iterator[Update]:
        """Show a bar while the context is open; nothing where there is nothing to do. A total of
        None is not known."""
        if total == 0:
            yield lambda done, remark: None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[remark]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as bars:
            task = bars.add_task(title, total=total, remark="")
            yield lambda done, remark: bars.update(task, completed=done, remark=remark)


def quiet_transformers() -> None:
    """Keep the bars and warnings of `transformers` out of ours."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    # Through Any: transformers declares the function without types.
    library: Any = transformers_logging
    library.disable_progress_bar()


def read_chat_template(option: str, file: Path) -> str:
    """The Jinja template of a file that an option names.

    Raises:
        MissingFileError, DataError: there is none, or it is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MissingFileError(
            f"--{option} {file} does not exist; pass a file with a Jinja template"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"--{option} {file} is not UTF-8 at byte {error.start}; convert it to UTF-8"
        ) from error


def check_split(split: str, sources: Sequence[str]) -> None:
    """Refuse a split that is of no source: those of lines or paragraphs are read whole.

    Raises:
        OptionError: names the first file.
    """
    plain = (".txt", ".jsonl")
    if (
        split != "train"
        and sources
        and all(Path(each).suffix in plain and Path(each).is_file() for each in sources)
    ):
        raise OptionError(
            f"--split {split}, but {sources[0]} is a file without splits; leave it out, or pass a "
            "directory or the name of a dataset on the hub"
        )


def read_data(
    sources: list[str],
    field: str | None,
    split: str,
    console: Console,
    teacher_column: str | None = None,
) -> Documents:
    """The documents that `--data` names; what cannot be used is counted and named."""
    found = read_documents(
        sources, field=field, split=split, strict=False, teacher_column=teacher_column
    )
    warn_of_left_out(console, found.left_out, len(found.left_out) + len(found), "rows")
    return found


def warn_of_left_out(
    console: Console,
    left_out: Sequence[LeftOut],
    total: int,
    what: str,
    *,
    count: int | None = None,
) -> None:
    """Say how many rows or examples are left out, and why the first ones; `count` where only these
    were kept."""
    if left_out:
        named = "; ".join(
            # Some reasons begin with the place themselves.
            each.reason if each.reason.startswith(each.source) else f"{each.source}: {each.reason}"
            for each in left_out[:3]
        )
        console.print(
            f"[bold yellow]warning:[/] {count or len(left_out):,} of {total:,} {what} are left "
            f"out; the first, {escape(named)}",
            soft_wrap=True,
        )


def show_bytes(count: float) -> str:
    """A size for people, as `1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def show_seconds(seconds: float) -> str:
    """A time for people, as `3 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
