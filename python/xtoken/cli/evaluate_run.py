"""What `xtoken eval` does: score texts here, and tasks with `lm-eval`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.markup import escape
from rich.table import Table
from torch import nn

from xtoken._extras import installed
from xtoken._files import write_json
from xtoken.cli.console import check_split, quiet_transformers, read_data, warn_of_left_out
from xtoken.cli.plain_console import plain_console
from xtoken.data.encode import Encoder
from xtoken.data.examples import NO_TOKEN, encode_examples
from xtoken.errors import DataError, MissingExtraError, OptionError
from xtoken.pair import Pair
from xtoken.teachers.forward import positions_of
from xtoken.teachers.load_model import load_causal_lm
from xtoken.training.evaluate import HeldOutEvaluator, HeldOutScore
from xtoken.vocab.load import by_transformers


@dataclass(frozen=True)
class Request:
    """The options of the command, as given."""

    model: str
    data: list[str]
    tasks: list[str]
    split: str
    text_field: str | None
    max_tokens: int
    batch_size: int
    shots: int | None
    limit: int | None
    device: str
    dtype: str
    out: Path | None


def run(request: Request) -> None:
    """Run the command.

    Raises: XTokenError or OSError with a message for the user.
    """
    quiet_transformers()
    console = plain_console()
    device = _check(request)
    check_split(request.split, request.data)
    dtype = request.dtype if request.dtype == "auto" else getattr(torch, request.dtype)
    # Texts first: what cannot be read is told before a model is loaded.
    documents = (
        read_data(request.data, request.text_field, request.split, console) if request.data else []
    )
    tokenizer = cast(Any, by_transformers(request.model, "model "))
    model = load_causal_lm(request.model, side="model", dtype=dtype).to(device)
    found: dict[str, object] = {"model": request.model}
    if documents:
        limit = positions_of(model)
        if limit is not None and request.max_tokens > limit:
            raise OptionError(
                f"--max-tokens {request.max_tokens}, but the model {request.model} has {limit} "
                f"positions; pass {limit} or less"
            )
        # One side twice: the examples are those of any run with this student.
        pair = Pair(tokenizer, tokenizer, cache_dir=False)
        side = pair.sides[0]
        encoder = Encoder(
            tokenizer,
            "model",
            vocab=pair.student_vocab,
            generation_config=side.generation_config,
        )
        examples = encode_examples(
            documents,
            (encoder, encoder),
            pair.aligner,
            max_tokens=request.max_tokens,
            strict=False,
        )
        left_out = [
            replace(each, reason="no token to score") if each.reason == NO_TOKEN else each
            for each in examples.left_out
        ]
        warn_of_left_out(console, left_out, len(examples) + len(left_out), "texts")
        if examples.cut:
            console.print(
                f"{examples.cut:,} of {len(examples):,} texts are cut at {request.max_tokens} "
                "tokens"
            )
        evaluator = HeldOutEvaluator(
            examples.examples, pair.student_vocab, batch_size=request.batch_size
        )
        score = evaluator.score(model)
        found["texts"] = score.metrics()
        console.print(_score_table(request.model, score))
        console.print(_class_table(score, evaluator.class_bytes))
    if request.tasks:
        results = _tasks(request, model, tokenizer)
        found["tasks"] = results
        console.print(_task_table(results))
    if request.out is not None:
        write_json(request.out, found)
        console.print(f"scores are in [bold]{escape(str(request.out))}[/]")


def _check(request: Request) -> torch.device:
    for name, value in (("shots", request.shots), ("limit", request.limit)):
        if value is not None and not request.tasks:
            raise OptionError(
                f"--{name} {value} without --tasks, of which it is; pass --tasks too, or leave it "
                "out"
            )
    if request.tasks and not installed("lm_eval"):
        raise MissingExtraError(
            "--tasks needs lm-eval, which is not installed; run pip install lm-eval, or pass "
            "--data for bits per byte, which needs nothing more"
        )
    for name, value in (("max-tokens", request.max_tokens - 1), ("batch-size", request.batch_size)):
        if value < 1:
            least = 2 if name == "max-tokens" else 1
            raise OptionError(f"--{name} {value + least - 1}, expected at least {least}")
    if request.device not in ("auto", "cpu", "cuda"):
        raise OptionError(f"--device {request.device}, expected auto, cpu or cuda")
    if request.dtype not in ("auto", "float32", "bfloat16"):
        raise OptionError(f"--dtype {request.dtype}, expected auto, float32 or bfloat16")
    if request.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device cuda, but torch finds no CUDA device; use auto or cpu")
    cuda = request.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def _score_table(model: str, score: HeldOutScore) -> Table:
    table = Table(title=f"{escape(model)} on {score.bytes:,} bytes, {score.tokens:,} tokens")
    for title in ("bits per byte", "nats per token", "numeral NLL (nats)"):
        table.add_column(title, justify="right")
    nats = score.bits_per_byte * math.log(2) * score.bytes / max(score.tokens, 1)
    shown = ["none" if math.isnan(x) else f"{x:.4f}" for x in (nats, score.numeral_nll)]
    table.add_row(f"{score.bits_per_byte:.4f}", *shown)
    return table


def _class_table(score: HeldOutScore, class_bytes: Mapping[str, int]) -> Table:
    table = Table(title="by class of the tokens")
    table.add_column("class")
    for title in ("bits per byte", "share of bytes", "bytes"):
        table.add_column(title, justify="right")
    for name, size in class_bytes.items():
        bits = score.class_bits_per_byte[name]
        table.add_row(name, f"{bits:.4f}", f"{size / score.bytes:.1%}", f"{size:,}")
    return table


def _tasks(request: Request, model: nn.Module, tokenizer: object) -> dict[str, dict[str, float]]:
    # No extra of ours brings it, and it has no types.
    lm_eval: Any = importlib.import_module("lm_eval")
    wrappers: Any = importlib.import_module("lm_eval.models.huggingface")
    tasks: Any = importlib.import_module("lm_eval.tasks")
    wrapped = wrappers.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=request.batch_size)
    files = [Path(name) for name in request.tasks if name.endswith((".yaml", ".yml"))]
    try:
        found: Any = lm_eval.simple_evaluate(
            model=wrapped,
            # Of a file the folder is read, and the file's stem is the task's name.
            tasks=[Path(name).stem if Path(name) in files else name for name in request.tasks],
            task_manager=tasks.TaskManager(
                include_path=[str(path.parent) for path in files] or None
            ),
            num_fewshot=request.shots,
            limit=request.limit,
            log_samples=False,
            bootstrap_iters=0,
        )
    # It raises many kinds: unknown tasks, data that cannot be fetched, errors of `datasets`.
    except Exception as error:
        raise DataError(
            f"lm-eval cannot run {', '.join(request.tasks)} "
            f"({' '.join(str(error).split())[:300] or type(error).__name__}); check the names with "
            "lm-eval --tasks list, and the network"
        ) from error
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in scores.items()
            if isinstance(value, int | float)
        }
        for task, scores in found["results"].items()
    }


def _task_table(results: dict[str, dict[str, float]]) -> Table:
    table = Table(title="tasks of lm-eval")
    table.add_column("task")
    table.add_column("metric")
    table.add_column("score", justify="right")
    for task, scores in results.items():
        for name, value in scores.items():
            table.add_row(escape(task), escape(name), f"{value:.4f}")
    return table
