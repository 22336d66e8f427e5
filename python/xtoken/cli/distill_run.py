"""What `xtoken distill` does: read, prepare, train, show, write."""

from __future__ import annotations

import datetime
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
from xtoken.cli.distill_data import check_streaming, read_run_texts
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
from xtoken.distillation.options import check_teacher_weights
from xtoken.errors import LowCoverageWarning, OptionError
from xtoken.report.curves import check_curves, draw_curves
from xtoken.teachers import TeacherSource, TopKStore
from xtoken.teachers.served import PrefetchedTeacher
from xtoken.teachers.store_notes import StoreNotes
from xtoken.training.checkpoints import clear_run, saved_settings
from xtoken.training.config import DistillConfig, read_settings
from xtoken.training.config_arguments import check_trainer
from xtoken.training.dry_run import dry_run
from xtoken.training.prepare import PreparedData, closing_teachers, open_teachers, prepare
from xtoken.training.processes import is_main_process
from xtoken.training.run import RunResult, run_lock, train
from xtoken.training.run_files import CURVES_FILE
from xtoken.training.trainer_options import ALIASES
from xtoken.training.trial import check_run

COMPARED: tuple[DistillLossName, ...] = ("prefix-kl", "p-kl", "gold", "ce")


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
    config = _dated(_config(request), request)
    check_trainer(config)
    if config.curves and not (request.resume and (request.out / CURVES_FILE).exists()):
        check_curves()
    read = read_run_texts(request, config, console)
    texts = read.parts
    models = load_teachers(request.student, request.teachers)
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


def _config(request: Request) -> DistillConfig:
    # Merged before they are checked: the file may need the option beside it.
    settings = {} if request.config is None else read_settings(request.config)
    settings |= request.settings
    given = {ALIASES.get(name, name) for name in settings}
    check_streaming(request, settings)
    served = any(each.served is not None for each in request.teachers)
    if request.streaming and not served:
        settings["teacher_top_k"] = None
    stores = [each.store for each in request.teachers if each.store is not None]
    if stores and settings.get("on_policy_fraction"):
        raise OptionError(
            f"--on-policy-fraction {settings['on_policy_fraction']} with --teacher-store: a store "
            "has no predictions of what the student will say; pass --teacher, and --teacher-top-k "
            "none"
        )
    if stores:
        # What is spread is read as full logits are, and bounds no columns.
        settings["teacher_top_k"] = None
    if served:
        # A server gives the likeliest columns: those of the loss, where nothing else is said.
        default = DistillConfig.top_k
        columns = settings.get("teacher_top_k") or settings.get("top_k", default)
        if columns is None:
            raise OptionError(
                "top_k is None, but a server gives the teacher's likeliest columns alone; pass "
                "--top-k"
            )
        if isinstance(columns, int):  # what else there is, the settings refuse
            settings.setdefault("top_k", min(default or columns, columns))
            settings["teacher_top_k"] = columns
    keys = [TopKStore.open(store).key for store in stores]
    if not all(key.is_spread for key in keys):
        stored = min(key.top_k for key in keys if not key.is_spread)
        settings = {"top_k": min(DistillConfig.top_k or stored, stored)} | settings
        settings["teacher_top_k"] = stored
    config = DistillConfig.from_settings(settings)
    weights = [each.weight for each in request.teachers]
    check_teacher_weights(weights, config.teacher_weighting)
    if not request.compare:
        # A server is asked for as many columns, and what is stored bounds them.
        bounding = {"top_k"} if served or settings.get("teacher_top_k") is not None else set()
        losses = [each.loss or config.loss for each in request.teachers] or [config.loss]
        config.check_read(given - bounding, losses)
    return config


def _dated(config: DistillConfig, request: Request) -> DistillConfig:
    """Fix the day that chat templates print: that of the run that is resumed, of the stored
    predictions, or today."""
    if config.date is not None:
        return config
    earlier = saved_settings(request.out).get("date") if request.resume else None
    if earlier is None:
        stores = [each.store for each in request.teachers if each.store is not None]
        dates = {notes.date for notes in map(StoreNotes.of, stores) if notes is not None}
        if len(dates) > 1:
            raise OptionError(
                f"the teacher stores were filled on {', '.join(sorted(dates))}, which chat "
                'templates may print; name one day in --config, {"date": "YYYY-MM-DD"}'
            )
        earlier = next(iter(dates), None)
    return replace(config, date=str(earlier or datetime.date.today().isoformat()))


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
