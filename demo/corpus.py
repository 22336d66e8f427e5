"""The corpus: prose and number-rich text, whole documents held out, then cut into passages."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from demo.document import Document
from demo.numerals import number_documents
from demo.prose import prose_documents
from xtoken.data.documents import cut_passages, split_held_out

MIN_PASSAGE_CHARS = 200
HELD_OUT_FRACTION = 0.1


@dataclass(frozen=True)
class Corpus:
    """Passages to train on and passages held out; no document has passages in both."""

    train: list[Document]
    held_out: list[Document]


def build_corpus(*, seed: int, max_chars: int = 900) -> Corpus:
    """Collect documents, hold a tenth of each kind out by the hash of the text, cut passages."""
    train: list[Document] = []
    held_out: list[Document] = []
    for documents in (prose_documents(), number_documents(seed)):
        split = split_held_out([document.text for document in documents], HELD_OUT_FRACTION)
        held_texts = set(split.held_out)
        for document in documents:
            side = held_out if document.text in held_texts else train
            side += _passages(document, max_chars)
    return Corpus(train, held_out)


def _passages(document: Document, max_chars: int) -> list[Document]:
    return [
        Document(text, document.source, document.kind)
        for text in cut_passages(document.text, max_chars)
        if len(text) >= MIN_PASSAGE_CHARS
    ]


def sample(documents: list[Document], count: int, number_share: float, seed: int) -> list[Document]:
    """Draw `count` passages without replacement, `number_share` of them number-rich; seeded."""
    rng = random.Random(seed)
    numbers = [document for document in documents if document.kind == "numbers"]
    prose = [document for document in documents if document.kind == "prose"]
    wanted = min(round(count * number_share), len(numbers))
    drawn = rng.sample(numbers, wanted) + rng.sample(prose, min(count - wanted, len(prose)))
    rng.shuffle(drawn)
    return drawn


def write_jsonl(documents: Iterable[Document], path: Path) -> None:
    """Write one JSON object a line, with the fields `text`, `source` and `kind`."""
    lines = [json.dumps(asdict(document), ensure_ascii=False) for document in documents]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
