"""One forward pass of a causal language model over a padded batch."""

from __future__ import annotations

from torch import Tensor, nn


def causal_logits(model: nn.Module, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return next-token logits, the same for a row whatever its padding.

    Args:
        model: called as `model(input_ids=..., attention_mask=...)`, returns one with `logits`.
        ids: [B, T] int64.
        attention_mask: [B, T], 1 for a token and 0 for padding on either side.
    Returns: [B, T, V] raw logits; those at padded positions have no meaning.
    """
    positions = {}
    if not bool(attention_mask[:, 0].all()):
        # Left padding: positions count tokens. Only then, since not every model takes positions.
        positions["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=attention_mask, use_cache=False, **positions)
    logits: Tensor = output.logits
    return logits
