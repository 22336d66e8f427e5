"""The record of a run: one JSON object a line, written as the run goes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from xtoken._files import parse_json, to_disk, write_atomically
from xtoken.errors import FormatError


class History:
    """Records of a run, kept in memory and appended to a file.

    Args:
        path: a line is written and flushed with each record. None keeps no file.
        records: of an earlier sitting; the file is replaced by these, and emptied by default.
    """

    def __init__(
        self, path: Path | str | None = None, records: Sequence[dict[str, float]] = ()
    ) -> None:
        self.path = None if path is None else Path(path)
        self.records: list[dict[str, float]] = list(records)
        if self.path is not None:
            text = "".join(map(_line, self.records))
            write_atomically(self.path, lambda file: file.write(text.encode()))

    def add(self, record: dict[str, float]) -> None:
        """Append a record; a value that is not finite is written as null, as JSON has no NaN."""
        self.records.append(record)
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))

    def to_disk(self) -> None:
        """Return once the file would survive a crash of the machine."""
        if self.path is not None:
            to_disk(self.path)


def _line(record: dict[str, float]) -> str:
    finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
    return json.dumps(finite) + "\n"


def read_history(path: Path | str) -> list[dict[str, float]]:
    """Read the records of a file that `History` wrote; null becomes NaN.

    A last line without its end, as of a run that is being written or was killed, is left out.

    Raises:
        FormatError: a line is no record.
    """
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    return [_record(line, f"{path} line {number}") for number, line in enumerate(lines, 1)]


def _record(line: bytes, where: str) -> dict[str, float]:
    try:
        found = parse_json(line)
    except FormatError as error:
        raise FormatError(f"{where} {error}") from error
    fields = found if isinstance(found, dict) else {}
    numbers = {
        name: math.nan if value is None else value
        for name, value in fields.items()
        if value is None or isinstance(value, int | float)
    }
    if "step" not in numbers or len(numbers) != len(fields):
        raise FormatError(f"{where} is no record of a run: {line[:40]!r}; put the file back")
    return numbers


def records_until(path: Path | str, step: int) -> list[dict[str, float]]:
    """Return the records of a file up to a step, included; none where there is no file."""
    if not Path(path).is_file():
        return []
    return [record for record in read_history(path) if record["step"] <= step]
