"""What runs with different losses share: W, the aligned examples, the stored teacher."""

from __future__ import annotations

import contextlib
import datetime
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from xtoken.data import ExampleSet, TextSplit
from xtoken.pair import Pair
from xtoken.projection import Projection
from xtoken.teachers import LiveTeacher, StoreKey, TeacherSource, TopKStore
from xtoken.training.config import DistillConfig
from xtoken.training.config_arguments import run_device
from xtoken.training.models import ModelPair
from xtoken.training.processes import (
    join_processes,
    on_first_process,
    process_count,
    process_index,
    wait_for_all,
)


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
    """

    models: ModelPair
    pair: Pair
    train: ExampleSet
    held_out: ExampleSet

    @property
    def projection(self) -> Projection:
        """W of the pair."""
        return self.pair.projection


def prepare(
    models: ModelPair, texts: TextSplit, config: DistillConfig, reporter: Reporter | None = None
) -> PreparedData:
    """Build W, tokenize and align both parts.

    Raises: DataError if no usable example is left on a side.
    """
    reporter = reporter or Silent()
    models.check_positions(config.max_tokens)
    pair = models.pair.with_options(
        top_k=config.projection_top_k,
        decay=config.projection_decay,
        max_pieces=config.projection_max_pieces,
    )
    _ = pair.projection
    parts = []
    for title, part in (("align training texts", texts.train), ("align held-out", texts.held_out)):
        with reporter.progress(title, len(part)) as update:
            parts.append(
                pair.examples(
                    part,
                    max_tokens=config.max_tokens,
                    strict=False,
                    date=None if config.date is None else datetime.date.fromisoformat(config.date),
                    progress=functools.partial(_advance, update),
                )
            )
    return PreparedData(models, pair, *parts)


def _advance(update: Update, done: int, total: int) -> None:
    update(done, "")


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
    folder = cache_dir / f"{teacher.fingerprint[:16]}-top{top_k}"
    # The first process removes damaged files before another looks, and may write them anew.
    stored = on_first_process(lambda: len(TopKStore(folder, key)))
    store = TopKStore(folder, key)
    sequences = _shortest_first(example.teacher_ids for example in materials.train.examples)
    # Of all, not of the missing: what another process sees as missing depends on when it looks.
    part = sequences[process_index() :: process_count()]
    missing = sum(len(ids) for ids in part if ids not in store)
    with reporter.progress("teacher predictions, once", missing) as update:
        store.fill(teacher, part, progress=lambda done, _: update(done, "tokens"))
    if process_count() == 1:
        return store
    wait_for_all()
    store = TopKStore(folder, key)
    computed = len(store) - stored
    # Nothing, unless the folder is on a disk that another machine does not share.
    computed += store.fill(teacher, sequences)
    store.sequences_computed = computed
    return store


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
    """Return the teacher that each loss learns from: a store, the live model, or none for `ce`.

    The teacher is loaded only if a loss needs it, and once; where its predictions were stored
    before, not at all.

    Raises:
        StoreError: a store that was given lacks predictions of an example.
    """
    sources: dict[str, TeacherSource | None] = dict.fromkeys(losses)
    taught = [loss for loss in losses if loss != "ce"]
    if taught and materials.models.store is not None:
        store = TopKStore.open(materials.models.store)
        store.require_tokenizer(materials.pair.teacher_vocab.fingerprint)
        store.require([example.teacher_ids for example in materials.train.examples])
        sources |= dict.fromkeys(taught, store)
    elif taught:
        teacher = materials.models.load_teacher(run_device(config), config.teacher_dtype)
        source: TeacherSource = teacher
        if config.teacher_top_k is not None:
            source = open_store(materials, teacher, config.teacher_top_k, cache_dir, reporter)
        sources |= dict.fromkeys(taught, source)
    return sources
