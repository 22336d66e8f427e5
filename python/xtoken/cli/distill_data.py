"""The texts of `xtoken distill`: read into memory, or as a stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console

from xtoken.cli.console import check_split, read_data, warn_of_left_out
from xtoken.data import Document, Documents, LeftOut, TextSplit, keep_apart, split_held_out
from xtoken.data.stream import DocumentStream
from xtoken.errors import DataError, OptionError
from xtoken.training.config import DistillConfig
from xtoken.training.stream import SHUFFLE_BUFFER, TrainingStream, read_head

if TYPE_CHECKING:
    from xtoken.cli.distill_run import Request

HELD_OUT_FRACTION = 0.1


@dataclass(frozen=True)
class RunTexts:
    """What a run reads.

    Attributes:
        parts: training texts, or a sample of them, and the held-out ones.
        routes: of a document in them, what names its teachers; None where no column does.
        stream: the training texts, where `parts` has but a sample.
    """

    parts: TextSplit
    routes: Mapping[Document, object] | None
    stream: TrainingStream | None = None


def read_run_texts(request: Request, config: DistillConfig, console: Console) -> RunTexts:
    """Both parts, and which teachers a document is for, where a column says so.

    Raises:
        DataError, MissingFileError: as `read_documents`.
    """
    check_split(request.split, [*request.data, *(request.held_out or ())])
    if request.streaming:
        return _streamed(request, config, console)
    column = request.teacher_column
    texts = read_data(request.data, request.text_field, request.split, console, column)
    routes = None if column is None else texts.teachers
    if not request.held_out:
        return RunTexts(_split(texts), routes)
    held_out = read_data(request.held_out, request.text_field, request.split, console)
    return RunTexts(keep_apart(texts, held_out), routes)


def _split(texts: Documents) -> TextSplit:
    try:
        return split_held_out(texts, HELD_OUT_FRACTION)
    except DataError as error:  # of which the remedy is one of the function
        counts = str(error).partition(";")[0]
        raise DataError(
            f"{counts}; give more texts, or others to hold out by --held-out"
        ) from error


def _streamed(request: Request, config: DistillConfig, console: Console) -> RunTexts:
    column = request.teacher_column
    source = DocumentStream(
        request.data, field=request.text_field, split=request.split, teacher_column=column
    )
    given = None
    if request.held_out:
        given = read_data(request.held_out, request.text_field, request.split, console)
    head = read_head(source, HELD_OUT_FRACTION, given)
    texts = head.texts
    where = "" if given is not None else f", of the first {head.rows:,} rows of the stream"
    console.print(
        f"streaming: {len(texts.held_out):,} texts are held out{where}; the table of training is "
        f"that of the first {len(texts.train):,} texts",
        soft_wrap=True,
    )
    left_out = [LeftOut(row.source, row.reason) for row in head.unusable]
    warn_of_left_out(console, left_out, head.rows, "rows at the beginning of the stream")
    stream = TrainingStream(
        source,
        held_out=texts.held_out,
        seed=config.seed,
        buffer=request.shuffle_buffer or SHUFFLE_BUFFER,
    )
    return RunTexts(texts, None if column is None else head.teachers, stream)


def check_streaming(request: Request, settings: Mapping[str, object]) -> None:
    """Refuse what cannot be combined with a stream, or needs one.

    Args:
        settings: of the run, by name, as they were given.

    Raises:
        OptionError: names the option and what does the same.
    """
    if not request.streaming:
        if request.shuffle_buffer is not None:
            raise OptionError(
                f"--shuffle-buffer {request.shuffle_buffer} is for --streaming; texts in memory "
                "are shuffled whole: leave it out"
            )
        return
    stored = all(each.store or each.served for each in request.teachers)
    top_k = settings.get("teacher_top_k")
    if top_k is not None and not stored:
        raise OptionError(
            f"--teacher-top-k {top_k} stores predictions of all texts before training, which a "
            "stream has no end for; leave it out, or fill a store by xtoken teach --streaming and "
            "pass --teacher-store"
        )
    strategy = settings.get("train_sampling_strategy", "random")
    if strategy not in ("random", "sequential"):
        raise OptionError(
            f"--train-sampling-strategy {strategy} needs the length of every text, which a stream "
            "does not know; leave it out"
        )
    if strategy == "sequential" and request.shuffle_buffer != 1:
        raise OptionError(
            "--train-sampling-strategy sequential with --streaming; pass --shuffle-buffer 1"
        )
