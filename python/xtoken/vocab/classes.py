"""Which class of text a token belongs to: numerals, punctuation, white space, letters by script."""

from __future__ import annotations

import string
from bisect import bisect_right
from collections.abc import Iterator

from xtoken._core import Vocab

# In the order in which reports list them.
NUMERALS = ("one-digit numerals", "two-digit numerals", "three-digit numerals")
LONG_NUMERALS = "longer numerals"
PUNCTUATION = "ASCII punctuation"
CODE = "code symbols"
NEWLINES = "newline runs"
SPACES = "space and tab runs"
NOT_TEXT = "bytes that are no text alone"
MIXED = "mixed and other text"
SPECIAL = "special tokens"

# First code point of a block of letters, and its script; coarse, as a reader of a report needs it.
_SCRIPTS = (
    (0x0041, "Latin"), (0x0250, "other script"), (0x0370, "Greek"), (0x0400, "Cyrillic"),
    (0x0530, "Armenian"), (0x0590, "Hebrew"), (0x0600, "Arabic"), (0x0700, "other script"),
    (0x0750, "Arabic"), (0x0780, "other script"), (0x08A0, "Arabic"), (0x0900, "Devanagari"),
    (0x0980, "Bengali"), (0x0A00, "other script"), (0x0B80, "Tamil"), (0x0C00, "other script"),
    (0x0E00, "Thai"), (0x0E80, "other script"), (0x10A0, "Georgian"), (0x1100, "Hangul"),
    (0x1200, "other script"), (0x1E00, "Latin"), (0x1F00, "Greek"), (0x2000, "other script"),
    (0x3040, "Kana"), (0x3100, "other script"), (0x3130, "Hangul"), (0x3190, "other script"),
    (0x31F0, "Kana"), (0x3200, "other script"), (0x3400, "Han"), (0xA000, "other script"),
    (0xAC00, "Hangul"), (0xD7B0, "other script"), (0xF900, "Han"), (0xFB00, "other script"),
    (0xFB50, "Arabic"), (0xFE00, "other script"), (0xFE70, "Arabic"), (0xFF00, "other script"),
    (0xFF21, "Latin"), (0xFF5B, "other script"), (0xFF66, "Kana"), (0xFFA0, "other script"),
    (0x20000, "Han"), (0x323B0, "other script"),
)  # fmt: skip
_SCRIPT_STARTS = [start for start, _ in _SCRIPTS]
_ASCII_PUNCTUATION = frozenset(string.punctuation)


def letters(script: str) -> str:
    """The name of the class of words in one script."""
    return f"{script} letters"


def class_of(token: bytes) -> str:
    """The class of a token's bytes; one leading space does not count, but before numerals."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return NOT_TEXT
    if text.isdigit() and text.isascii():
        return NUMERALS[len(text) - 1] if len(text) <= 3 else LONG_NUMERALS
    if text.isspace():
        return NEWLINES if "\n" in text or "\r" in text else SPACES
    core = text.removeprefix(" ")
    if _ASCII_PUNCTUATION.issuperset(core):
        return PUNCTUATION if len(core) == 1 else CODE
    # A line that ends in brackets or a comment mark: `{\n`, `*/\n\n`.
    if _ASCII_PUNCTUATION.issuperset(core.strip()):
        return CODE
    if core.isalpha() or _is_marked(core):
        return letters(_script(core))
    return MIXED


def _is_marked(text: str) -> bool:
    """Letters with marks that are characters of their own, as in Devanagari."""
    import unicodedata

    kinds = {unicodedata.category(char)[0] for char in text}
    return "L" in kinds and kinds <= {"L", "M"}


def _script(text: str) -> str:
    at = bisect_right(_SCRIPT_STARTS, ord(text[0])) - 1
    return _SCRIPTS[at][1] if at >= 0 else "other script"


def classes(vocab: Vocab) -> Iterator[tuple[int, str]]:
    """Each id that a tokenizer emits, with its class."""
    special = vocab.special_tokens
    for token_id in range(len(vocab)):
        if token := vocab.token_bytes(token_id):
            if vocab.id_of(token) == token_id:
                yield token_id, class_of(token)
        elif token_id in special:
            yield token_id, SPECIAL


def order(names: set[str]) -> list[str]:
    """Class names as reports list them: fixed ones first, scripts by name, the rest last."""
    first = [*NUMERALS, LONG_NUMERALS, PUNCTUATION, CODE, NEWLINES, SPACES, letters("Latin")]
    last = [letters("other script"), MIXED, NOT_TEXT, SPECIAL]
    scripts = sorted(names - {*first, *last})
    return [name for name in [*first, *scripts, *last] if name in names]
