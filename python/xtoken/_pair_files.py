"""The files of a saved pair: both vocabularies, W, the tokenizers, and a description of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from xtoken._checks import shown
from xtoken._core import Vocab
from xtoken._files import (
    parts_beside,
    path_to_read,
    read_json,
    sealed,
    sha256_of,
    unsealed,
    write_json,
)
from xtoken.errors import (
    FormatError,
    MissingFileError,
    OptionError,
    UnsupportedTokenizerError,
    XTokenError,
)
from xtoken.projection import Projection
from xtoken.vocab.side import GENERATION_CONFIG_FILE, Side, SideName

_FORMAT = "xtoken-pair"
_FORMAT_VERSION = 1
_FILE = "pair.json"
_PROJECTION_FILE = "projection.safetensors"
_NAMES: tuple[SideName, SideName] = ("student", "teacher")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(each in _NAMES for each in value)


def _is_checksums(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


def _is_options(value: object) -> bool:
    """Whether the special roles among them are pairs; the pair checks the rest as it is made."""
    if not isinstance(value, dict):
        return False
    roles = value.get("special_roles")
    return roles is None or (isinstance(roles, dict) and all(map(_is_role, roles.values())))


def _is_role(value: object) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2)


# The parts of a description, and what each is.
_ENTRIES: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("fingerprint", "student", "teacher"), _is_text),
    **dict.fromkeys(("student_label", "teacher_label"), _is_text),
    "splits": _is_names,
    "options": _is_options,
    "files": _is_checksums,
}


@dataclass(frozen=True)
class SavedPair:
    """What a saved pair is made of again.

    Attributes:
        sides: student and teacher.
        options: how W was built.
        projection: the file of W.
        description: the file that holds the fingerprint.
        fingerprint: that of the pair as it was saved.
    """

    sides: tuple[Side, Side]
    options: dict[str, Any]
    projection: Path
    description: Path
    fingerprint: str

    def check(self, fingerprint: str) -> None:
        """Refuse a pair of another fingerprint.

        Raises:
            FormatError: it is another.
        """
        if fingerprint != self.fingerprint:
            raise FormatError(
                f"{self.description.parent} holds a pair of fingerprint {fingerprint[:12]}, its "
                f"{_FILE} says {self.fingerprint[:12]}; save the pair again"
            )


def write_pair(
    folder: Path,
    projection: Projection,
    sides: tuple[Side, Side],
    vocabs: tuple[Vocab, Vocab],
    *,
    fingerprint: str,
    options: Mapping[str, object],
) -> None:
    """Write a pair; one that is in the folder is replaced.

    Raises:
        FailedWriteError: the folder cannot be written.
        OptionError: it holds a `student` or `teacher` that is of no saved pair.
    """
    vocab_files = [f"{name}.vocab" for name in _NAMES]
    with parts_beside(folder, [_FILE, _PROJECTION_FILE, *vocab_files, *_NAMES]) as made:
        _check_folder(folder)
        projection.save(made / _PROJECTION_FILE)
        for side, vocab, name in zip(sides, vocabs, vocab_files, strict=True):
            (made / name).write_bytes(_vocab_state(vocab))
            _save_tokenizer(side, made / side.name)
        content = {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            "fingerprint": fingerprint,
            "student": vocabs[0].fingerprint,
            "teacher": vocabs[1].fingerprint,
            "student_label": sides[0].label,
            "teacher_label": sides[1].label,
            "splits": [side.name for side in sides if side.splits],
            "options": dict(options),
            "files": _checksums(made),
        }
        (made / _FILE).write_bytes(sealed(content).encode())


def read_pair(folder: Path) -> SavedPair:
    """Read what `write_pair` wrote.

    Raises:
        MissingFileError: the folder holds no pair.
        FormatError: a file is damaged, or of another pair or a newer version.
    """
    content = _read_description(folder / _FILE)
    student, teacher = (_read_side(folder, name, content) for name in _NAMES)
    _check_files(folder, content["files"])
    return SavedPair(
        (student, teacher),
        content["options"],
        folder / _PROJECTION_FILE,
        folder / _FILE,
        content["fingerprint"],
    )


def _vocab_state(vocab: Vocab) -> bytes:
    """The bytes from which the core makes an equal vocabulary."""
    _, (state,) = cast("tuple[object, tuple[bytes]]", vocab.__reduce__())
    return state


def _save_tokenizer(side: Side, folder: Path) -> None:
    """Write the tokenizer where its class can; a tiktoken encoding and a `Vocab` cannot."""
    tokenizer = _writable(side)
    if tokenizer is None:
        return
    folder.mkdir()
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    else:
        (folder / "tokenizer.json").write_bytes(tokenizer.to_str().encode())
    config = side.generation_config
    if config is not None:
        write_json(folder / GENERATION_CONFIG_FILE, config)


def _writable(side: Side) -> Any:
    """The tokenizer, if its class can write itself."""
    if isinstance(side.source, Vocab):
        return None
    try:
        tokenizer = side.tokenizer
    except UnsupportedTokenizerError:
        return None
    has_writer = hasattr(tokenizer, "save_pretrained") or hasattr(tokenizer, "to_str")
    return tokenizer if has_writer else None


def _check_folder(folder: Path) -> None:
    """Refuse to replace what is of no saved pair, such as the student of a run."""
    listed: set[str] | None = None
    if (folder / _FILE).is_file():
        try:
            listed = set(_read_description(folder / _FILE)["files"])
        except FormatError:
            listed = None
    for name in _NAMES:
        # Of a save that was cut off the vocabulary is there, but no description.
        if listed is None and (folder / f"{name}.vocab").is_file():
            continue
        for path in sorted((folder / name).rglob("*")):
            if path.is_file() and path.relative_to(folder).as_posix() not in (listed or ()):
                raise OptionError(
                    f"{path} is of no saved pair, and saving would replace {folder / name}; pass a "
                    "folder of the pair's own"
                )


def _checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file that a saved pair consists of."""
    tokenizers = [path for name in _NAMES for path in (folder / name).rglob("*")]
    files = [folder / _PROJECTION_FILE, *folder.glob("*.vocab"), *tokenizers]
    return {
        path.relative_to(folder).as_posix(): sha256_of(path)
        for path in sorted(files)
        if path.is_file()
    }


