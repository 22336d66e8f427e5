"""The configured distillation loss of a run, built once from W and the settings."""

from __future__ import annotations

import torch
from torch import nn

from xtoken.losses.inputs import LossInputs, LossOptions
from xtoken.losses.output import LossOutput
from xtoken.losses.registry import find_loss
from xtoken.projection import Projection
from xtoken.tensors.pair_parts import PairParts
from xtoken.training.config import DistillConfig


class DistillLoss(nn.Module):
    """A loss of the library with its options and what it reads of the pair.

    Args:
        config: `loss` names it; it must not be `ce`.
        projection: W of the pair.
        device: where the batches will be.
    """

    def __init__(
        self, config: DistillConfig, projection: Projection, device: torch.device | str
    ) -> None:
        super().__init__()
        spec = find_loss(config.loss)
        given = {
            "top_k": config.top_k,
            "top_k_scope": config.top_k_scope,
            "tail_bucket": "auto" if config.tail_bucket and config.top_k is not None else False,
            "merge": config.merge,
            "temperature": config.temperature,
            "max_depth": config.prefix_max_depth,
            "end": config.prefix_end,
        }
        read = {name: value for name, value in given.items() if name in spec.options}
        self.options = LossOptions(**read)  # type: ignore[arg-type]
        self.function = spec.function
        self.pair = PairParts.from_projection(projection, needs=spec.name).to(device)

    def forward(self, inputs: LossInputs) -> LossOutput:
        """The loss of one batch."""
        return self.function(inputs, self.pair, self.options)
