"""From what a user passes to examples: texts, conversations, rows of a dataset."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from xtoken.data.columns import example_from_columns, is_tokenized
from xtoken.data.examples import Example, Made, encode_documents, fit_example
from xtoken.data.rows import Document, Readable, as_document
from xtoken.errors import ArgumentTypeError, DataError
from xtoken.pair import Pair

Item = Readable | Example
"""What `collate` takes: a text, a completion or a conversation (also as a row or a list of
messages), an example, or a row of `Pair.tokenize`."""


def examples_together(
    items: Sequence[Item],
    pairs: Sequence[Pair],
    max_tokens: int | None,
    *,
    date: datetime.date | None = None,
) -> list[tuple[Example, ...]]:
    """The examples of items with each teacher, cut where it suits all; see `encode_together`.

    Args:
        pairs: of one student.
        max_tokens: longest example on any side.
        date: the day that chat templates print; None for today.

    Raises:
        DataError: an item cannot be used; the message says why.
        ArgumentTypeError: an item is none, or an example, which has one teacher, for several.
    """
    if not isinstance(items, Sequence) or isinstance(items, str | bytes):
        raise ArgumentTypeError(
            f"items is a {type(items).__name__}; pass a list of texts, conversations or examples"
        )
    items = [
        example_from_columns(item, pairs[0].fingerprints) if is_tokenized(item) else item
        for item in items
    ]
    if len(pairs) > 1 and any(isinstance(item, Example) for item in items):
        raise ArgumentTypeError(
            "an Example, or a row of Pair.tokenize, has one teacher; pass texts or conversations, "
            f"of which each of the {len(pairs)} teachers gets an example"
        )
    documents = [
        as_document(item, f"items[{index}]", also=", or an Example")
        for index, item in enumerate(items)
        if not isinstance(item, Example)
    ]
    found = iter(encode_for(documents, pairs, max_tokens, date=date))
    examples: list[tuple[Example, ...]] = []
    for item in items:
        if isinstance(item, Example):
            made = fit_example(item, pairs[0].aligner, max_tokens)
        else:
            made = next(found)
        examples += examples_of(made, max_tokens)
    return examples


def examples_of(made: Made, max_tokens: int | None) -> list[tuple[Example, ...]]:
    """The examples of a document.

    Raises:
        DataError: there is none.
    """
    if not made.examples:
        raise DataError(
            f"none of {len(made.reasons)} examples has a student token in the loss within "
            f"max_tokens = {max_tokens}; give longer texts or raise max_tokens"
        )
    return made.examples


def encode_for(
    documents: Sequence[Document],
    pairs: Sequence[Pair],
    max_tokens: int | None,
    *,
    strict: bool = True,
    date: datetime.date | None = None,
) -> list[Made]:
    """What becomes of each document with the teacher of each pair; see `encode_documents`."""
    if not documents:
        return []
    encoders = [pair.encoders(date) for pair in pairs]
    return encode_documents(
        documents,
        encoders[0][0],
        [teacher for _, teacher in encoders],
        [pair.aligner for pair in pairs],
        max_tokens=max_tokens,
        strict=strict,
    )
