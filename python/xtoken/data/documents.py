"""Lists of documents, split so that the held-out part is never trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from xtoken._checks import check_number, expect
from xtoken.data.rows import Document
from xtoken.errors import DataError, OptionError


@dataclass(frozen=True)
class TextSplit:
    """Two disjoint lists of documents, and how many were dropped to keep them disjoint."""

    train: Sequence[Document]
    held_out: Sequence[Document]
    dropped: int


@dataclass(frozen=True)
class LeftOut:
    """A row that gave no document, or no example.

    Args:
        source: file and line, or the number of the row, counted from 0.
        reason: why, in a few words.
    """

    source: str
    reason: str


class Documents(list[Document]):
    """The documents of files in their order, and the rows that gave none.

    Attributes:
        left_out: the rows that gave no document.
        teachers: of a document, the names in the column that says which teachers it is for; a
            document that several rows hold is for all that they name.
    """

    def __init__(self, documents: Iterable[Document], left_out: Iterable[LeftOut] = ()) -> None:
        super().__init__(documents)
        self.left_out = tuple(left_out)
        self.teachers: dict[Document, object] = {}

    def name_teachers(self, document: Document, value: object) -> None:
        """Keep what a row of the document says of its teachers."""
        known = self.teachers.get(document)
        if document not in self.teachers:
            self.teachers[document] = value
        elif known is None or value is None:
            self.teachers[document] = None  # one of its rows is for all
        else:
            names = [
                each
                for part in (known, value)
                for each in (list(part) if isinstance(part, list | tuple) else [part])
            ]
            self.teachers[document] = list(dict.fromkeys(names))


def cut_passages(text: str, max_chars: int) -> list[str]:
    """Cut a text at blank lines into passages of at most `max_chars` characters.

    A paragraph longer than `max_chars` is cut at line ends, a longer line stays whole: a passage
    can exceed `max_chars` only where it is a single line.
    """
    expect(text, str, "text", "pass one text")
    return list(passages(text.split("\n\n"), max_chars))


def passages(paragraphs: Iterable[str], max_chars: int) -> Iterator[str]:
    """The passages of `cut_passages`, of a text that is read a paragraph at a time."""
    rule = ", expected at least 1; pass a positive length"
    check_number("max_chars", max_chars, 1, rule=rule, whole=True)
    passage = ""
    for paragraph in paragraphs:
        whole = len(paragraph) <= max_chars
        # Not splitlines(): a form feed or U+2028 would become a line's end.
        for index, piece in enumerate([paragraph] if whole else paragraph.split("\n")):
            if not piece.strip():
                continue
            joint = "\n\n" if index == 0 else "\n"
            if passage and len(passage) + len(joint) + len(piece) <= max_chars:
                passage += joint + piece
                continue
            if passage:
                yield passage
            passage = piece
    if passage:
        yield passage


def split_held_out(texts: Sequence[Document], fraction: float) -> TextSplit:
    """Split documents by the hash of each: the same document is always on the same side.

    Args:
        texts: the documents; a repeated one counts once.
        fraction: expected share of held-out documents, between 0 and 1 exclusive.
    Raises:
        ValueError: if the fraction is not between 0 and 1.
        DataError: if a side would be empty.
    """
    rule = ", expected between 0 and 1; try 0.1"
    check_number("held-out fraction", fraction, 0, inside=True, rule=rule)
    if fraction >= 1:
        raise OptionError(f"held-out fraction = {fraction}{rule}")
    distinct = list(dict.fromkeys(texts))
    held = [text for text in distinct if unit_hash(text) < fraction]
    train = [text for text in distinct if unit_hash(text) >= fraction]
    if not held or not train:
        raise DataError(
            f"{len(distinct)} distinct documents give {len(train)} for training and {len(held)} "
            f"held out at fraction {fraction}; give more documents or another fraction"
        )
    return TextSplit(train, held, dropped=len(texts) - len(distinct))


def keep_apart(train: Iterable[Document], held_out: Iterable[Document]) -> TextSplit:
    """Drop from training each document that is also held out, and repeated ones from both."""
    train, held_out = list(train), list(held_out)
    held = dict.fromkeys(held_out)
    kept = [text for text in dict.fromkeys(train) if text not in held]
    if not kept or not held:
        raise DataError(
            f"{len(kept)} training and {len(held)} held-out documents are left once texts on both "
            "sides are dropped from training; give different files"
        )
    return TextSplit(kept, list(held), dropped=len(train) + len(held_out) - len(kept) - len(held))


def unit_hash(document: Document) -> float:
    """A number in [0, 1) that only the document decides."""
    text = document if isinstance(document, str) else document.json
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
