"""Heads of models that do more to their logits than a config says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


class Doubling(nn.Linear):
    """A head that does something of its own."""

    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * super().forward(hidden)


class Capping(nn.Linear):
    """One that bends its logits, which shows where they are large."""

    def forward(self, hidden: Tensor) -> Tensor:
        return 30 * torch.tanh(super().forward(hidden) / 30)


class Growing(nn.Linear):
    """One with a part that is zero at first, and is trained."""

    def __init__(self, features: int, rows: int, bias: bool) -> None:
        super().__init__(features, rows, bias=bias)
        self.more = nn.Parameter(torch.zeros(rows))

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + self.more


class Gaining(LlamaForCausalLM):
    """A model with a factor of its logits that is 1 at first, and is trained."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.more = nn.Parameter(torch.ones(()))

    def forward(self, *args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        found = super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        found.logits = found.logits * self.more
        return found


OWN_HEADS: list[type[nn.Linear]] = [Doubling, Capping]


def give_head(model: Any, kind: type[nn.Linear]) -> None:
    """Put a head of this kind, with the same weights, in the place of a model's own."""
    rows, features = model.lm_head.weight.shape
    head = kind(features, rows, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
