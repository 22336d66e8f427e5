"""What runs with different losses share: W, the aligned examples, the stored teacher."""

from __future__ import annotations

import contextlib
import datetime
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from xtoken.data import Document, ExampleSet, TextSplit
from xtoken.data.documents import LeftOut
from xtoken.data.examples import BATCH, Example, encode_together
from xtoken.data.loss_mask import is_predicted
from xtoken.errors import OptionError
from xtoken.pair import Pair
from xtoken.projection import Projection
from xtoken.teachers import LiveTeacher, StoreKey, TeacherSource, TopKStore
from xtoken.teachers.served import PrefetchedTeacher
from xtoken.training.config import DistillConfig
from xtoken.training.config_arguments import run_device
from xtoken.training.models import ModelPair
from xtoken.training.processes import (
    join_processes,
    on_first_of_node,
    on_first_process,
    process_count,
    process_index,
    wait_for_all,
)
from xtoken.training.routing import Routes
from xtoken.training.rows import ExampleRows
from xtoken.training.stream import TrainingStream


class Reporter(Protocol):
    """Told what a run is doing."""

    def progress(self, title: str, total: int) -> contextlib.AbstractContextManager[Update]:
        """Open a bar; the context gives a function that takes the amount done and a remark."""


Update = Callable[[int, str], None]


class Silent:
    """A reporter that tells nobody."""

    @contextlib.contextmanager
    def progress(self, title: str, total: int) -> Iterator[Update]:
        """Give a function that does nothing."""
        yield lambda done, remark: None


@dataclass(frozen=True)
class PreparedData:
    """What runs with different losses share.

    Attributes:
        models: where student and teacher are.
        pair: their tokenizers, with W as the settings build it.
        train, held_out: the examples of both parts.
        others: the same of further teachers: of as many examples, with the same student tokens.
        stream: what is trained on where `train` is but a sample of it.
    """

    models: ModelPair
    pair: Pair
    train: ExampleSet
    held_out: ExampleSet
    others: tuple[PreparedData, ...] = ()
    stream: TrainingStream | None = None

    @property
    def teachers(self) -> tuple[PreparedData, ...]:
        """What belongs to each teacher, the first included."""
        return (self, *self.others)

    def rows(self, part: Literal["train", "held_out"]) -> ExampleRows:
        """A part as a trainer takes it, an example per teacher in each row."""
        sets: list[ExampleSet] = [getattr(each, part) for each in self.teachers]
        return ExampleRows(list(zip(*(each.examples for each in sets), strict=True)))

    @property
    def projection(self) -> Projection:
        """W of the pair."""
        return self.pair.projection


def prepare(
    models: ModelPair | Sequence[ModelPair],
    texts: TextSplit,
    config: DistillConfig,
    reporter: Reporter | None = None,
    *,
    routes: Mapping[Document, object] | None = None,
) -> PreparedData:
    """Build W, tokenize and align both parts.

    Args:
        models: the student with its teacher, or with each of several: texts are cut where it suits
            all of them.
        texts: tokenized by the first process of each machine, which sends the others what it made.
        routes: of a document, the name of the teacher that it is for, or a list of names; one that
            is not there is for all.

    Raises: DataError if no usable example is left on a side, or a name is unknown.
    """
    reporter = reporter or Silent()
    several = [models] if isinstance(models, ModelPair) else list(models)
    pairs = []
    for each in several:
        each.check_positions(config.max_tokens)
        pairs.append(
            each.pair.with_options(
                top_k=config.projection_top_k,
                decay=config.projection_decay,
                max_pieces=config.projection_max_pieces,
            )
        )
        _ = pairs[-1].projection
    names = Routes([each.teacher_name for each in several], None if routes is None else "teacher")
    parts: list[tuple[ExampleSet, ...]] = []
    join_processes(run_device(config))
    for title, part in (("align training texts", texts.train), ("align held-out", texts.held_out)):
        with reporter.progress(title, len(part)) as update:
            parts.append(_examples(part, pairs, config, names, routes or {}, update))
    made = [PreparedData(*each) for each in zip(several, pairs, *parts, strict=True)]
    return replace(made[0], others=tuple(made[1:]))


def _examples(
    documents: Sequence[Document],
    pairs: Sequence[Pair],
    config: DistillConfig,
    names: Routes,
    routes: Mapping[Document, object],
    update: Update,
) -> tuple[ExampleSet, ...]:
    """The examples of each teacher."""
    made = on_first_of_node(lambda: _pieces(documents, pairs, config, names, routes, update))
    return tuple(
        ExampleSet(
            [entry[at] for entries, _, _ in made for entry in entries],
            cut=sum(cut for _, cut, _ in made),
            left_out=tuple(one for _, _, left_out in made for one in left_out),
        )
        for at in range(len(pairs))
    )


