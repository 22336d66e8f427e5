"""Texts and conversations from files, split so that the held-out part is never trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from xtoken.data.conversations import Conversation, half_character
from xtoken.errors import DataError, MissingFileError, OptionError

Document: TypeAlias = str | Conversation

TXT_PASSAGE_CHARS = 2000


@dataclass(frozen=True)
class TextSplit:
    """Two disjoint lists of documents, and how many were dropped to keep them disjoint."""

    train: Sequence[Document]
    held_out: Sequence[Document]
    dropped: int


@dataclass(frozen=True)
class LeftOut:
    """A line of a file that gave no document.

    Args:
        source: file and line.
        reason: why, in a few words.
    """

    source: str
    reason: str


class Documents(list[Document]):
    """The documents of a file in its order, and the lines that gave none."""

    def __init__(self, documents: Iterable[Document], left_out: Iterable[LeftOut] = ()) -> None:
        super().__init__(documents)
        self.left_out = tuple(left_out)


def read_documents(path: Path | str, *, field: str | None = None) -> Documents:
    """Read the texts and conversations of a file.

    Args:
        path: a `.jsonl` file, one object per line with a text or a list of messages, beside which
            may be `tools`; or a `.txt` file, which is cut at blank lines into passages of at most
            2,000 characters. Both in UTF-8; a byte order mark is dropped.
        field: the field of a `.jsonl` object that holds either; None reads a string in `text`,
            and where there is none the list in `messages`.
    Returns: the documents in file order; lines with a blank text are left out, and named in
        `left_out`.
    Raises:
        FileNotFoundError: if there is no such file.
        DataError: if the ending is another, a line is not such an object or holds half a
            character, a conversation cannot be used (see `Conversation.from_messages`), or no
            document is left.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"data file {path} does not exist; pass a .jsonl or .txt file")
    if path.suffix == ".txt":
        documents = Documents(cut_passages(_decode(path), TXT_PASSAGE_CHARS))
    elif path.suffix == ".jsonl":
        documents = _lines(_decode(path), field, path)
    else:
        raise DataError(
            f"data file {path} ends in {path.suffix or 'nothing'!r}, expected .jsonl or .txt; "
            "convert it to one JSON object with a text field per line"
        )
    if not documents:
        raise DataError(f"data file {path} holds no text; give at least one document")
    return documents


def _lines(content: str, field: str | None, path: Path) -> Documents:
    documents: list[Document] = []
    left_out = []
    # Not splitlines(): JSON allows U+2028 and U+0085 inside a string.
    for number, line in enumerate(content.split("\n"), 1):
        # Files that were joined have a mark at each beginning.
        line = line.removeprefix("\ufeff")
        if not line.strip():
            continue
        source = f"{path}:{number}"
        document = _document(line, field, source)
        if isinstance(document, str) and not document.strip():
            left_out.append(LeftOut(source, "its text is blank"))
        else:
            documents.append(document)
    return Documents(documents, left_out)


def read_texts(path: Path | str, *, text_field: str = "text") -> list[str]:
    """Read a file of texts alone, as `read_documents` does.

    Raises:
        DataError: besides what `read_documents` raises, if a line holds a conversation.
    """
    texts = []
    for document in read_documents(path, field=text_field):
        if not isinstance(document, str):
            raise DataError(
                f"{document.source} has messages in field {text_field!r}, expected a string; "
                "read the file with read_documents"
            )
        texts.append(document)
    return texts


def _decode(path: Path) -> str:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec counts from behind the byte order mark.
        start = error.start + len(content) - len(error.object)
        line = content.count(b"\n", 0, start) + 1
        raise DataError(
            f"{path}:{line} is not UTF-8 at byte {start} of the file, {content[start]:#04x}; "
            "convert the file to UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _document(line: str, field: str | None, place: str) -> Document:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON ({_reason(error)}); write one object per line") from (
            error
        )
    fields: dict[str, Any] = value if isinstance(value, dict) else {}
    if field is None:
        field = "messages" if fields.get("text") is None and "messages" in fields else "text"
        remedy = "no messages; name the field that holds the text or the messages"
    else:
        remedy = "no list of messages; name the field that holds either"
    found = fields.get(field)
    if isinstance(found, str):
        check_text(found, f"{place}: field {field!r}")
        return found
    if isinstance(found, list) or (field == "messages" and field in fields):
        return Conversation.from_messages(found, tools=fields.get("tools"), source=place)
    raise DataError(f"{place} has no string in field {field!r} and {remedy}")


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    if isinstance(error, RecursionError):
        return "lists or objects nested too deeply"
    return "a number of too many digits"


def check_text(text: str, place: str) -> None:
    """Refuse a text with half a character, which no tokenizer takes.

    Raises: DataError, which begins with the place.
    """
    fault = half_character(text)
    if fault is not None:
        raise DataError(f"{place} {fault}")


def cut_passages(text: str, max_chars: int) -> list[str]:
    """Cut a text at blank lines into passages of at most `max_chars` characters.

    A paragraph longer than `max_chars` is cut at line ends, a longer line stays whole: a passage
    can exceed `max_chars` only where it is a single line.
    """
    if max_chars < 1:
        raise OptionError(f"max_chars = {max_chars}, expected at least 1; pass a positive length")
    passages: list[str] = []
    for paragraph in text.split("\n\n"):
        whole = len(paragraph) <= max_chars
        for index, piece in enumerate([paragraph] if whole else paragraph.splitlines()):
            if not piece.strip():
                continue
            joint = "\n\n" if index == 0 else "\n"
            if passages and len(passages[-1]) + len(joint) + len(piece) <= max_chars:
                passages[-1] += joint + piece
            else:
                passages.append(piece)
    return passages


def split_held_out(texts: Sequence[Document], fraction: float) -> TextSplit:
    """Split documents by the hash of each: the same document is always on the same side.

    Args:
        texts: the documents; a repeated one counts once.
        fraction: expected share of held-out documents, between 0 and 1 exclusive.
    Raises:
        ValueError: if the fraction is not between 0 and 1.
        DataError: if a side would be empty.
    """
    if not 0.0 < fraction < 1.0:
        raise OptionError(f"held-out fraction = {fraction}, expected between 0 and 1; try 0.1")
    distinct = list(dict.fromkeys(texts))
    held = [text for text in distinct if _unit_hash(text) < fraction]
    train = [text for text in distinct if _unit_hash(text) >= fraction]
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


def _unit_hash(document: Document) -> float:
    text = document if isinstance(document, str) else document.json
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
