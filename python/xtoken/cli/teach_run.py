"""What `xtoken teach` does: read, estimate, compute what is missing, say what it came to."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xtoken._files import folder_beside, write_json, writes
from xtoken.cli.console import (
    Bars,
    check_split,
    quiet_transformers,
    read_chat_template,
    read_data,
    show_bytes,
    show_seconds,
    warn_of_left_out,
)
from xtoken.cli.plain_console import plain_console
from xtoken.cli.teach_stream import SequenceStream, fill_streamed, first_estimate
from xtoken.data.documents import LeftOut
from xtoken.data.examples import BATCH
from xtoken.data.stream import DocumentStream
from xtoken.errors import OptionError, StoreError
from xtoken.teachers import LiveTeacher, StoreKey, TopKStore
from xtoken.teachers.forward import positions_of
from xtoken.teachers.packed import StoreDtype
from xtoken.teachers.served import ApiName, ServedTeacher, fill_store, open_store
from xtoken.teachers.served.client import without_password
from xtoken.teachers.store import is_store
from xtoken.teachers.store_notes import TOKENIZER_FOLDER, StoreNotes
from xtoken.teachers.teach import (
    Estimate,
    Ids,
    SequenceReader,
    check_space,
    estimate,
    filling,
)
from xtoken.training.processes import (
    is_main_process,
    join_processes,
    on_first_of_node,
    on_first_process,
    process_count,
    process_index,
    wait_for_all,
)
from xtoken.vocab.load import by_transformers
from xtoken.vocab.side import GENERATION_CONFIG_FILE, Side

# Requests to a server under way at once.
_CONCURRENCY = 8
# Seconds that it may be silent.
_TIMEOUT = 120


@dataclass(frozen=True)
class Request:
    """The options of the command, as given."""

    data: list[str]
    out: Path
    teacher: str | None
    url: str | None
    api: str | None
    model: str | None
    concurrency: int | None
    top_k: int
    mass: float | None
    dtype: str
    max_tokens: int
    split: str
    text_field: str | None
    chat_template: Path | None
    date: str | None
    device: str
    teacher_dtype: str
    dry_run: bool
    top_k_is_default: bool = False
    streaming: bool = False
    timeout: int | None = None
    min_prob: float | None = None

    def arguments(self) -> tuple[str, ...]:
        """The command line that repeats it."""
        found = ["teach"]
        for each in fields(self):
            value = getattr(self, each.name)
            flag = "--" + each.name.replace("_", "-")
            if value is None or each.name in ("dry_run", "top_k_is_default"):
                continue
            if each.name == "top_k" and self.top_k_is_default:
                continue  # which is fewer where the teacher has no more
            if isinstance(value, bool):
                found += [flag] if value else []
                continue
            for one in value if isinstance(value, list) else [value]:
                found += [flag, self.address if each.name == "url" else str(one)]
        return tuple(found)

    @property
    def address(self) -> str:
        """Of the server, without a name and password; empty where there is none."""
        return without_password(self.url or "")


def run(request: Request) -> None:
    """Run the command.

    Raises: XTokenError or OSError with a message for the user.
    """
    quiet_transformers()
    console = plain_console(quiet=not is_main_process())
    _check(request)
    request = _dated(request)
    tokenizer: Any = by_transformers(str(request.teacher), "teacher ")
    if request.chat_template is not None:
        tokenizer.chat_template = read_chat_template("chat-template", request.chat_template)
    side = Side("teacher", tokenizer)
    join_processes(_device(request))
    texts = _texts(request, side, console)
    if request.dry_run:
        # Measured beside: another --top-k may be tried next.
        with tempfile.TemporaryDirectory() as scratch:
            source, store = _open(request, side, Path(scratch))
            with _closing(source):
                console.print(_table(request, store, _measured(request, texts, store, source)))
        console.print(f"nothing was written to {escape(str(request.out))} (--dry-run)")
        return
    with filling(request.out) if is_main_process() else contextlib.nullcontext():
        source, store = _open(request, side, request.out)
        with _closing(source):
            on_first_process(lambda: _keep_tokenizer(request, side))
            notes = _notes(request, texts)
            begun = _Beginning(request.out, store, notes)
            if isinstance(texts, SequenceStream):
                texts.watch = begun.see
            else:
                listed = texts
                on_first_process(lambda: begun.see(listed))
            found = _measured(request, texts, store, source)
            console.print(_table(request, store, found))
            check_space(store, found)
            bars = Bars(console)
            if isinstance(texts, SequenceStream):
                notes = fill_streamed(store, source, texts, notes, bars)
            else:
                fill_store(store, source, _own(texts), bars)
            wait_for_all()
        held = on_first_process(lambda: _finish(request, texts, notes, store))
        _show_store(console, request.out, held, notes.sequences)


def _texts(request: Request, side: Side, console: Console) -> list[Ids] | SequenceStream:
    """What the teacher reads, as a list or as it comes."""
    options: dict[str, Any] = {
        "max_tokens": request.max_tokens,
        "vocab": side.vocab,
        "date": _day(request.date),
        "generation_config": side.generation_config,
    }
    tokenizer = cast(Any, side.tokenizer)
    if request.streaming:
        source = DocumentStream(request.data, field=request.text_field, split=request.split)
        return SequenceStream(source, SequenceReader(tokenizer, **options))

    def read() -> Iterator[tuple[list[Ids], list[LeftOut], int]]:
        """What was left out and of how many, and then the sequences."""
        documents = read_data(request.data, request.text_field, request.split, console)
        sequences, left_out = SequenceReader(tokenizer, **options).read_all(documents)
        yield [], left_out, len(documents)
        for start in range(0, len(sequences), BATCH):
            yield sequences[start : start + BATCH], [], 0

    (_, left_out, count), *parts = on_first_of_node(read)
    warn_of_left_out(console, left_out, count, "texts")
    return [ids for sequences, _, _ in parts for ids in sequences]


def _own(sequences: Sequence[Ids]) -> Sequence[Ids]:
    """Those of this process: of all, not of the missing, which another may see otherwise."""
    return sequences[process_index() :: process_count()]


def _measured(
    request: Request,
    texts: list[Ids] | SequenceStream,
    store: TopKStore,
    source: LiveTeacher | ServedTeacher,
) -> Estimate:
    """Size and time of what is left for all processes, which work at the same rate."""
    if isinstance(texts, SequenceStream):
        return first_estimate(store, source, texts)
    missing = _missing(request.out, texts) if request.dry_run else texts
    found = estimate(store, source, _own(missing))
    if process_count() == 1:
        return found
    return replace(
        found,
        sequences=len(texts),
        tokens=sum(map(len, texts)),
        tokens_left=found.tokens_left * process_count(),
        tokens_per_second=found.tokens_per_second * process_count(),
    )


def _finish(
    request: Request, texts: list[Ids] | SequenceStream, notes: StoreNotes, store: TopKStore
) -> int:
    """Say that the store is complete, once what other processes wrote is seen here.

    Returns: the number of sequences that lie there.
    """
    if process_count() > 1:
        store = TopKStore(request.out, store.key)
        # The first rows of a stream were divided among all processes too.
        seen = texts.first() if isinstance(texts, SequenceStream) else texts
        missing = sum(ids not in store for ids in seen)
        if missing:
            raise StoreError(
                f"{missing:,} of {len(seen):,} texts were stored where this process cannot see "
                f"them; pass an --out that all machines share, or copy the files of all into "
                f"{request.out} and repeat the command"
            )
    replace(notes, complete=True).save(request.out)
    return len(store)


class _Beginning:
    """Writes that a store is not complete, once something is to be computed for it.

    Args:
        folder, store: of it.
        notes: of this command.
    """

    def __init__(self, folder: Path, store: TopKStore, notes: StoreNotes) -> None:
        self._folder = folder
        self._store = store
        self._notes = notes
        known = StoreNotes.of(folder)
        # A run that finds nothing to do leaves a complete store as it was, however it ends.
        self._whole = known is not None and known.complete
        self._written = not is_main_process()

    def see(self, sequences: Sequence[Ids]) -> None:
        """With what is asked for next."""
        if self._written or (self._whole and all(ids in self._store for ids in sequences)):
            return
        self._notes.save(self._folder)
        self._written = True


@contextlib.contextmanager
def _closing(source: LiveTeacher | ServedTeacher) -> Iterator[None]:
    """Leave no connection open."""
    try:
        yield
    finally:
        if isinstance(source, ServedTeacher):
            source.close()


def _missing(folder: Path, sequences: Sequence[Ids]) -> list[Ids]:
    if not is_store(folder):
        return list(sequences)
    store = TopKStore.open(folder)
    return [ids for ids in sequences if ids not in store]


def _check(request: Request) -> None:
    if request.teacher is None:
        what = (
            "--url needs --teacher too, a directory with its tokenizer"
            if request.url
            else ("--teacher is missing: a directory by save_pretrained, or a hub name")
        )
        raise OptionError(f"{what}; pass it")
    # Notes of earlier versions name the defaults, too, whatever the teacher was.
    of_server: list[tuple[str, object, object]] = [
        ("api", "auto", request.api),
        ("model", None, request.model),
        ("concurrency", _CONCURRENCY, request.concurrency),
        ("timeout", None, request.timeout),
    ]
    for name, default, value in of_server:
        if request.url is None and value not in (None, default):
            raise OptionError(
                f"--{name} {value} is for a served teacher; pass --url too, or leave it out"
            )
    if request.max_tokens < 2:
        raise OptionError(f"--max-tokens {request.max_tokens}, expected at least 2")
    if request.device not in ("auto", "cpu", "cuda"):
        raise OptionError(f"--device {request.device}, expected auto, cpu or cuda")
    if request.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device cuda, but torch finds no CUDA device; use auto or cpu")
    if request.teacher_dtype not in ("auto", "float32", "bfloat16"):
        raise OptionError(
            f"--teacher-dtype {request.teacher_dtype}, expected auto, float32 or bfloat16"
        )
    if process_count() > 1 and request.url is not None:
        raise OptionError(
            f"--url in {process_count()} processes, each of which would ask for the same; run one, "
            "with a larger --concurrency"
        )
    if process_count() > 1 and request.dry_run:
        raise OptionError(
            f"--dry-run in {process_count()} processes; run it in one, whose rate it tells"
        )
    _day(request.date)
    check_split(request.split, request.data)
    StoreKey("", request.top_k, request.dtype, mass=request.mass, min_prob=request.min_prob)
    if request.url is not None and request.dtype == "spread":
        raise OptionError(
            "--dtype spread needs the teacher's full logits, of which a server gives the likeliest "
            "columns; pass uint8, float16 or float32"
        )


def _day(text: str | None) -> datetime.date | None:
    try:
        return None if text is None else datetime.date.fromisoformat(text)
    except ValueError as error:
        raise OptionError(f"--date {text}, expected a day as YYYY-MM-DD") from error


def _dated(request: Request) -> Request:
    """The day that chat templates print: that of the store that is finished, or today."""
    notes = StoreNotes.of(request.out)
    if request.date is not None:
        return request
    date = notes.date if notes is not None else datetime.date.today().isoformat()
    return replace(request, date=date)


def _device(request: Request) -> torch.device:
    """Where the teacher runs: under torchrun, the device of this process."""
    if request.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _open(
    request: Request, side: Side, folder: Path
) -> tuple[LiveTeacher | ServedTeacher, TopKStore]:
    if request.url is not None:
        served = ServedTeacher(
            request.url,
            vocab=side.vocab,
            top_k=request.top_k,
            api=cast(ApiName, request.api or "auto"),
            model=request.model,
            concurrency=_CONCURRENCY if request.concurrency is None else request.concurrency,
            timeout=_TIMEOUT if request.timeout is None else request.timeout,
        )
        dtype = cast(StoreDtype, request.dtype)
        try:
            return served, open_store(folder, served, dtype, request.mass)
        except BaseException:
            served.close()
            raise
    weights = request.teacher_dtype
    teacher = LiveTeacher.from_pretrained(
        str(request.teacher),
        device=_device(request),
        dtype=cast(Any, weights if weights == "auto" else getattr(torch, weights)),
    )
    limit = positions_of(teacher.model)
    if limit is not None and request.max_tokens > limit:
        raise OptionError(
            f"--max-tokens {request.max_tokens}, but the teacher {request.teacher} has {limit} "
            f"positions; pass {limit} or less"
        )
    top_k = request.top_k
    if request.top_k_is_default and request.dtype != "spread":  # which keeps those that there are
        head = cast(Any, teacher.model).get_output_embeddings()
        top_k = min(top_k, top_k if head is None else head.weight.shape[0])
    key = StoreKey(
        teacher.fingerprint, top_k, request.dtype, side.vocab.fingerprint, request.mass,
        request.min_prob,
    )  # fmt: skip
    return teacher, TopKStore(folder, key)


def _keep_tokenizer(request: Request, side: Side) -> None:
    """Write the tokenizer that a store is of, where it differs from what lies there."""
    folder = request.out / TOKENIZER_FOLDER
    tokenizer, generation = cast(Any, side.tokenizer), side.generation_config
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        with writes(made):
            tokenizer.save_pretrained(made)
            if generation is not None:
                write_json(made / GENERATION_CONFIG_FILE, generation)
        again = Side("teacher", by_transformers(scratch, "teacher "))
        if again.vocab.fingerprint != side.vocab.fingerprint:
            raise StoreError(
                f"the tokenizer of {request.teacher} reads as {again.vocab.fingerprint[:12]} once "
                f"it is saved, and as {side.vocab.fingerprint[:12]} before; save it with "
                "save_pretrained first, and pass that directory"
            )
        if _files(made) != _files(folder):
            with folder_beside(folder) as kept:
                shutil.copytree(made, kept, dirs_exist_ok=True)


def _files(folder: Path) -> dict[Path, bytes]:
    """The content of all files of a folder, by their paths in it."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*")
            if path.is_file()}  # fmt: skip


