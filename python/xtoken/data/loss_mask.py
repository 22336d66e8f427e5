"""From a printed conversation to ids and the mask of what the assistant says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, processors

from xtoken._core import Vocab
from xtoken.data.chat_template import Rendering, Span
from xtoken.errors import DataError

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]
Ranges = NDArray[np.int64]


class Encoded(NamedTuple):
    """A document under one tokenizer.

    Args:
        ids: [T] int64.
        loss_mask: [T] bool, the tokens a loss may predict.
        turns: [N, 2] int64, the token ranges of the assistant's turns; none in plain text.
    """

    ids: Ids
    loss_mask: Mask
    turns: Ranges

    def cut(self, length: int) -> Encoded:
        """Return the first tokens of it."""
        turns = np.minimum(self.turns, length)
        return Encoded(self.ids[:length], self.loss_mask[:length], turns)


class RenderingEncoder:
    """Tokenizes what a chat template printed, without adding special tokens to those it printed.

    Args:
        tokenizer: a `transformers` fast tokenizer.
        side: "student" or "teacher", for messages.
        vocab: of the tokenizer; made here if absent.
    Raises:
        DataError: if the tokenizer is not a fast one.
    """

    def __init__(
        self, tokenizer: Any, *, side: str = "student", vocab: Vocab | None = None
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise DataError(
                f"the {side}'s tokenizer is {type(tokenizer).__name__}, expected a fast one, which "
                "says where its tokens lie in the text; convert it to tokenizer.json"
            )
        # A copy, so that the settings of the caller's stay. Post-processors of byte-level models
        # leave spaces out of the offsets, and what others add is in the text already.
        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.post_processor = processors.ByteLevel(trim_offsets=False)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = backend.encode_special_tokens
        vocab = vocab or Vocab.from_tokenizer(tokenizer)
        self._control = np.array(sorted(vocab.special_tokens), dtype=np.int64)
        self._ends = {vocab.roles.get("eos"), vocab.roles.get("eot"), tokenizer.eos_token_id}

    def __call__(self, renderings: Sequence[Rendering]) -> list[Encoded]:
        """Return ids, loss mask and turns of each rendering.

        A token is in the mask if it lies in a span whole, and, where control tokens close the
        span, not in the white space after them: the model stops before it says that.
        """
        encodings = self._backend.encode_batch([item.text for item in renderings])
        return [
            self._encoded(rendering, encoding)
            for rendering, encoding in zip(renderings, encodings, strict=True)
        ]

    def _encoded(self, rendering: Rendering, encoding: Any) -> Encoded:
        ids = np.array(encoding.ids, dtype=np.int64)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        turns = [self._turn(rendering.text, span, ids, offsets) for span in rendering.spans]
        mask = np.zeros(len(ids), dtype=np.bool_)
        for first, last in turns:
            mask[first:last] = True
        return Encoded(ids, mask, np.array(turns, dtype=np.int64).reshape(-1, 2))

    def _turn(self, text: str, span: Span, ids: Ids, offsets: Ranges) -> tuple[int, int]:
        start, end = span
        # A token of no width (a prefix before the first word) belongs to what follows it.
        inside = (offsets[:, 0] >= start) & (offsets[:, 0] < end) & (offsets[:, 1] <= end)
        tokens = inside.nonzero()[0]
        if not len(tokens):
            at = int((offsets[:, 0] < start).sum())
            return at, at
        first, last = int(tokens[0]), int(tokens[-1]) + 1
        closing = np.isin(ids[first:last], self._control).nonzero()[0]
        if len(closing) and not text[offsets[first + closing[-1], 1] : end].strip():
            return first, first + int(closing[-1]) + 1
        # Blocks of `{% generation %}` may leave the end of the turn out.
        while last < len(ids) and offsets[last, 0] == end and int(ids[last]) in self._ends:
            end = int(offsets[last, 1])
            last += 1
        return first, last
