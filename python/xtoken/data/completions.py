"""A text that goes on from a prompt: only what follows the prompt is learned."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from xtoken._checks import expect
from xtoken.errors import DataError


@dataclass(frozen=True)
class Completion:
    """A prompt and the text that follows it, tokenized as one text.

    Hashable, and equal to another with the same texts, wherever each was read.

    Args:
        prompt: what the model reads; may be empty.
        completion: what it learns to say.
        source: where they were read, for messages about them.

    Raises:
        DataError: the completion is blank.

    >>> Completion("2 + 2 = ", "4").text
    '2 + 2 = 4'
    """

    prompt: str
    completion: str
    source: str = field(default="completion", compare=False)

    def __post_init__(self) -> None:
        for name in ("prompt", "completion"):
            expect(getattr(self, name), str, name, "pass a text")
        if not self.completion.strip():
            raise DataError(
                f"{self.source}: completion = {self.completion!r}, expected what follows the "
                "prompt; leave the row out"
            )

    @property
    def text(self) -> str:
        """Both as one text."""
        return self.prompt + self.completion

    @property
    def json(self) -> str:
        """Both as JSON."""
        return json.dumps([self.prompt, self.completion])
