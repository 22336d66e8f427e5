"""`xtoken eval`: bits per byte of a model on texts, and tasks through `lm-eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xtoken._apart import check_apart
from xtoken.cli.command import App
from xtoken.cli.outputs import check_out
from xtoken.errors import OptionError


def register(app: App) -> None:
    """Add the command."""
    app.command("eval")(evaluate)


def evaluate(
    model: Annotated[str, typer.Option(help="A directory by save_pretrained, or a hub name.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Held-out texts or conversations, as distill takes them."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval, with commas between them, such as gsm8k,mmlu."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a directory or hub dataset.")] = "train",
    text_field: Annotated[
        str | None, typer.Option(help="Field of a .jsonl line with the text or the messages.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a text that are scored.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Texts per forward pass.")] = 16,
    shots: Annotated[
        int | None, typer.Option(help="Examples in the prompt of a task; default the task's own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions per task; default all.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of the weights: auto (its files'), float32, bfloat16.")
    ] = "float32",
    out: Annotated[Path | None, typer.Option(help="JSON file to write the scores to.")] = None,
) -> None:
    """Score a model: bits per byte of texts, which compare across tokenizers, and tasks."""
    named = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if tasks is not None and not named:
        raise OptionError(f"--tasks {tasks!r} names none; pass names with commas between them")
    if not data and not named:
        raise OptionError(
            "nothing to score; pass --data with texts, --tasks with tasks of lm-eval, or both"
        )
    if out is not None:
        check_out(out)
        check_apart(out, [("--model", model), *(("--data", each) for each in data or [])])
    # torch and transformers take seconds to import: only once the command is really run.
    from xtoken.cli.evaluate_run import Request, run

    run(
        Request(
            model=model,
            data=data or [],
            tasks=named,
            split=split,
            text_field=text_field,
            max_tokens=max_tokens,
            batch_size=batch_size,
            shots=shots,
            limit=limit,
            device=device,
            dtype=dtype,
            out=out,
        )
    )
