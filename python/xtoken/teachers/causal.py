"""One forward pass of a causal language model over a padded batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from xtoken.errors import ModelSourceError
from xtoken.teachers.forward import check_ids, check_positions
from xtoken.teachers.offloaded import not_loaded, working_device
from xtoken.teachers.probe import check_causal, position_inputs, takes_left_padding

Move: TypeAlias = Callable[[Tensor], Tensor]


def causal_logits(
    model: nn.Module, ids: Tensor, attention_mask: Tensor, *, side: str = "model"
) -> Tensor:
    """Return next-token logits, the same for a row whatever its padding.

    Args:
        model: called as `model(input_ids=..., attention_mask=...)`, returns one with `logits`.
        ids: [B, T] int64.
        attention_mask: [B, T], 1 for a token and 0 for padding on either side.
        side: the model's part, for messages.
    Returns: [B, T, V] raw logits; those at padded positions have no meaning.

    Raises:
        ModelSourceError: a model of transformers that sees the tokens which follow, whose logits
            are not those of its tokens, or whose weights were not loaded.
        OptionError, TokenIdError: a row is longer than the model has positions, or holds a token
            that it has not.
    """
    if working_device(model).type == "meta":
        raise not_loaded(model, next(name for name, _ in model.named_parameters()))
    check_causal(model, side)
    inputs, back = causal_inputs(model, ids, attention_mask)
    check_positions(model, inputs)
    check_ids(model, inputs)
    logits: Tensor = model(**inputs, use_cache=False).logits
    check_places(model, logits, ids)
    return back(logits)


def causal_inputs(
    model: nn.Module, ids: Tensor, attention_mask: Tensor
) -> tuple[dict[str, Tensor], Move]:
    """What the model is called with, so that a row's padding does not matter; and what brings its
    answer, [B, T, ...], into the layout of the batch."""
    if bool(attention_mask[:, 0].all()):
        return {"input_ids": ids, "attention_mask": attention_mask}, _as_it_is
    if takes_left_padding(model):
        inputs = {"input_ids": ids, "attention_mask": attention_mask}
        return inputs | position_inputs(attention_mask), _as_it_is
    # No model sees what stands behind a row's tokens.
    order = (attention_mask == 0).to(torch.uint8).argsort(dim=1, stable=True)
    inputs = {"input_ids": ids.gather(1, order), "attention_mask": attention_mask.gather(1, order)}
    place = order.argsort(dim=1)

    def back(values: Tensor) -> Tensor:
        at = place.to(values.device)
        return values[torch.arange(len(at), device=at.device)[:, None], at]

    return inputs, back


def check_places(model: nn.Module, values: Tensor, ids: Tensor) -> None:
    """Refuse an answer [B, T', ...] that is not one of each token, such as of soft prompts.

    Raises:
        ModelSourceError: names the model and both numbers.
    """
    if values.shape[1] != ids.shape[1]:
        raise ModelSourceError(
            f"the model {type(model).__name__} gives {values.shape[1]} positions for "
            f"{ids.shape[1]} tokens, so that none is known to be of its token; pass a causal "
            "language model without tokens of its own"
        )


def _as_it_is(values: Tensor) -> Tensor:
    return values
