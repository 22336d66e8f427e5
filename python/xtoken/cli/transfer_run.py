"""What `xtoken transfer` does: read, transfer, write, show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.markup import escape
from rich.table import Table

from xtoken._files import folder_beside, write_json
from xtoken.cli.console import Bars, quiet_transformers
from xtoken.cli.outputs import check_empty
from xtoken.cli.plain_console import plain_console
from xtoken.errors import MissingFileError, ModelSourceError
from xtoken.pair import Pair
from xtoken.teachers.load_model import load_causal_lm
from xtoken.transfer import RowCounts, TransferCounts
from xtoken.transfer.parts import MERGE_ADAPTERS, with_all_pieces
from xtoken.vocab.load import by_transformers, is_hub_name, no_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COUNTS_FILE = "transfer.json"


def run(
    model_source: str,
    tokenizer_source: str,
    out: Path,
    *,
    decay: float,
    max_pieces: int,
    pad_to_multiple_of: int,
    dtype: str,
) -> None:
    """Run the command; the directory is written whole or not at all.

    Raises: XTokenError or OSError with a message for the user.
    """
    quiet_transformers()
    console = plain_console()
    for side, source in (("model", model_source), ("tokenizer", tokenizer_source)):
        if not Path(source).is_dir() and not is_hub_name(source):
            raise MissingFileError(
                f"{side} directory {source} {no_directory(source)}; pass a directory written by "
                "save_pretrained, or the name of a model on the hub (owner/model)"
            )
    if (Path(model_source) / "adapter_config.json").is_file():
        raise ModelSourceError(f"model directory {model_source} holds adapters; {MERGE_ADAPTERS}")
    new = by_transformers(tokenizer_source, "tokenizer ")
    old = by_transformers(model_source, "model ")
    pair = with_all_pieces(Pair(new, old, max_pieces=max_pieces), decay)
    _ = pair.projection  # refused here, before the weights are read
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    model = cast("PreTrainedModel", load_causal_lm(model_source, side="model", dtype=wanted))
    with Bars(console).progress("rows", len(pair.student_vocab)) as update:
        counts = pair.transfer_embeddings(
            model,
            decay=None,
            pad_to_multiple_of=pad_to_multiple_of,
            progress=lambda done, total: update(done * len(pair.student_vocab) // total, ""),
        )
    _write(model, new, pair, counts, out)
    console.print(table(counts))
    for line in _remarks(pair, counts):
        console.print(escape(line), soft_wrap=True)
    console.print(
        escape(
            f"{out}: the model with its new tokenizer; finish with xtoken distill --student {out} "
            f"--teacher {model_source} --data TEXTS --out DIR"
        ),
        soft_wrap=True,
    )


def table(counts: TransferCounts) -> Table:
    """The rows by class and source."""
    shown = Table(title="new embedding rows" + (", head tied" if counts.tied else " and head rows"))
    shown.add_column("tokens")
    for title in ("number", "copied", "averaged", "without a source"):
        shown.add_column(title, justify="right")
    for label, row in counts.classes.items():
        shown.add_row(label, *_cells(row))
    shown.add_section()
    shown.add_row("all", *_cells(counts.total))
    return shown


def _cells(row: RowCounts) -> list[str]:
    return [f"{n:,}" for n in (row.tokens, row.copied, row.averaged, row.without_source)]


def _remarks(pair: Pair, counts: TransferCounts) -> list[str]:
    found = list(counts.changed_ids)
    if counts.unused or counts.padding:
        found.append(
            f"{counts.unused:,} ids without a token and {counts.padding:,} rows of padding: the "
            "mean of all rows"
        )
    if pair.teacher.has_template and not pair.student.has_template:
        found.append(
            "the new tokenizer has no chat template, the model's own had one: give it one before "
            "it is trained on conversations"
        )
    return found


def _write(
    model: PreTrainedModel, tokenizer: Any, pair: Pair, counts: TransferCounts, out: Path
) -> None:
    with folder_beside(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        content = counts.to_dict() | {
            "model_tokenizer": pair.teacher_vocab.fingerprint,
            "new_tokenizer": pair.student_vocab.fingerprint,
            "decay": pair.projection.options.decay,
            "max_pieces": pair.projection.options.max_pieces,
        }
        write_json(folder / COUNTS_FILE, content)
        # Another process may have written there since the command began.
        check_empty(out)
