"""The record of a run: one JSON object a line, written as the run goes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path


class History:
    """Records of a run, kept in memory and appended to a file.

    Args:
        path: emptied here; a line is written and flushed with each record. None keeps no file.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.records: list[dict[str, float]] = []
        if self.path is not None:
            self.path.write_text("", encoding="utf-8")

    def add(self, record: dict[str, float]) -> None:
        """Append a record; a value that is not finite is written as null, as JSON has no NaN."""
        self.records.append(record)
        if self.path is None:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")


def read_history(path: Path | str) -> list[dict[str, float]]:
    """Read the records of a file that `History` wrote; null becomes NaN."""
    lines: Iterable[str] = Path(path).read_text(encoding="utf-8").splitlines()
    return [
        {name: math.nan if value is None else value for name, value in json.loads(line).items()}
        for line in lines
    ]
