"""From a printed conversation to ids and the mask of what the assistant says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xtoken._core import Vocab
from xtoken.data.backend import Ids, Ranges, TextBackend, Tokens
from xtoken.data.chat_template import Answer, Rendering
from xtoken.data.stops import StopTokens, stop_tokens

Mask = NDArray[np.bool_]

NO_RANGES: Ranges = np.zeros((0, 2), dtype=np.int64)


class Encoded(NamedTuple):
    """A document under one tokenizer.

    Args:
        ids: [T] int64.
        loss_mask: [T] bool, the tokens a loss may predict.
        turns: [N, 2] int64, the token ranges of the assistant's turns; none in plain text.
        stops: [N, 2] int64, the markers at the end of each turn; empty ranges without any.
    """

    ids: Ids
    loss_mask: Mask
    turns: Ranges
    stops: Ranges = NO_RANGES

    def cut(self, length: int) -> Encoded:
        """Return the first tokens of it."""
        turns, stops = np.minimum(self.turns, length), np.minimum(self.stops, length)
        return Encoded(self.ids[:length], self.loss_mask[:length], turns, stops)


def is_predicted(loss_mask: Mask) -> bool:
    """Whether any token of a mask [T] is predicted, and its teacher asked: nothing predicts a
    first one."""
    return bool(loss_mask[1:].any())


class RenderingEncoder:
    """Tokenizes what a chat template printed, without adding special tokens to those it printed.

    Args:
        tokenizer: a `transformers` fast tokenizer.
        side: "student" or "teacher", for messages.
        vocab: of the tokenizer; made here if absent.
        stops: of the tokenizer; found here if absent.
        backend: of the tokenizer; made here if absent.
    Raises:
        DataError: if the tokenizer is not a fast one.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        side: str = "student",
        vocab: Vocab | None = None,
        stops: StopTokens | None = None,
        backend: TextBackend | None = None,
    ) -> None:
        self._backend = backend or TextBackend(tokenizer, side=side)
        vocab = vocab or Vocab.from_tokenizer(tokenizer)
        self._stops = (stops or stop_tokens(tokenizer, vocab)).all
        self._control = self._stops | vocab.special_tokens.keys()

    def __call__(self, renderings: Sequence[Rendering]) -> list[Encoded]:
        """Return ids, loss mask and turns of each rendering.

        A token is in the mask if it lies in an answer whole, but for white space of the prompt
        that it begins with, and not behind the end of the turn: the model stops before it says
        that.
        """
        encoded = self._backend.encode([item.text for item in renderings])
        return [
            self._encoded(rendering, tokens)
            for rendering, tokens in zip(renderings, encoded, strict=True)
        ]

    def _encoded(self, rendering: Rendering, tokens: Tokens) -> Encoded:
        found = [self._turn(rendering.text, answer, tokens) for answer in rendering.answers]
        mask = np.zeros(len(tokens.ids), dtype=np.bool_)
        for answer, (first, _, last) in zip(rendering.answers, found, strict=True):
            mask[first:last] = answer.learned
        places = np.array(found, dtype=np.int64).reshape(-1, 3)
        return Encoded(tokens.ids, mask, places[:, [0, 2]], places[:, 1:])

    def _turn(self, text: str, answer: Answer, tokens: Tokens) -> tuple[int, int, int]:
        """Return the first token of an answer, its first marker at the end, and where it ends."""
        starts, ends = tokens.places[:, 0], tokens.places[:, 1]
        # A token of no width (a prefix before the first word) belongs to what follows it.
        inside = (starts >= answer.start) & (starts < answer.end) & (ends <= answer.end)
        # A word with the space before it, where the prompt ends in that.
        over = (starts < answer.start) & (ends > answer.start) & (ends <= answer.end)
        for token in over.nonzero()[0]:
            inside[token] = text[starts[token] : answer.start].isspace()
        found = inside.nonzero()[0]
        if not len(found):
            at = int((starts < answer.start).sum())
            return at, at, at
        first, last = int(found[0]), int(found[-1]) + 1
        if answer.content_end is None:
            last = self._last(text, answer, tokens, first, last)
            stop = last
            while stop > first and int(tokens.ids[stop - 1]) in self._stops:
                stop -= 1
            return first, stop, last
        stop = first + int((starts[first:last] < answer.content_end).sum())
        while stop < last and int(tokens.ids[stop]) not in self._stops:
            stop += 1
        return first, stop, last

    def _last(self, text: str, answer: Answer, tokens: Tokens, first: int, last: int) -> int:
        """Find the end of a turn whose content's end is not known, by the markers alone."""
        ids, places = tokens
        closing = next(
            (at for at in range(last, first, -1) if int(ids[at - 1]) in self._control), 0
        )
        if closing and not text[places[closing - 1, 1] : answer.end].strip():
            return closing
        # Blocks of `{% generation %}` may leave the end of the turn out.
        after = last
        while after < len(ids) and not text[answer.end : places[after, 0]].strip():
            if int(ids[after]) in self._stops:
                return after + 1
            after += 1
        return last
