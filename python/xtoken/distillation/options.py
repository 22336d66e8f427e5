"""The options of a distiller, by name: those of all losses, and what stands around the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict, get_args

from xtoken.distillation.collate import PaddingSide
from xtoken.losses.engine.divergence import Direction
from xtoken.losses.engine.merge import Merge
from xtoken.losses.inputs import Chooser, Scope
from xtoken.losses.registry import LossName

DistillLossName = Literal[LossName, "ce", "auto"]
"""A loss of the library; `ce` is cross-entropy alone, `auto` what the pair's audit recommends."""

KdWeight = float | Literal["balanced"]


class LossFields(TypedDict, total=False):
    """The options of the losses; see `LossOptions`."""

    direction: Direction
    beta: float
    temperature: float | None
    merge: Merge
    top_k: int | None
    top_k_scope: Scope
    top_k_by: Chooser
    tail_bucket: bool | Literal["auto"]
    common_weight: float
    uld_weight: float
    max_depth: int | None
    depth_weights: Sequence[float]
    min_mass: float
    end: bool
    mirror: bool
    cells: bool | None
    consistent: bool | None
    carry_levels: int
    min_prob: float
    sure: bool
    chain_rule: bool | None
    mismatch_weight: float
    student_top_k: int | None
    mask_spaces: bool
    full_metrics: bool
    block_size: int | None
    compiled: bool | str


class DistillerOptions(LossFields, total=False):
    """The options of a `Distiller`; see there."""

    kd_weight: KdWeight
    ce_weight: float
    learnable_projection: bool
    threshold: float
    max_tokens: int | None
    padding_side: PaddingSide
    pad_to_multiple_of: int


LOSS_NAMES: tuple[str, ...] = get_args(DistillLossName)
LOSS_FIELDS = frozenset(LossFields.__annotations__)

__all__ = ["LOSS_FIELDS", "LOSS_NAMES", "DistillLossName", "DistillerOptions", "LossName"]