def _pieces(
    documents: Sequence[Document],
    pairs: Sequence[Pair],
    config: DistillConfig,
    names: Routes,
    routes: Mapping[Document, object],
    update: Update,
) -> Iterator[tuple[list[tuple[Example, ...]], int, tuple[LeftOut, ...]]]:
    """Some entries of an example per teacher, how many were cut, and what was left out."""
    date = None if config.date is None else datetime.date.fromisoformat(config.date)
    encoders = [pair.encoders(date) for pair in pairs]
    groups: dict[tuple[bool, ...], list[Document]] = {}
    for document in documents:
        asked = names.named(routes.get(document)) or [True] * len(pairs)
        groups.setdefault(tuple(asked), []).append(document)
    done = 0
    for named, group in groups.items():
        sets = encode_together(
            group,
            encoders[0][0],
            [teacher for _, teacher in encoders],
            [pair.aligner for pair in pairs],
            max_tokens=config.max_tokens,
            progress=functools.partial(_advance, update, done),
        )
        done += len(group)
        entries = names.apply(list(zip(*(each.examples for each in sets), strict=True)), named)
        yield [], sets[0].cut, sets[0].left_out
        for start in range(0, len(entries), BATCH):
            yield entries[start : start + BATCH], 0, ()


def _advance(update: Update, before: int, done: int, total: int) -> None:
    update(before + done, "")


def open_store(
    materials: PreparedData,
    teacher: LiveTeacher,
    top_k: int,
    cache_dir: Path,
    reporter: Reporter | None = None,
) -> TopKStore:
    """Open this teacher's store below `cache_dir`, and compute what it lacks of the examples.

    Under torchrun every process calls this, computes its part, and waits for the others.
    """
    reporter = reporter or Silent()
    join_processes(teacher.device)
    key = StoreKey(teacher.fingerprint, top_k, "float32", materials.pair.teacher_vocab.fingerprint)
    folder = store_folder(cache_dir, key)
    # The first process removes damaged files before another looks, and may write them anew.
    stored = on_first_process(lambda: len(TopKStore(folder, key, required=False)))
    store = TopKStore(folder, key, required=False)
    sequences = _shortest_first(taught_sequences(materials))
    # Of all, not of the missing: what another process sees as missing depends on when it looks.
    part = sequences[process_index() :: process_count()]
    missing = sum(len(ids) for ids in part if ids not in store)
    with reporter.progress("teacher predictions, once", missing) as update:
        store.fill(teacher, part, progress=lambda done, _: update(done, "tokens"))
    if process_count() == 1:
        return store
    wait_for_all()
    store = TopKStore(folder, key, required=False)
    computed = len(store) - stored
    # Nothing, unless the folder is on a disk that another machine does not share.
    computed += store.fill(teacher, sequences)
    store.sequences_computed = computed
    return store


def store_folder(cache_dir: Path, key: StoreKey) -> Path:
    """Where a run keeps a teacher's predictions: of its weights, and of its tokenizer's ids."""
    return cache_dir / f"{key.teacher[:16]}-{key.tokenizer[:8]}-top{key.top_k}"


def taught_sequences(materials: PreparedData) -> list[NDArray[np.int64]]:
    """What the teacher is asked for: not what is for another one alone."""
    return [
        example.teacher_ids
        for example in materials.train.examples
        if is_predicted(example.teacher_loss_mask)
    ]


def _shortest_first(sequences: Iterable[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    distinct = {ids.tobytes(): ids for ids in sequences}
    return [distinct[content] for content in sorted(distinct, key=lambda it: (len(it), it))]


def open_teachers(
    materials: PreparedData,
    config: DistillConfig,
    losses: Sequence[str],
    cache_dir: Path,
    reporter: Reporter | None = None,
) -> dict[str, TeacherSource | None]:
    """Return the teacher that each loss learns from: a store, the live model, a served one, or none
    for `ce`.

    The teacher is loaded only if a loss needs it, and once; where its predictions were stored
    before, not at all.

    Raises:
        StoreError: a store that was given lacks predictions of an example.
        ServerError: a server cannot be reached, or serves something else.
    """
    sources: dict[str, TeacherSource | None] = dict.fromkeys(losses)
    taught = [loss for loss in losses if loss != "ce"]
    if taught and materials.models.store is not None:
        store = TopKStore.open(materials.models.store)
        store.require_tokenizer(materials.pair.teacher_vocab.fingerprint)
        store.require(taught_sequences(materials))
        sources |= dict.fromkeys(taught, store)
    elif taught and materials.models.served is not None:
        if config.teacher_top_k is None:
            raise OptionError(
                "teacher_top_k is None, but a server gives the likeliest columns alone; set it"
            )
        join_processes(run_device(config))
        served = materials.models.served_teacher(config.teacher_top_k, cache_dir)
        sources |= dict.fromkeys(taught, served)
    elif taught:
        teacher = materials.models.load_teacher(run_device(config), config.teacher_dtype)
        source: TeacherSource = teacher
        if config.teacher_top_k is not None:
            source = open_store(materials, teacher, config.teacher_top_k, cache_dir, reporter)
        sources |= dict.fromkeys(taught, source)
    return sources


@contextlib.contextmanager
def closing_teachers(sources: Iterable[TeacherSource | None]) -> Iterator[None]:
    """Close the connections of served teachers at the end of the block."""
    try:
        yield
    finally:
        for source in sources:
            if isinstance(source, PrefetchedTeacher):
                source.close()
                source.source.close()
