"""Texts in German, Russian and Chinese from Debian packages, and what Python carries, in passages.

The game Battle for Wesnoth tells of its peoples, places and rules in the same messages in all
languages; the Debian Handbook is prose on computers; fortunes are aphorisms and anecdotes. `mixed`
is English prose, text rich in numerals, indented code and Chinese. What is held out is held out by
document: a catalogue, a chapter, a file.
"""

from __future__ import annotations

import gettext
import html
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from demo.corpus import build_corpus

PACKAGES = ("wesnoth-1.16-data", "debian-handbook", "fortunes-de", "fortunes-ru")
FETCH = f'apt-get download {" ".join(PACKAGES)}; for file in *.deb; do dpkg-deb -x "$file" .; done'
# A passage is cut at so many tokens of either side later; fewer bytes than this make it too short.
MIXED = "mixed"
PASSAGE_BYTES = {"de": 500, "ru": 400, "zh": 400}
HELD_OUT_SHARE = 0.25
_LEAST_BYTES = 120
_SPACE = re.compile(r"\s+")
_GERMAN = frozenset("der die das und ist nicht ein eine den zu von mit auf im".split())

Documents = dict[str, list[str]]


@dataclass(frozen=True)
class Texts:
    """Passages of one text to train on, and of other documents to score on.

    Attributes:
        kinds: of each held-out passage, in a text of several kinds; else empty.
    """

    train: list[str]
    held_out: list[str]
    kinds: tuple[str, ...] = ()


def read_texts(folder: Path, name: str) -> Texts:
    """The passages of a text by name, in an order that is always the same.

    Args:
        folder: where the packages were unpacked.
        name: of `TEXTS`, such as `fortunes-ru`, or `mixed`.

    Raises: SystemExit if the packages are not there.
    """
    if name == MIXED:
        return _mixed(folder)
    documents = TEXTS[name](folder)
    if not documents:
        raise SystemExit(f"{folder} holds no text of {name}; in it, run `{FETCH}`")
    names = sorted(documents)
    random.Random(0).shuffle(names)
    total = sum(len(part) for name in names for part in documents[name])
    held_out: list[str] = []
    train: list[str] = []
    size = PASSAGE_BYTES[name[-2:]]
    counted = 0
    for document in names:
        into = held_out if counted < HELD_OUT_SHARE * total else train
        counted += sum(map(len, documents[document]))
        into += _passages(documents[document], size)
    for part in (held_out, train):
        random.Random(0).shuffle(part)
    return Texts(train, held_out)


def _mixed(folder: Path) -> Texts:
    """As many passages of each kind, in turn."""
    demo = build_corpus(seed=0, max_chars=500)
    chinese = read_texts(folder, "wesnoth-zh")
    kinds = {"chinese": (chinese.train, chinese.held_out), "code": _code()}
    for kind in ("prose", "numbers"):
        of_kind = [[d.text for d in part if d.kind == kind] for part in (demo.train, demo.held_out)]
        kinds[kind] = of_kind[0], of_kind[1]
    for parts in kinds.values():
        for part in parts:
            random.Random(0).shuffle(part)
    train, held_out = ([parts[side] for parts in kinds.values()] for side in (0, 1))
    least = min(map(len, held_out))
    return Texts(
        list(chain.from_iterable(zip(*train, strict=False))),
        list(chain.from_iterable(zip(*held_out, strict=False))),
        tuple(kinds) * least,
    )


def _code() -> tuple[list[str], list[str]]:
    """Passages of the standard library's modules, every fourth module held out."""
    parts: tuple[list[str], list[str]] = ([], [])
    for place, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        lines = [line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()]
        # Without what is prose: the head of the file and its comments.
        code = [line for line in lines if line and not line.lstrip().startswith("#")]
        parts[place % 4 == 3].extend(list(_passages(code, 350))[1:9])
    return parts


def _passages(paragraphs: list[str], size: int) -> Iterator[str]:
    """Paragraphs of one document joined until they have `size` bytes."""
    passage = ""
    for paragraph in paragraphs:
        passage = f"{passage}\n{paragraph}" if passage else paragraph
        if len(passage.encode()) >= size:
            yield passage
            passage = ""


def _clean(text: str) -> str:
    return _SPACE.sub(" ", text).strip()


def _kept(documents: dict[str, list[str]], is_language: Callable[[str], bool]) -> Documents:
    """Paragraphs that are long enough and in the language; untranslated ones are English."""
    kept = {
        name: [p for p in paragraphs if len(p.encode()) >= _LEAST_BYTES and is_language(p)]
        for name, paragraphs in documents.items()
    }
    return {name: paragraphs for name, paragraphs in kept.items() if paragraphs}


def _wesnoth(folder: Path, language: str) -> Documents:
    found: Documents = {}
    root = folder / "usr/share/games/wesnoth/1.16/locale"
    for path in sorted(root.glob(f"{language}/LC_MESSAGES/*.mo")):
        with path.open("rb") as file:
            catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        found[path.stem] = [
            _clean(re.sub(r"<[^>]*>|\^", "", text))
            for original, text in catalogue.items()
            if isinstance(original, str) and original and original != text
        ]
    return found


def _handbook(folder: Path, language: str) -> Documents:
    found: Documents = {}
    root = folder / "usr/share/doc/debian-handbook/html" / language
    for path in sorted(root.glob("*.html")):
        page = path.read_text(encoding="utf-8")
        paragraphs = re.findall(r'<div class="para">((?:(?!<div).)*?)</div>', page, re.S)
        found[path.stem] = [_clean(html.unescape(re.sub(r"<[^>]+>", "", p))) for p in paragraphs]
    return found


def _fortunes(folder: Path, language: str) -> Documents:
    found: Documents = {}
    for path in sorted((folder / "usr/share/games/fortunes" / language).glob("*")):
        if path.suffix in (".dat", ".u8"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if "\ufffd" not in text:
            found[path.stem] = [_clean(fortune) for fortune in re.split(r"\n%(?:\n|$)", text)]
    return found


def _is_german(text: str) -> bool:
    words = text.lower().split()
    return sum(word in _GERMAN for word in words) > 0.08 * len(words)


def _is_russian(text: str) -> bool:
    return sum("а" <= char.lower() <= "я" for char in text) > 0.6 * len(text)


def _is_chinese(text: str) -> bool:
    return sum("\u4e00" <= char <= "\u9fff" for char in text) > 0.5 * len(text)


TEXTS: dict[str, Callable[[Path], Documents]] = {
    "wesnoth-de": lambda folder: _kept(_wesnoth(folder, "de"), _is_german),
    "wesnoth-ru": lambda folder: _kept(_wesnoth(folder, "ru"), _is_russian),
    "wesnoth-zh": lambda folder: _kept(_wesnoth(folder, "zh_CN"), _is_chinese),
    "handbook-de": lambda folder: _kept(_handbook(folder, "de-DE"), _is_german),
    "handbook-ru": lambda folder: _kept(_handbook(folder, "ru-RU"), _is_russian),
    "handbook-zh": lambda folder: _kept(_handbook(folder, "zh-CN"), _is_chinese),
    "fortunes-de": lambda folder: _kept(_fortunes(folder, "de"), _is_german),
    "fortunes-ru": lambda folder: _kept(_fortunes(folder, "ru"), _is_russian),
}
