"""The options of a distiller, by name: those of all losses, and what stands around the loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, TypedDict, get_args

from xtoken._checks import check_number, shown
from xtoken.distillation.collate import PaddingSide
from xtoken.errors import OptionError
from xtoken.losses.engine.divergence import Direction
from xtoken.losses.engine.loss_spec import unread_option
from xtoken.losses.engine.merge import Merge
from xtoken.losses.inputs import Chooser, Scope
from xtoken.losses.registry import LossName, find_loss

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
DEFAULT_THRESHOLD = 0.6
_OF_CROSS_ENTROPY = frozenset({"compiled"})


def options_read(losses: Iterable[str]) -> frozenset[str]:
    """The `LossOptions` that any of these losses reads."""
    of_each = (_OF_CROSS_ENTROPY if loss == "ce" else find_loss(loss).options for loss in losses)
    return frozenset().union(*of_each)


def not_an_option(name: str, value: object, losses: Sequence[str]) -> OptionError:
    """The error of an option that none of these losses reads."""
    reads = "it reads" if set(losses) != {"ce"} else "it has no teacher, and reads"
    return unread_option(name, value, " or ".join(losses), options_read(losses), reads)


def trains_projection(loss: str) -> bool:
    """Whether the weights of W can be trained under a loss."""
    return loss != "ce" and find_loss(loss).parts & {"projection", "tries"} == {"projection"}


def reads_threshold(loss: str) -> bool:
    """Whether a loss reads the relaxed common set."""
    return loss != "ce" and "relaxed_common" in find_loss(loss).parts


def check_threshold(threshold: float) -> None:
    """Refuse what is no weight of W."""
    rule = "is out of range; expected 0 < t <= 1"
    check_number("threshold", threshold, 0, inside=True, rule=rule)
    if threshold > 1:
        raise OptionError(f"threshold = {threshold} {rule}")


def check_threshold_read(threshold: float, losses: Sequence[str]) -> None:
    """Refuse a threshold that was changed, and that none of these losses reads."""
    if threshold != DEFAULT_THRESHOLD and not any(map(reads_threshold, losses)):
        raise OptionError(
            f"threshold = {threshold} is not an option of {' or '.join(losses)}; h-kl reads it"
        )


def check_teacher_weights(weights: Sequence[float], weighting: str | None) -> None:
    """Refuse weights of teachers that would not be read: those of an only teacher, and numbers
    beside a weighting by confidence.

    Raises:
        OptionError: names it.
    """
    set_here = next((weight for weight in weights if weight != 1.0), None)
    if len(weights) < 2 and (set_here is not None or weighting is not None):
        name, value = ("teacher_weighting", weighting) if weighting else ("weight", set_here)
        raise OptionError(
            f"{name} = {shown(value)} weighs several teachers, and {len(weights)} is given; set "
            "kd_weight, the weight of the distillation loss"
        )
    if weighting is not None and set_here is not None:
        raise OptionError(
            f"a teacher has the weight {shown(set_here)} beside teacher_weighting = {weighting!r}, "
            "by which each sample weighs them; leave one of them out"
        )


def check_weights(loss: str, kd_weight: KdWeight, ce_weight: float) -> None:
    """Refuse weights that are no numbers, or leave nothing to train on."""
    for name, weight in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
        if isinstance(weight, str) and weight == "balanced" and name == "kd_weight":
            continue
        expected = "a number of at least 0" + (" or 'balanced'" if name == "kd_weight" else "")
        check_number(name, weight, 0, rule=f"is out of range; expected {expected}")
    if ce_weight == 0 and (kd_weight == 0 or kd_weight == "balanced" or loss == "ce"):
        raise OptionError(
            f"ce_weight = 0 with kd_weight = {kd_weight} and loss = {loss!r} leaves nothing to "
            "train on; give one of them a positive weight"
        )
