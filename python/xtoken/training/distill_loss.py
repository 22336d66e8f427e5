"""The distillation losses by name, each built once a run from W and the settings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from xtoken.losses import LossOutput, PrefixKL, gold, h_kl, p_kl, uld
from xtoken.projection import Projection
from xtoken.tensors.projection import SparseProjection
from xtoken.training.config import DistillConfig
from xtoken.trie import PairTries

# Called with student logits, teacher signal, chunks; by name both sides' ids and the normalizer.
DistillLoss = Callable[..., LossOutput]


def make_loss(
    config: DistillConfig, projection: Projection, device: torch.device | str
) -> DistillLoss:
    """Return the configured loss of a pair.

    Args:
        config: `loss` names it; it must not be `ce`.
        projection: W of the pair.
        device: where the batches will be.
    """
    return _MAKERS[config.loss](config, projection, device)


def _p_kl(config: DistillConfig, projection: Projection, device: torch.device | str) -> DistillLoss:
    sparse = SparseProjection.from_projection(projection).to(device)

    def loss(student_logits: Tensor, signal: Any, chunks: Any, **call: Any) -> LossOutput:
        return p_kl(
            student_logits,
            signal,
            sparse,
            chunks,
            top_k=config.top_k,
            top_k_scope=config.top_k_scope,
            tail_bucket=_tail_bucket(config, projection),
            merge=config.merge,
            temperature=config.temperature,
            **call,
        )

    return loss


def _prefix_kl(
    config: DistillConfig, projection: Projection, device: torch.device | str
) -> DistillLoss:
    return PrefixKL(
        SparseProjection.from_projection(projection),
        PairTries.from_projection(projection),
        max_depth=config.prefix_max_depth,
        end=config.prefix_end,
        top_k=config.top_k,
        top_k_scope=config.top_k_scope,
        tail_bucket=_tail_bucket(config, projection),
        temperature=config.temperature,
    ).to(device)


def _tail_bucket(config: DistillConfig, projection: Projection) -> bool:
    """Whether there is a tail: where all columns that W reaches are compared, there is none."""
    if not config.tail_bucket or config.top_k is None:
        return False
    return config.top_k < len(np.unique(projection.indices))


def _uld(config: DistillConfig, projection: Projection, device: torch.device | str) -> DistillLoss:
    return partial(uld, **_hybrid_options(config, projection))


def _gold(config: DistillConfig, projection: Projection, device: torch.device | str) -> DistillLoss:
    return partial(
        gold, **_common(projection, "strict", device), **_hybrid_options(config, projection)
    )


def _h_kl(config: DistillConfig, projection: Projection, device: torch.device | str) -> DistillLoss:
    return partial(
        h_kl, **_common(projection, "relaxed", device), **_hybrid_options(config, projection)
    )


def _hybrid_options(config: DistillConfig, projection: Projection) -> dict[str, Any]:
    return {
        "student_vocab_size": projection.shape[0],
        "teacher_vocab_size": projection.shape[1],
        "merge": config.merge,
        "temperature": config.temperature,
    }


def _common(
    projection: Projection, mode: Literal["strict", "relaxed"], device: torch.device | str
) -> dict[str, Any]:
    pairs = torch.from_numpy(projection.common_set(mode=mode)).to(device)  # [n, 2]
    return {
        "student_ids_common": pairs[:, 0].contiguous(),
        "teacher_ids_common": pairs[:, 1].contiguous(),
    }


_MAKERS: dict[str, Callable[..., DistillLoss]] = {
    "p-kl": _p_kl,
    "prefix-kl": _prefix_kl,
    "h-kl": _h_kl,
    "gold": _gold,
    "uld": _uld,
}
