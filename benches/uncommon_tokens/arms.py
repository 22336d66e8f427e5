"""The arms of the experiment: what each trains on, beside the cross-entropy."""

from __future__ import annotations

from typing import Any, NamedTuple

# Settings over those of `DistillConfig`; the weight of the teacher's loss is fixed, at 1, as the
# paper's balance would make losses of different size equal and hide what size alone does.
FIXED: dict[str, Any] = {"kd_weight": 1.0, "teacher_top_k": 512, "top_k": 512}
ARMS: dict[str, dict[str, Any]] = {
    "CE": {"loss": "ce"},
    "ULD": {"loss": "uld"},
    "GOLD": {"loss": "gold"},
    "H-KL": {"loss": "h-kl"},
    "P-KL decay 0.1": {"loss": "p-kl"},
    "P-KL decay 0": {"loss": "p-kl", "projection_decay": 0.0},
    "P-KL decay 0, weight 3": {"loss": "p-kl", "projection_decay": 0.0, "kd_weight": 3.0},
    "P-KL decay 0, weight 0.5": {"loss": "p-kl", "projection_decay": 0.0, "kd_weight": 0.5},
    "prefix KL": {"loss": "prefix-kl"},
    "prefix KL, weight 0.5": {"loss": "prefix-kl", "kd_weight": 0.5},
    "prefix KL, weight 3": {"loss": "prefix-kl", "kd_weight": 3.0},
    "prefix KL without END": {"loss": "prefix-kl", "prefix_end": False},
}
SEEDS = (0, 1, 2)
# Passages of the demo's corpus; fixed here, for a change of the demo must not split the results.
# 680 are all that the number-rich part allows for: twice through at 480 steps. 210 are gone through
# seven times.
MUCH, LITTLE = 680, 210
HELD_OUT, NUMBER_SHARE = 60, 0.4


class Unit(NamedTuple):
    """One student to train: `passages` is how many there are to train on."""

    arm: str
    seed: int
    steps: int
    passages: int = MUCH


def plan() -> list[Unit]:
    """All units, the most telling ones first."""
    pair = ("P-KL decay 0", "prefix KL")
    first = [
        *(Unit(arm, seed, 480) for seed in SEEDS for arm in pair),
        *(
            Unit(arm, seed, 480)
            for arm in ("prefix KL without END", "P-KL decay 0, weight 3")
            for seed in SEEDS
        ),
        *(Unit(arm, seed, steps, LITTLE) for steps in (480, 160) for seed in SEEDS for arm in pair),
    ]
    rest = [Unit(arm, seed, steps) for steps in (480, 160) for arm in ARMS for seed in SEEDS]
    return [*first, *(unit for unit in rest if unit not in first)]
