"""`xtoken teach`: a teacher's predictions of a corpus, computed once and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xtoken.cli.command import App
from xtoken.cli.outputs import check_out_folder


def register(app: App) -> None:
    """Add the command."""
    app.command()(teach)


def teach(
    data: Annotated[list[str], typer.Option(help="Texts or conversations, as distill takes them.")],
    out: Annotated[Path, typer.Option(help="Folder of the store; one that was begun is finished.")],
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Teacher: a directory by save_pretrained, or a hub name. With --url only its "
            "tokenizer is read."
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="Address of a server (vLLM, SGLang) that runs the teacher; its key is read from "
            "XTOKEN_API_KEY."
        ),
    ] = None,
    api: Annotated[
        str | None,
        typer.Option(
            help="The server's dialect: auto, vllm, vllm-tokens or sglang.", show_default="auto"
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="As the server names it, where it serves several.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Requests under way at once.", show_default="8")
    ] = None,
    timeout: Annotated[
        int | None,
        typer.Option(min=1, help="Seconds that the server may be silent.", show_default="120"),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Columns kept per token, at most: 512, or 8192 with --dtype spread."),
    ] = None,
    mass: Annotated[
        float | None,
        typer.Option(
            help="Keep of each token only the likeliest columns that together reach this share, "
            "such as 0.99; at most --top-k."
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Of the log-probabilities: float32, float16, uint8 (steps of 0.05 nats), or "
            "spread. The first three leave what is not kept as one bucket: on the demo P-KL is "
            "0.2 % and prefix KL 3 % below a live teacher's. spread takes a byte a column and "
            "spreads the rest by a prior, to be read as full logits: within 0.2 %, in a quarter of "
            "the space, but the losses of a step take a live teacher's time, 5 to 11 times that of "
            "top 512."
        ),
    ] = "float16",
    min_prob: Annotated[
        float | None,
        typer.Option(
            help="With --dtype spread: the probability from which a column is kept, 2e-5."
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Tokens of a text that are predicted; distill's, or more.")
    ] = 512,
    split: Annotated[str, typer.Option(help="Split of a directory or hub dataset.")] = "train",
    streaming: Annotated[
        bool,
        typer.Option(
            "--streaming", help="Read --data as it is predicted, for a corpus larger than memory."
        ),
    ] = False,
    text_field: Annotated[
        str | None, typer.Option(help="Field of a .jsonl line with the text or the messages.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file to print conversations with.")
    ] = None,
    date: Annotated[
        str | None, typer.Option(help="The day that chat templates print, YYYY-MM-DD.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda: where the teacher runs.")] = (
        "auto"
    ),
    teacher_dtype: Annotated[
        str, typer.Option(help="Of the teacher's weights: auto (its files'), float32, bfloat16.")
    ] = "auto",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Measure a few batches, print size and time, and stop."),
    ] = False,
) -> None:
    """Store a teacher's predictions, for `xtoken distill --teacher-store` without its weights."""
    check_out_folder(out, locked=True)
    # torch and transformers take seconds to import: only once the command is really run.
    from xtoken.cli.teach_run import Request, run

    run(
        Request(
            data=data,
            out=out,
            teacher=teacher,
            url=url,
            api=api,
            model=model,
            concurrency=concurrency,
            timeout=timeout,
            top_k=(8192 if dtype == "spread" else 512) if top_k is None else top_k,
            mass=mass,
            dtype=dtype,
            min_prob=2e-5 if min_prob is None and dtype == "spread" else min_prob,
            max_tokens=max_tokens,
            split=split,
            streaming=streaming,
            text_field=text_field,
            chat_template=chat_template,
            date=date,
            device=device,
            teacher_dtype=teacher_dtype,
            dry_run=dry_run,
            top_k_is_default=top_k is None,
        )
    )
