"""What `xtoken distill` does: read, prepare, train, show, write."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.markup import escape

from xtoken._files import write_json, write_text
from xtoken.align import AlignmentBatch
from xtoken.cli.console import (
    Bars,
    quiet_transformers,
    read_chat_template,
    warn_of_left_out,
)
from xtoken.cli.distill_config import COMPARED, dated, fit_columns, read_config
from xtoken.cli.distill_data import read_run_texts
from xtoken.cli.distill_tables import (
    comparison_markdown,
    coverage_table,
    dry_run_table,
    loss_tokens,
    projection_table,
    result_table,
    taught_tokens,
)
from xtoken.cli.plain_console import plain_console
from xtoken.cli.teachers import TeacherOption, load_teachers
from xtoken.data import TextSplit
from xtoken.data.loss_mask import is_predicted
from xtoken.data.low_coverage import CoverageWatch
from xtoken.distillation import DistillLossName
from xtoken.errors import LowCoverageWarning, OptionError
from xtoken.report.curves import draw_curves
from xtoken.teachers import TeacherSource, TopKStore
from xtoken.teachers.served import PrefetchedTeacher
from xtoken.training.checkpoints import clear_run
from xtoken.training.config import DistillConfig
from xtoken.training.config_arguments import check_trainer
from xtoken.training.dry_run import dry_run
from xtoken.training.prepare import PreparedData, closing_teachers, open_teachers, prepare
from xtoken.training.processes import is_main_process
from xtoken.training.run import RunResult, check_picture, run_lock, train
from xtoken.training.run_files import CURVES_FILE
from xtoken.training.trial import check_run


@dataclass(frozen=True)
class Request:
    """The options of the command, as given; `settings` override those of the file `config`."""

    student: str
    teachers: list[TeacherOption]
    teacher_column: str | None
    data: list[str]
    held_out: list[str] | None
    split: str
    text_field: str | None
    chat_templates: Mapping[str, Path | None]
    config: Path | None
    settings: dict[str, Any]
    compare: bool
    out: Path
    resume: bool
    teacher_cache: Path
    dry_run: bool = False
    streaming: bool = False
    shuffle_buffer: int | None = None


def run(request: Request) -> None:
    """Run the command.

    Raises: XTokenError or OSError with a message for the user.
    """
    quiet_transformers()
    console = plain_console(quiet=not is_main_process())
    bars = Bars(console)
    config = dated(read_config(request), request)
    check_trainer(config)
    check_picture(config, request.out, request.resume)
    read = read_run_texts(request, config, console)
    texts = read.parts
    models = load_teachers(request.student, request.teachers)
    config = fit_columns(config, request, models, console)
    if len(models) > 1 and request.chat_templates["teacher"] is not None:
        raise OptionError(
            f"--teacher-chat-template is one for {len(models)} teachers; save each teacher's with "
            "its tokenizer instead"
        )
    for side, file in request.chat_templates.items():
        for each in models if file is not None else ():
            getattr(each.pair, f"{side}_tokenizer").chat_template = read_chat_template(
                f"{side}-chat-template", cast(Path, file)
            )
    materials = prepare(models, texts, config, bars, routes=read.routes)
    materials = replace(materials, stream=read.stream)
    _show_audited(console, materials, config)
    losses: list[DistillLossName] = [config.loss]
    if request.compare:
        own = [each.loss for each in models if each.loss is not None]
        if own:
            raise OptionError(
                f"--compare trains each loss with all teachers, but --teacher-loss names {own[0]}; "
                "pass one of them"
            )
        losses += [loss for loss in COMPARED if loss != config.loss]
    check_run(materials, config, losses)
    _show_materials(console, materials, texts, config)

    if request.dry_run:
        console.print(dry_run_table(dry_run(materials, config, request.teacher_cache)))
        console.print(f"nothing was written to {escape(str(request.out))} (--dry-run)")
        return
    opened = [
        open_teachers(each, config, losses, request.teacher_cache, bars)
        for each in materials.teachers
    ]
    with closing_teachers([each for sources in opened for each in sources.values()]):
        _train_all(console, request, materials, config, losses, opened)


def _train_all(
    console: Console,
    request: Request,
    materials: PreparedData,
    config: DistillConfig,
    losses: Sequence[DistillLossName],
    opened: Sequence[Mapping[str, TeacherSource | None]],
) -> None:
    """Train with each loss, from one start, and write what it came to."""
    for sources in opened:
        _show_store(console, sources)
    folders = {loss: request.out / "compare" / loss for loss in losses} | {config.loss: request.out}
    if not request.resume and is_main_process():
        # All of them: an interruption of this run must not leave one that an earlier run finished.
        for folder in filter(Path.is_dir, folders.values()):
            with run_lock(folder):
                clear_run(folder)
    bars = Bars(console)
    results = []
    for loss, folder in folders.items():
        settings = config.with_loss(loss)
        sources_of_loss = [sources[loss] for sources in opened]
        result = train(materials, settings, sources_of_loss, folder, bars, resume=request.resume)
        _show_earlier(console, result, request.resume)
        _show_unusable(console, result)
        results.append(result)
    console.print(result_table(results))
    if is_main_process():
        _write_comparison(request.out, results, config)
    drawn = (request.out / CURVES_FILE).exists()  # a finished run keeps the picture that it has
    written = "projection, metrics and curves" if drawn else "projection and metrics"
    console.print(f"student, {written} are in [bold]{escape(str(request.out))}[/]")


def _show_audited(console: Console, materials: PreparedData, config: DistillConfig) -> None:
    """What `auto` is for each teacher, and why."""
    for each in materials.teachers:
        if (each.models.loss or config.loss) == "auto":
            audit = each.pair.audit()
            console.print(
                f"loss of teacher {escape(each.models.teacher_name)}: "
                f"[bold]{audit.recommendation}[/], by the audit: {escape(audit.reason)}",
                soft_wrap=True,
            )


# Above this share of examples a cut or a loss of rows is more than a note.
_MUCH = 0.25


def _show_materials(
    console: Console, materials: PreparedData, texts: TextSplit, config: DistillConfig
) -> None:
    for each in materials.teachers:
        if materials.others:
            weight = "" if config.teacher_weighting else f", weight {each.models.weight:g}"
            loss = each.models.loss or config.loss
            console.print(f"[bold]teacher {escape(each.models.teacher_name)}[/]: {loss}{weight}")
        console.print(projection_table(each.projection))
        console.print(coverage_table(each))
        _warn_of_coverage(each)
    if texts.dropped:
        console.print(f"{texts.dropped:,} repeated or held-out texts were dropped from training")
    for name, part in (("training", materials.train), ("held-out", materials.held_out)):
        if part.cut > _MUCH * len(part):
            console.print(
                f"[bold yellow]warning:[/] {part.cut:,} of {len(part):,} {name} examples are cut "
                f"at max_tokens = {config.max_tokens}; raise it, or give shorter texts",
                soft_wrap=True,
            )
        elif part.cut:
            console.print(f"{name} examples: {part.cut:,} cut at max_tokens")
        warn_of_left_out(console, part.left_out, part.empty + len(part), f"{name} examples")


def _warn_of_coverage(materials: PreparedData) -> None:
    # Of what is for another teacher alone nothing is to be covered.
    own = [each for each in materials.train.examples if is_predicted(each.teacher_loss_mask)]
    if own:
        coverage = AlignmentBatch.stack([item.alignment for item in own]).coverage
        tokens, taught = sum(map(loss_tokens, own)), sum(map(taught_tokens, own))
        CoverageWatch(materials.pair.sides).see(tokens, taught, coverage)
    # Said once, of all texts.
    warnings.simplefilter("ignore", LowCoverageWarning)


def _show_store(console: Console, teachers: Mapping[str, object]) -> None:
    for served in {each for each in teachers.values() if isinstance(each, PrefetchedTeacher)}:
        server = served.source
        console.print(
            f"teacher: top {server.top_k} of {escape(server.model)} at "
            f"{escape(server.connection.url)}, asked as training goes",
            soft_wrap=True,
        )
    stores = [teacher for teacher in teachers.values() if isinstance(teacher, TopKStore)]
    if stores:
        store = stores[0]
        key = store.key
        kept = f"top {key.top_k}"
        if key.mass is not None:
            kept += f" within {key.mass:.4g} of the mass"
        if key.min_prob is not None:
            kept = f"probabilities from {key.min_prob:g}, the rest spread,"
        console.print(
            f"teacher: {kept} of {len(store):,} texts in {escape(str(store.directory))}, "
            f"{store.sequences_computed:,} of them computed now"
        )


def _show_earlier(console: Console, result: RunResult, resume: bool) -> None:
    if result.steps_before == result.steps:
        console.print(f"{result.loss}: all {result.steps} steps were done earlier")
    elif result.steps_before:
        console.print(f"{result.loss}: went on from step {result.steps_before} of {result.steps}")
    elif resume:
        console.print(f"{result.loss}: there was no whole checkpoint; it ran from the beginning")


def _show_unusable(console: Console, result: RunResult) -> None:
    """The rows of a stream that were left out, of which the first was named when it came."""
    counts = [each["rows_left_out"] for each in result.records if "rows_left_out" in each]
    if counts:
        console.print(
            f"[bold yellow]warning:[/] {result.loss}: {counts[-1]:,.0f} rows of the stream could "
            "not be used, and were left out",
            soft_wrap=True,
        )


def _write_comparison(out: Path, results: list[RunResult], config: DistillConfig) -> None:
    summaries = [result.summary() for result in results]
    write_json(out / "comparison.json", summaries)
    write_text(out / "comparison.md", comparison_markdown(results))
    picture = out / "comparison.png"
    if len(results) > 1 and config.curves:
        draw_curves({result.loss: result.records for result in results}, picture)
    else:
        picture.unlink(missing_ok=True)  # of an earlier run
