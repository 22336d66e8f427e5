"""A tokenizer's backend for printed text: no special tokens added, exact places of its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xtoken.errors import DataError
from xtoken.vocab.content import splits_special_tokens
from xtoken.vocab.side import with_own_settings

if TYPE_CHECKING:
    from tokenizers import AddedToken

Ids = NDArray[np.int64]
Ranges = NDArray[np.int64]


class Tokens(NamedTuple):
    """The tokens of a text.

    Args:
        ids: [T] int64.
        places: [T, 2] int64, half-open ranges of characters.
    """

    ids: Ids
    places: Ranges


class TextBackend:
    """Tokenizes text that holds its special tokens already.

    Args:
        tokenizer: a `transformers` fast tokenizer, whose settings stay as they are.
        side: "student" or "teacher", for messages.
    Raises:
        DataError: if the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any, *, side: str = "student") -> None:
        # Here, as `import xtoken` does without.
        from tokenizers import Tokenizer, processors

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise DataError(
                f"the {side}'s tokenizer is {type(tokenizer).__name__}, expected a fast one, which "
                "says where its tokens lie in the text; convert it to tokenizer.json"
            )
        # Post-processors of byte-level models leave spaces out of the offsets, and what others add
        # is in the text already.
        self._backend = with_own_settings(backend)
        self._backend.post_processor = processors.ByteLevel(trim_offsets=False)
        # The backend has that of the last call.
        self._backend.encode_special_tokens = splits_special_tokens(tokenizer)
        added: dict[int, AddedToken] = backend.get_added_tokens_decoder()
        self.markers = frozenset(token_id for token_id, token in added.items() if token.content)
        """The added tokens, special or not."""
        # Their offsets reach into the white space beside them, which may be another's.
        self._greedy = {
            token_id: token.content
            for token_id, token in added.items()
            if token.lstrip or token.rstrip
        }

    def encode(self, texts: list[str]) -> list[Tokens]:
        """Return the tokens of each text; a marker's place is that of its own characters."""
        return [
            self._tokens(text, encoding)
            for text, encoding in zip(texts, self._backend.encode_batch(texts), strict=True)
        ]

    def _tokens(self, text: str, encoding: Any) -> Tokens:
        ids = np.array(encoding.ids, dtype=np.int64)
        places = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        if self._greedy:
            for at in np.isin(ids, list(self._greedy)).nonzero()[0]:
                start, end = places[at].tolist()
                places[at] = _own_place(text, start, end, self._greedy[int(ids[at])])
        return Tokens(ids, places)


def _own_place(text: str, start: int, end: int, content: str) -> tuple[int, int]:
    at = text.find(content, start, end)
    if at >= 0:
        return at, at + len(content)
    # A normalizer rewrote it.
    covered = text[start:end]
    return end - len(covered.lstrip()), start + len(covered.rstrip())
