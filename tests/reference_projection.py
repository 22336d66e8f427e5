"""The rules of the projection W in plain Python: dictionaries, one row at a time, no speed.

Segmentation is Hugging Face's own tokenizer, called through `tokenizers`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

from xtoken import Vocab

Row = dict[int, float]
Segment = Callable[[bytes], list[int] | None]


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + n) for n, byte in enumerate(others)}


_ALPHABET = byte_alphabet()


@functools.cache
def inside_text(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that puts no space of its own, strips nothing and knows no control tokens."""
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    in_model = tokenizer.get_vocab(with_added_tokens=False)
    spec["added_tokens"] = [
        token | {"content": f"\U000f0000{i}"} if token["special"] else token
        for i, token in enumerate(spec["added_tokens"])
        if not (token["special"] and token["content"] in in_model)
    ]
    spec["normalizer"] = _without_edges(spec["normalizer"])
    spec["pre_tokenizer"] = _without_edges(spec["pre_tokenizer"])
    spec["post_processor"] = None
    return Tokenizer.from_str(json.dumps(spec))


def _without_edges(section: Any) -> Any:
    if section is None or section["type"] in ("Prepend", "Strip"):
        return None
    section = dict(section)
    for key in ("normalizers", "pretokenizers"):
        if key in section:
            section[key] = [part for part in map(_without_edges, section[key]) if part]
    if section["type"] == "ByteLevel":
        section["add_prefix_space"] = False
    if section["type"] == "Metaspace":
        section.pop("add_prefix_space", None)
        section["prepend_scheme"] = "never"
    return section


@functools.cache
def hugging_face_segment(tokenizer: Tokenizer, vocab: Vocab) -> Segment:
    """What Hugging Face's tokenizer makes of bytes inside a text, and its model of bytes that are
    no text or that the normalizer changes; `None` where the pieces do not spell them."""
    inside = inside_text(tokenizer)
    normalizer = inside.normalizer

    def as_text(token: bytes) -> list[int] | None:
        try:
            text = token.decode()
        except UnicodeDecodeError:
            return None
        if "▁" in text and vocab.family == "sentencepiece":
            return None
        changed = normalizer.normalize_str(text) if normalizer else text
        if vocab.family == "sentencepiece":
            changed = changed.replace("▁", " ")
        ids: list[int] | None = inside.encode(text).ids if changed == text else None
        return ids

    def text_pieces(surface: str) -> list[int]:
        return [piece.id for piece in tokenizer.model.tokenize(surface)]

    def segment(token: bytes) -> list[int] | None:
        if (whole := as_text(token)) is not None:
            pieces = whole
        elif vocab.family == "byte-level":
            pieces = text_pieces("".join(_ALPHABET[byte] for byte in token))
        elif vocab.family == "sentencepiece":
            pieces = _sentencepiece(token, tokenizer, text_pieces)
        else:
            raise ValueError(vocab.family)
        spelled = b"".join(map(vocab.token_bytes, pieces))
        return pieces if spelled == token else None

    return segment


def _sentencepiece(
    token: bytes, tokenizer: Tokenizer, text_pieces: Callable[[str], list[int]]
) -> list[int]:
    """Bytes that are no text have no surface: each stands alone, as its <0xNN>."""
    pieces: list[int] = []
    run = ""
    for char in token.decode("utf-8", "surrogateescape"):
        if 0xDC80 <= ord(char) <= 0xDCFF:
            if run:
                pieces += text_pieces(run.replace(" ", "▁"))
            run = ""
            byte = tokenizer.token_to_id(f"<0x{ord(char) - 0xDC00:02X}>")
            if byte is not None:
                pieces.append(byte)
        else:
            run += char
    if run:
        pieces += text_pieces(run.replace(" ", "▁"))
    return pieces


@functools.cache
def emitted_ids(vocab: Vocab, segment: Segment) -> dict[bytes, int]:
    """For each byte string that is a token, the id that the tokenizer emits for it."""
    ids: dict[bytes, list[int]] = {}
    for i, token in enumerate(map(vocab.token_bytes, range(len(vocab)))):
        if token:
            ids.setdefault(token, []).append(i)
    emitted = {}
    for token, candidates in ids.items():
        pieces = segment(token) if len(candidates) > 1 else None
        if pieces is not None and len(pieces) == 1:
            emitted[token] = pieces[0]
        else:
            plain = [i for i in candidates if not vocab.is_byte_fallback(i)]
            emitted[token] = min(plain or candidates)
    return emitted


def weights_of(pieces: list[int], decay: float, max_pieces: int) -> Row:
    """Weights in proportion to `decay ** i` over the first pieces; equal pieces add up."""
    kept = pieces[:max_pieces]
    total = math.fsum(decay**i for i in range(len(kept)))
    row: Row = {}
    for i, piece in enumerate(kept):
        row[piece] = row.get(piece, 0.0) + decay**i / total
    return row


def normalized(row: Row, top_k: int) -> list[tuple[int, float]]:
    """The heaviest entries, of equals those that came first, scaled to sum to 1."""
    kept = sorted(row.items(), key=lambda entry: -entry[1])[:top_k]
    kept = [(t, weight) for t, weight in kept if weight > 0]
    total = math.fsum(weight for _, weight in kept)
    return [(t, weight / total) for t, weight in kept]


def projection(
    student: Vocab,
    teacher: Vocab,
    student_segment: Segment,
    teacher_segment: Segment,
    *,
    top_k: int = 4,
    decay: float = 0.1,
    max_pieces: int = 4,
    reverse: bool = False,
) -> list[tuple[str, list[tuple[int, float]]]]:
    """The rule and the entries of each row with bytes; special rows are `("special", [])`."""
    exact = emitted_ids(teacher, teacher_segment)
    own = emitted_ids(student, student_segment)
    given: dict[int, Row] = {}
    if reverse:
        for t in range(len(teacher)):
            token = teacher.token_bytes(t)
            if not token or token in own:
                continue
            for s, weight in weights_of(student_segment(token) or [], decay, max_pieces).items():
                given.setdefault(s, {})[t] = weight
    rows = []
    for s in range(len(student)):
        token = student.token_bytes(s)
        if student.is_special(s):
            rows.append(("special", []))
        elif not token:
            rows.append(("unused", []))
        elif token in exact:
            rows.append(("exact" if own[token] == s else "duplicate", [(exact[token], 1.0)]))
        else:
            row = weights_of(teacher_segment(token) or [], decay, max_pieces)
            rule = "forward" if row else "reverse" if s in given else "unspellable"
            for t, weight in given.get(s, {}).items():
                row[t] = row.get(t, 0.0) + weight
            rows.append((rule, normalized(row, top_k)))
    return rows