def _check_files(folder: Path, expected: dict[str, str]) -> None:
    for name, checksum in expected.items():
        if not os.path.isfile(folder / name):
            raise MissingFileError(f"{folder / name} does not exist; save the pair again")
        if sha256_of(folder / name) != checksum:
            raise FormatError(
                f"{folder / name} was altered: its checksum differs; save the pair again"
            )


def _read_description(path: Path) -> dict[str, Any]:
    if not path_to_read("saved pair", path, "write it with Pair.save").is_file():
        raise MissingFileError(f"{path} does not exist; write it with Pair.save")
    found = read_json(path, "saved pair")
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise FormatError(f"{path} is not a saved pair; expected one that Pair.save wrote")
    version = found.get("format_version")
    if not isinstance(version, int) or version > _FORMAT_VERSION:
        raise FormatError(
            f"{path} has format {str(version)[:20]}, this version of xtoken reads up to "
            f"{_FORMAT_VERSION}; update xtoken or save the pair again"
        )
    content = unsealed(found)
    if content is None:
        raise FormatError(f"{path} was altered: its checksum differs; save the pair again")
    for side in _NAMES:
        content.setdefault(f"{side}_label", side)
    content.setdefault("splits", [])
    for name, holds in _ENTRIES.items():
        if not holds(content.get(name)):
            found = shown(content[name]) if name in content else "nothing"
            raise FormatError(
                f"{path} has {found} for {name!r}, which Pair.save does not write; save the pair "
                "again"
            )
    content["options"] = _read_options(content["options"])
    return content


def _read_side(folder: Path, name: SideName, content: dict[str, Any]) -> Side:
    file = folder / f"{name}.vocab"
    if not file.is_file():
        raise MissingFileError(f"{file} does not exist; save the pair again")
    try:
        vocab = Vocab._from_state(file.read_bytes())
    except XTokenError as error:
        raise FormatError(f"{file} is damaged: {error}; save the pair again") from error
    if vocab.fingerprint != content[name]:
        raise FormatError(
            f"{file} has fingerprint {vocab.fingerprint[:12]}, {_FILE} says "
            f"{content[name][:12]}; save the pair again"
        )
    saved = folder / name
    return Side(
        name,
        saved if saved.is_dir() else vocab,
        vocab=vocab,
        label=content[f"{name}_label"],
        splits=name in content["splits"],
    )


def _read_options(options: dict[str, Any]) -> dict[str, Any]:
    roles = options.get("special_roles")
    pairs = None if roles is None else {k: v and tuple(v) for k, v in roles.items()}
    return {**options, "special_roles": pairs}
