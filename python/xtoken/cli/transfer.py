"""`xtoken transfer`: give a model another tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xtoken.cli.command import App
from xtoken.cli.outputs import check_empty, check_out_folder
from xtoken.errors import OptionError


def register(app: App) -> None:
    """Add the command."""
    app.command()(transfer)


def transfer(
    model: Annotated[
        str,
        typer.Option(help="Model with its tokenizer: a directory, or a hub name."),
    ],
    tokenizer: Annotated[
        str, typer.Option(help="The tokenizer it is to have: a directory, or a hub name.")
    ],
    out: Annotated[Path, typer.Option(help="Directory to write; new or empty.")],
    decay: Annotated[
        float, typer.Option(help="Weight of a piece over that of the one before, in a mean.")
    ] = 1.0,
    max_pieces: Annotated[int, typer.Option(help="Of more pieces the first stay.")] = 4,
    pad_to_multiple_of: Annotated[
        int, typer.Option(help="Round the number of rows up to a multiple.")
    ] = 1,
    dtype: Annotated[
        str, typer.Option(help="auto, that of the model's files, float32 or bfloat16.")
    ] = "auto",
) -> None:
    """Write a model with another tokenizer; `xtoken distill` from the old one finishes the job."""
    if dtype not in ("auto", "float32", "bfloat16"):
        raise OptionError(f"--dtype {dtype}, expected auto, float32 or bfloat16")
    check_out_folder(out)
    check_empty(out)
    # torch and transformers take seconds to import: only once the command is really run.
    from xtoken.cli.transfer_run import run

    run(
        model,
        tokenizer,
        out,
        decay=decay,
        max_pieces=max_pieces,
        pad_to_multiple_of=pad_to_multiple_of,
        dtype=dtype,
    )
