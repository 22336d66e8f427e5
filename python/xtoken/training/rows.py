"""Datasets as examples with each teacher, made before training begins."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets  # type: ignore[import-untyped]
import numpy as np
import torch
from transformers import TrainingArguments

from xtoken.data.columns import COLUMNS, ColumnExamples, is_tokenized
from xtoken.data.examples import BATCH, Example, ExampleSet, Made, fit_example
from xtoken.data.rows import Document, as_document, reason_of
from xtoken.distillation.items import encode_for, examples_together
from xtoken.errors import ArgumentTypeError, DataError, OptionError
from xtoken.training.batches import EXAMPLES, LEFT_OUT, Row
from xtoken.training.processes import on_first_of_node, process_count
from xtoken.training.routing import Routes
from xtoken.training.teaching import Teaching

# A warning names so many rows.
_NAMED = 3


class ExampleRows(torch.utils.data.Dataset[Row]):
    """Prepared examples as rows: `input_ids` of the student, and an example per teacher.

    The Trainer reads lengths off `input_ids` where it groups by length.
    """

    def __init__(self, examples: Sequence[tuple[Example, ...]]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Row:
        each = self._examples[index]
        return {"input_ids": each[0].student_ids, EXAMPLES: each}

    def of_first(self) -> list[Example]:
        """The examples with the first teacher."""
        return [each[0] for each in self._examples]


class _FittedRows(ExampleRows):
    """Examples of one teacher that were made before, read and cut as they are asked for.

    Which of them nothing is left of is not known before: such a row says so to the collator.
    """

    def __init__(self, examples: Sequence[Example], teaching: Teaching) -> None:
        self._made = examples
        self._aligner = teaching.first.pair.aligner
        self._max_tokens = teaching.max_tokens

    def __len__(self) -> int:
        return len(self._made)

    def _fitted(self, index: int) -> Made:
        return fit_example(self._made[index], self._aligner, self._max_tokens)

    def __getitem__(self, index: int) -> Row:
        made = self._fitted(index)
        if not made.examples:
            reason = f"{made.reasons[0]} within max_tokens = {self._max_tokens}"
            return {"input_ids": np.zeros(0, dtype=np.int64), LEFT_OUT: reason}
        return {"input_ids": made.examples[0][0].student_ids, EXAMPLES: made.examples[0]}

    def of_first(self) -> list[Example]:
        """The examples with the first teacher, of which something is left."""
        made = [self._fitted(index).examples for index in range(len(self))]
        if not any(made):
            raise DataError(
                f"none of the {len(self)} examples has a student token in the loss within "
                f"max_tokens = {self._max_tokens}; raise it"
            )
        return [example for examples in made for (example,) in examples]


def is_stream(dataset: Any) -> bool:
    """Whether rows come one after another, without a number of them or a place of each."""
    streams = torch.utils.data.IterableDataset
    return dataset is not None and (isinstance(dataset, streams) or not hasattr(dataset, "__len__"))


def prepare_rows(
    dataset: Any, teaching: Teaching, args: TrainingArguments, *, scored: bool = False
) -> Any:
    """A dataset as examples with each teacher.

    A stream is left as it is, for the collator. All else is tokenized by the first process of each
    machine. A `datasets.Dataset` for one teacher goes through its `map` and is kept as `datasets`
    keeps it; each process reads its rows from disk as they are asked for, as those of
    `Pair.tokenize`. Other rows are made in memory, and sent to the other processes. Rows that
    cannot be used are left out, with a warning. What was tokenized before, with more tokens than
    `max_tokens`, is cut as it is read.

    Args:
        dataset: texts, conversations, rows or examples.
        teaching: the teachers.
        args: of the Trainer.
        scored: whether the student is evaluated on the rows, for which no teacher is asked.

    Raises:
        DataError: no row can be used.
        ArgumentTypeError: tokenized rows, which have one teacher, for several.
        PairError: tokenized rows are of another pair.
        OptionError: no row has the column that names its teachers.
    """
    routes = Routes(teaching.routes.names, None) if scored else teaching.routes
    if isinstance(dataset, ExampleRows):
        return dataset
    if is_stream(dataset):
        routes.check_columns(dataset)
        return dataset
    if isinstance(dataset, Mapping):
        names = ", ".join(map(repr, dataset))
        raise ArgumentTypeError(
            f"a {type(dataset).__name__} of {names} was given for one dataset; pass one of them"
        )
    one_teacher = len(teaching.members) == 1
    plain = one_teacher and routes.column is None
    # What a transform makes of a row is known as it is read.
    mapped = isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"
    if mapped:
        routes.check_columns(dataset)
    if mapped and len(dataset) and plain and _is_kept(dataset):
        dataset = _tokenized(dataset, teaching, args)
    if set(COLUMNS) <= set(getattr(dataset, "column_names", None) or ()):
        dataset = ColumnExamples(dataset, teaching.first.pair.fingerprints)
    if isinstance(dataset, ColumnExamples | ExampleSet):
        if not one_teacher:
            raise ArgumentTypeError(
                "examples and rows of Pair.tokenize have one teacher; pass texts or conversations, "
                f"of which each of the {len(teaching.members)} teachers gets an example"
            )
        if isinstance(dataset, ColumnExamples) and dataset.left_out:
            named = [f"{each.source}: {each.reason}" for each in dataset.left_out[:_NAMED]]
            _warn(len(dataset.left_out), len(dataset.left_out) + len(dataset), named)
        if routes.column is not None:
            raise OptionError(
                f"teacher_column = {routes.column!r} is not read of examples and rows of "
                "Pair.tokenize, which are all for their one teacher; leave it out"
            )
        found = dataset if isinstance(dataset, ColumnExamples) else dataset.examples
        return _FittedRows(found, teaching)
    pieces = on_first_of_node(lambda: _pieces(dataset, teaching, routes))
    examples = [each for made, _ in pieces for each in made]
    unusable = [reason for _, reasons in pieces for reason in reasons]
    if not examples:
        reason = unusable[0].partition(": ")[2] if unusable else "it is empty"
        raise DataError(f"none of the {len(dataset)} rows can be used: {reason}")
    if unusable:
        _warn(len(unusable), len(dataset), unusable[:_NAMED])
    return ExampleRows(examples)


def _is_kept(dataset: Any) -> bool:
    """Whether the other processes find what one has made of a dataset by `map`."""
    kept = dataset.cache_files and datasets.is_caching_enabled()
    return process_count() == 1 or bool(kept) or set(COLUMNS) <= set(dataset.column_names)


def _pieces(
    dataset: Any, teaching: Teaching, routes: Routes
) -> Iterator[tuple[list[tuple[Example, ...]], list[str]]]:
    """Some examples with each teacher, and why rows were left out."""
    for start in range(0, len(dataset), BATCH):
        rows = [dataset[index] for index in range(start, min(start + BATCH, len(dataset)))]
        examples: list[tuple[Example, ...]] = []
        unusable: list[str] = []
        for index, made in enumerate(_made(rows, teaching, routes), start):
            examples += made.examples
            unusable += [f"row {index}: {reason}" for reason in made.reasons]
        yield examples, unusable
    if len(dataset):
        routes.check_seen(dataset[0])


def _tokenized(dataset: Any, teaching: Teaching, args: TrainingArguments) -> Any:
    """The rows of `Pair.tokenize`: made by the first process of a machine, found by the others."""
    if set(COLUMNS) <= set(dataset.column_names):
        return dataset
    pair = teaching.first.pair
    templates = (getattr(side.tokenizer, "chat_template", None) for side in pair.sides)
    options: dict[str, Any] = {"max_tokens": teaching.max_tokens}
    if any("strftime_now" in str(template) for template in templates):
        # Rows that were printed on another day are not found.
        options["date"] = datetime.date.today()
    with args.main_process_first(desc="tokenization"):
        return dataset.map(
            pair.tokenize,
            batched=True,
            batch_size=BATCH,
            num_proc=getattr(args, "dataset_num_proc", None),
            remove_columns=dataset.column_names,
            fn_kwargs=options,
            desc="Tokenizing for student and teacher",
        )


def _warn(count: int, total: int, named: Sequence[str]) -> None:
    warnings.warn(
        f"{count} of {total} rows are left out; the first, {'; '.join(named)}", stacklevel=4
    )


def _made(rows: Sequence[Any], teaching: Teaching, routes: Routes) -> list[Made]:
    """What becomes of each row."""
    made: list[Made] = []
    documents: list[Document] = []
    places: list[int] = []
    asked: list[list[bool] | None] = []
    for index, row in enumerate(rows):
        if isinstance(row, Mapping) and EXAMPLES in row:
            made.append(Made([row[EXAMPLES]], 0, []))
            continue
        made.append(Made([], 0, []))
        try:
            routed = routes.of(row, one_of_many=True)
            if isinstance(row, Example) or is_tokenized(row):
                found = examples_together([row], teaching.pairs, teaching.max_tokens)
                made[-1].examples.extend(routes.apply(found, routed))
            else:
                documents.append(as_document(row, "row", also=", or an Example"))
                places.append(index)
                asked.append(routed)
        except DataError as error:
            made[-1].reasons.append(reason_of(error, "row"))
    encoded = encode_for(documents, teaching.pairs, teaching.max_tokens, strict=False)
    for index, each, routed in zip(places, encoded, asked, strict=True):
        made[index] = each._replace(examples=routes.apply(each.examples, routed))
    return made
