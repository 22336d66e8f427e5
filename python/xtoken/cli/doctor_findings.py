"""What `xtoken doctor` finds: one line each, with how bad it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "warning", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        status: `ok`; `note`, to know; `warning`, it works and may not do what is expected;
            `broken`, it does not work.
        subject: what was looked at.
        text: what was found and, where something is wrong, the remedy.
    """

    status: Status
    subject: str
    text: str


def one_line(error: BaseException) -> str:
    """The message of an error in one line, or its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
