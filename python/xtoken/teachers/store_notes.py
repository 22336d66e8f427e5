"""How a store was made: from which texts, cut where, by which command, and whether to the end."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from xtoken._files import read_json, sealed, unsealed, write_text
from xtoken.errors import FormatError, StoreError

NOTES_FILE = "store.json"
TOKENIZER_FOLDER = "tokenizer"
_FORMAT = "xtoken-teacher-store-1"


@dataclass(frozen=True)
class StoreNotes:
    """What `xtoken teach` says of a store; for people and messages, no predictions depend on it.

    Attributes:
        teacher: directory, hub name or address of the teacher.
        date: the day that chat templates printed, YYYY-MM-DD.
        max_tokens: where texts were cut; None for nowhere.
        sequences, tokens: of the texts.
        complete: whether all of them were computed.
        arguments: of the command that made it, after `xtoken`.
    """

    teacher: str
    date: str
    max_tokens: int | None
    sequences: int
    tokens: int
    complete: bool
    arguments: tuple[str, ...] = ()

    def command(self, directory: Path, **changes: str) -> str:
        """The command that makes or finishes the store, which lies in `directory` by now.

        Args:
            changes: other values of its options, such as `max_tokens`.
        """
        arguments = list(self.arguments)
        for name, value in (changes | {"out": str(directory)}).items():
            arguments = _with_option(arguments, "--" + name.replace("_", "-"), value)
        return shlex.join(["xtoken", *arguments])

    def save(self, directory: Path) -> None:
        """Write them beside the predictions."""
        write_text(directory / NOTES_FILE, sealed({"format": _FORMAT, **asdict(self)}))

    @classmethod
    def of(cls, directory: Path) -> StoreNotes | None:
        """Those of a store; None where there are none.

        Raises:
            StoreError: the file was altered.
        """
        path = directory / NOTES_FILE
        if not path.is_file():
            return None
        altered = StoreError(f"{path} was altered, or is of a newer version; remove it")
        try:
            values: dict[str, Any] | None = unsealed(read_json(path, "notes of a teacher store"))
        except FormatError as error:
            raise altered from error
        if values is None or values.pop("format", None) != _FORMAT:
            raise altered
        if values.keys() != {each.name for each in fields(cls)}:
            raise altered
        arguments = values["arguments"]
        if not isinstance(arguments, list) or not all(isinstance(one, str) for one in arguments):
            raise altered
        return cls(**{**values, "arguments": tuple(arguments)})


def _with_option(arguments: list[str], flag: str, value: str) -> list[str]:
    """A command line in which an option has this value alone."""
    found: list[str] = []
    rest = iter(arguments)
    given = False
    for each in rest:
        if each != flag:
            found.append(each)
            continue
        next(rest, None)
        found += [] if given else [flag, value]
        given = True
    return found if given else [*found, flag, value]
