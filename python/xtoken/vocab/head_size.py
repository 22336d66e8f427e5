"""How many columns an lm_head, or rows an embedding, may have for a tokenizer of so many ids."""

from __future__ import annotations

# Columns of an lm_head past the tokenizer's last id, at most: 1,069 of 200,019 in gpt-oss.
_MOST_PADDING = 2048


def least_columns(vocab_size: int) -> int:
    """Fewer are another model's: some lack a few for tokens that no text reaches (Gemma-3)."""
    return vocab_size - max(64, vocab_size // 100)


def most_columns(vocab_size: int) -> int:
    """More are another model's; padding is among them."""
    return vocab_size + max(64, min(_MOST_PADDING, vocab_size // 16))