def _notes(request: Request, texts: Sequence[Ids] | SequenceStream) -> StoreNotes:
    """How the store is made."""
    sequences = () if isinstance(texts, SequenceStream) else texts
    return StoreNotes(
        teacher=request.address or str(request.teacher),
        date=cast(str, request.date),
        max_tokens=request.max_tokens,
        sequences=len(sequences),
        tokens=sum(map(len, sequences)),
        complete=False,
        arguments=request.arguments(),
    )


def _table(request: Request, store: TopKStore, found: Estimate) -> Table:
    title = escape(f"teacher predictions of {', '.join(request.data)}")
    table = Table(title=title, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    key = store.key
    kept = (
        f"top {key.top_k}" if key.mass is None else f"{key.mass:.4g} of mass, {key.top_k} at most"
    )
    if key.min_prob is not None:
        kept = f"probability {key.min_prob:g} or more, {key.top_k} at most"
    where = request.address or _device(request).type
    where += f", {process_count()} processes" if process_count() > 1 else ""
    about = "about " if request.streaming else ""
    rows = [
        ("texts", f"{about}{found.sequences:,}"),
        ("teacher tokens", f"{about}{found.tokens:,}"),
        ("kept of each", f"{kept}, {key.dtype}"),
        ("still to compute", f"{about}{found.tokens_left:,} tokens"),
    ]
    if not math.isnan(found.bytes_per_token):
        free = shutil.disk_usage(store.directory).free
        rows += [
            ("measured", f"{found.bytes_per_token:,.0f} bytes per token"),
            (f"on {where}", f"{found.tokens_per_second:,.0f} tokens per second"),
            ("size of the rest", f"{show_bytes(found.bytes_left)} of {show_bytes(free)} free"),
            ("time for the rest", show_seconds(found.seconds_left)),
        ]
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _show_store(console: Console, folder: Path, held: int, sequences: int) -> None:
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    own = "" if held == sequences else f" with the {sequences:,} of this data"
    console.print(
        f"{held:,} texts in [bold]{escape(str(folder))}[/]{own}, {show_bytes(size)}; next: xtoken "
        f"distill --teacher-store {escape(shlex.quote(str(folder)))} --student DIR --data FILE "
        "--out DIR",
        soft_wrap=True,
    )
