"""`xtoken distill`: train a student on documents and a teacher with another tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xtoken._apart import check_apart
from xtoken._files import unfinished
from xtoken.cli.command import App
from xtoken.cli.distill_options import DistillCommand, further_settings
from xtoken.cli.outputs import check_out_folder
from xtoken.errors import OptionError

if TYPE_CHECKING:
    from xtoken.training.models import ServedSource


def register(app: App) -> None:
    """Add the command."""
    app.command(cls=DistillCommand)(distill)


def distill(
    context: typer.Context,
    run_file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN.yaml]",
            help="Settings by the names of the flags, in YAML, JSON or TOML; flags go before them.",
            show_default=False,
        ),
    ] = None,
    student: Annotated[
        str | None, typer.Option(help="Student: a directory by save_pretrained, or a hub name.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Training texts or conversations: a file (.jsonl, .txt, .parquet, .csv, ...), a "
            "directory of them, or a dataset on the hub; may be repeated."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory to write; new, empty, or with --resume.")
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            help="Teacher: a directory by save_pretrained, or a hub name; several with their "
            "weights as --teacher A --teacher B=0.8."
        ),
    ] = None,
    teacher_store: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder that xtoken teach filled, in place of the teacher's weights; --teacher is "
            "then a directory with its tokenizer, by default the one in the folder."
        ),
    ] = None,
    teacher_url: Annotated[
        list[str] | None,
        typer.Option(
            help="Address of a server (vLLM, SGLang) that runs the teacher, asked as training "
            "goes; of --teacher only its tokenizer is read."
        ),
    ] = None,
    teacher_api: Annotated[
        str | None,
        typer.Option(
            help="The server's dialect: auto, vllm, vllm-tokens or sglang.", show_default="auto"
        ),
    ] = None,
    teacher_model: Annotated[
        str | None, typer.Option(help="As the server names it, where it serves several.")
    ] = None,
    teacher_concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Requests under way at once.", show_default="8"),
    ] = None,
    teacher_timeout: Annotated[
        int | None,
        typer.Option(min=1, help="Seconds that the server may be silent.", show_default="120"),
    ] = None,
    teacher_loss: Annotated[
        list[str] | None,
        typer.Option(help="Loss of each of several teachers, in their order; default --loss."),
    ] = None,
    teacher_weights: Annotated[
        str | None,
        typer.Option(
            help="Weight several teachers in each sample by their confidence: ce, entropy or "
            "max_prob, in place of their own weights."
        ),
    ] = None,
    teacher_column: Annotated[
        str | None,
        typer.Option(
            help="Field of the data that names the teachers of a row: the last part of their "
            "paths, one or a list; by default a row is for all."
        ),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(help="Held-out texts; by default a tenth of --data, by hash."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Split of a directory or hub dataset, such as train[:1%].", show_default="train"
        ),
    ] = None,
    streaming: Annotated[
        bool,
        typer.Option(
            "--streaming",
            help="Read --data as training goes, for a corpus larger than memory; the teacher runs "
            "in each step, or --teacher-store has what it says.",
        ),
    ] = False,
    shuffle_buffer: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --streaming: texts held at once to draw the next one from; 1 keeps the "
            "order.",
            show_default="10000",
        ),
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(
            help="Field of a .jsonl line with the text, or with the messages of a conversation; by "
            "default 'text', else 'messages'."
        ),
    ] = None,
    student_chat_template: Annotated[
        Path | None,
        typer.Option(help="Jinja file to print conversations with, in place of the student's own."),
    ] = None,
    teacher_chat_template: Annotated[
        Path | None, typer.Option(help="The same for the teacher.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="File of settings alone (JSON, YAML, TOML); all else goes before it."),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="prefix-kl, p-kl, exact-kl, h-kl, gold, uld, alm, bpm, escd, strict-top-k, "
            "partition-kl, same-vocab-kl, ce (no teacher), or auto: what the pair's audit "
            "recommends."
        ),
    ] = None,
    direction: Annotated[
        str | None, typer.Option(help="forward: KL(teacher || student), reverse, or jsd.")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="The teacher's share of jsd's mean.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Divides both sides' logits; default the loss's own.")
    ] = None,
    merge: Annotated[
        str | None, typer.Option(help="A chunk's rows to one distribution: chain, last or mean.")
    ] = None,
    learnable_projection: Annotated[
        bool | None, typer.Option(help="Train the weights of W too (p-kl).")
    ] = None,
    projection_learning_rate: Annotated[
        float | None, typer.Option(help="Learning rate of these weights; default 0.01.")
    ] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Also train prefix-kl, p-kl, gold and ce, from one start."),
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a micro-batch.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Micro-batches a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    kd_weight: Annotated[
        str | None, typer.Option(help="A number, or 'balanced' for the paper's CE / KD.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Teacher columns in the loss.")] = None,
    tail_bucket: Annotated[
        bool | None,
        typer.Option(help="Compare all other teacher columns too, together as one more."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest example, either side.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the data order.")] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu or cuda: where teacher and student run.")
    ] = None,
    mixed_precision: Annotated[
        str | None,
        typer.Option(help="no, or bf16: the student's forward pass in bfloat16."),
    ] = None,
    teacher_dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, or auto: that of the teacher's files.")
    ] = None,
    teacher_cache: Annotated[
        Path | None,
        typer.Option(
            help="Where teacher predictions are kept over runs; default XTOKEN_CACHE/teachers."
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints; 0, the default, for none."),
    ] = None,
    curves: Annotated[
        bool | None,
        typer.Option(help="Draw the metrics into curves.png at the end; the default does."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Take a few steps, print the memory and the time of the run, and write nothing.",
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the same command's run in --out from its newest checkpoint; start "
            "from the beginning where there is none yet.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of an earlier run in --out.")
    ] = False,
) -> None:
    """Distil a teacher into a student with another tokenizer; writes model, W, metrics, curves."""
    # torch and transformers take seconds to import: only once the command is really run.
    from xtoken.cli.distill_run import Request, run
    from xtoken.cli.run_file import read_run_file
    from xtoken.cli.teachers import parse_teachers

    given, of_file = ({}, {}) if run_file is None else read_run_file(run_file)
    flags: dict[str, Any] = {
        "student": student,
        "data": data,
        "out": out,
        "teacher": teacher,
        "teacher_store": teacher_store,
        "teacher_url": teacher_url,
        "teacher_api": teacher_api,
        "teacher_model": teacher_model,
        "teacher_concurrency": teacher_concurrency,
        "teacher_timeout": teacher_timeout,
        "teacher_loss": teacher_loss,
        "teacher_column": teacher_column,
        "held_out": held_out,
        "split": split,
        "streaming": streaming,
        "shuffle_buffer": shuffle_buffer,
        "text_field": text_field,
        "student_chat_template": student_chat_template,
        "teacher_chat_template": teacher_chat_template,
        "compare": compare,
        "resume": resume,
        "overwrite": overwrite,
        "teacher_cache": teacher_cache,
    }
    given |= {name: value for name, value in flags.items() if value}
    for name in ("student", "data", "out"):
        if not given.get(name):
            raise OptionError(f"--{name} is missing; pass it, or write it into the settings file")
    out = Path(given["out"])
    teachers = parse_teachers(
        given.get("teacher", []),
        [Path(store) for store in given.get("teacher_store", [])],
        given.get("teacher_loss", []),
        _served(given),
    )
    if not dry_run:
        sources = [("--student", given["student"])]
        for each in teachers:
            sources += [("--teacher", each.source), ("--teacher-store", each.store)]
        sources += [("--data", each) for each in given["data"]]
        sources += [("--held-out", each) for each in given.get("held_out") or ()]
        check_apart(out, sources, folder=True)
        _check_output(out, bool(given.get("overwrite")), bool(given.get("resume")))
    settings = {
        "loss": loss,
        "direction": direction,
        "beta": beta,
        "temperature": temperature,
        "merge": merge,
        "teacher_weighting": teacher_weights,
        "learnable_projection": learnable_projection,
        "projection_learning_rate": projection_learning_rate,
        "steps": steps,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "learning_rate": learning_rate,
        "kd_weight": _kd_weight(kd_weight),
        "top_k": top_k,
        "tail_bucket": tail_bucket,
        "max_tokens": max_tokens,
        "eval_every": eval_every,
        "seed": seed,
        "device": device,
        "mixed_precision": mixed_precision,
        "teacher_dtype": teacher_dtype,
        "checkpoint_every": checkpoint_every,
        "curves": curves,
    }
    named = {name: value for name, value in settings.items() if value is not None}
    templates = {
        side: Path(file) if (file := given.get(f"{side}_chat_template")) else None
        for side in ("student", "teacher")
    }
    cache = given.get("teacher_cache")
    run(
        Request(
            student=given["student"],
            teachers=teachers,
            teacher_column=given.get("teacher_column"),
            data=given["data"],
            held_out=given.get("held_out"),
            split=given.get("split", "train"),
            streaming=bool(given.get("streaming")),
            shuffle_buffer=given.get("shuffle_buffer"),
            text_field=given.get("text_field"),
            chat_templates=templates,
            config=config,
            settings=of_file | named | further_settings(context),
            compare=bool(given.get("compare")),
            out=out,
            resume=bool(given.get("resume")),
            dry_run=dry_run,
            teacher_cache=_default_cache(out) if cache is None else Path(cache),
        )
    )


def _served(given: dict[str, Any]) -> list[ServedSource]:
    """The servers of the teachers."""
    from xtoken.training.models import ServedSource

    urls = given.get("teacher_url", [])
    names = ("api", "model", "concurrency", "timeout")
    how = {name: given[f"teacher_{name}"] for name in names if given.get(f"teacher_{name}")}
    if how and not urls:
        name = next(iter(how))
        raise OptionError(
            f"--teacher-{name} {how[name]} is for a served teacher; pass --teacher-url too, or "
            "leave it out"
        )
    return [ServedSource(url, **how) for url in urls]


_STORE = "teacher-top-k"


def _default_cache(out: Path) -> Path:
    from xtoken._files import cache_directory

    directory = cache_directory()
    # Caching over runs is off: predictions then live with the run that they are for.
    return out / _STORE if directory is None else directory / "teachers"


def _kd_weight(text: str | None) -> float | str | None:
    if text is None or text == "balanced":
        return text
    try:
        return float(text)
    except ValueError:
        raise OptionError(
            f"--kd-weight {text}, expected a number or 'balanced'; leave it out for 'balanced'"
        ) from None


def _check_output(out: Path, overwrite: bool, resume: bool) -> None:
    if overwrite and resume:
        raise OptionError(
            "--resume resumes the run in --out, and --overwrite replaces it; pass one of them"
        )
    check_out_folder(out, locked=True)
    # Of the processes that torchrun starts only the first one writes, maybe already.
    first = os.environ.get("RANK", "0") == "0"
    if overwrite or not first or not out.is_dir() or _holds_no_run(out):
        return
    from xtoken.training.checkpoints import has_run

    begun = has_run(out)
    if resume and not begun:
        raise OptionError(
            f"--out {out} is not empty, and holds no run to resume; pass the path of one"
        )
    if not resume:
        found = "holds a run; --resume resumes it" if begun else "is not empty"
        raise OptionError(f"--out {out} {found}; pass another path, or --overwrite")


def _holds_no_run(out: Path) -> bool:
    """Whether a folder is empty, or has only what a run that ended before its first step left."""
    names = {path.name for path in {*out.iterdir()}.difference(unfinished(out))}
    if not names:
        return True
    from xtoken.training.run_files import LOCK_FILE

    return names <= {_STORE, LOCK_FILE}
