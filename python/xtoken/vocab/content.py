"""What the ids of a text depend on, as one digest: of a tokenizer as it is, not where it lies."""

from __future__ import annotations

import contextlib
import hashlib
import json
import weakref
from typing import Any

# Printing a large tokenizer takes a part of a second. By tokenizer, with what of it is changed in
# place and read in no time.
_PRINTED: weakref.WeakKeyDictionary[Any, tuple[object, bytes]] = weakref.WeakKeyDictionary()


def content_digest(tokenizer: Any, *, again: bool = False) -> str | None:
    """A hex digest of a tokenizer's model, pipeline, added tokens and special tokens.

    Args:
        tokenizer: an object of transformers or `tokenizers`. What it is set to pad or truncate to
            at the time does not count, nor the padding token, nor a chat template.
        again: print it anew, in which everything is seen; else what was printed of the object
            before is taken where its post-processor, normalizer and pre-tokenizer are as they were.

    Returns: None where the tokenizer does not tell.
    """
    backend = _backend(tokenizer)
    if backend is None:
        return None
    named = dict(getattr(tokenizer, "special_tokens_map", {}))
    named.pop("pad_token", None)
    parts = [splits_special_tokens(tokenizer), json.dumps(named, sort_keys=True, default=str)]
    digest = hashlib.sha256(repr(parts).encode())
    digest.update(_printed(tokenizer, backend, again))
    return digest.hexdigest()


def splits_special_tokens(tokenizer: Any) -> bool:
    """Whether special tokens in a text are text: a setting of its own in transformers, which sets
    the backend by it in each call."""
    own = getattr(tokenizer, "split_special_tokens", None)
    return bool(getattr(tokenizer, "encode_special_tokens", False) if own is None else own)


def _backend(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    return backend if hasattr(backend, "to_str") else None


def _printed(tokenizer: Any, backend: Any, again: bool) -> bytes:
    """The digest of its tokenizer.json."""
    parts = (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
    cheap = (
        backend.get_vocab_size(),
        *(None if part is None else (type(part).__name__, part.__getstate__()) for part in parts),
    )
    known = None
    # Some releases of tokenizers have no weak references: theirs are printed each time.
    with contextlib.suppress(TypeError):
        known = _PRINTED.get(tokenizer)
    if known is not None and known[0] == cheap and not again:
        return known[1]
    text = backend.to_str()
    # Truncation and padding stand before the added tokens.
    found = hashlib.sha256(text[text.index('"added_tokens"') :].encode()).digest()
    with contextlib.suppress(TypeError):
        _PRINTED[tokenizer] = cheap, found
    return found
