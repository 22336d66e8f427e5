"""The arms of the experiment: what each trains on, beside the cross-entropy."""

from __future__ import annotations

from typing import Any, NamedTuple

# Settings over those of `DistillConfig`; the weight of the teacher's loss is fixed, at 1, but where
# an arm says otherwise: the paper's balance would make losses of different size equal, and hide
# what size alone does.
FIXED: dict[str, Any] = {
    "kd_weight": 1.0,
    "teacher_top_k": 512,
    "top_k": 512,
    "tail_bucket": False,
    "learning_rate": 3e-3,
    "warmup_steps": 10,
}
ARMS: dict[str, dict[str, Any]] = {
    "CE": {"loss": "ce"},
    "ULD": {"loss": "uld"},
    "GOLD": {"loss": "gold"},
    "H-KL": {"loss": "h-kl"},
    "P-KL decay 0.1": {"loss": "p-kl"},
    "P-KL decay 0": {"loss": "p-kl", "projection_decay": 0.0},
    "P-KL decay 0, weight 3": {"loss": "p-kl", "projection_decay": 0.0, "kd_weight": 3.0},
    "P-KL decay 0, tail": {"loss": "p-kl", "projection_decay": 0.0, "tail_bucket": True},
    "prefix KL": {"loss": "prefix-kl"},
    "prefix KL, tail": {"loss": "prefix-kl", "tail_bucket": True},
    "prefix KL without END": {"loss": "prefix-kl", "prefix_end": False},
    "exact KL": {"loss": "exact-kl", "trainer": {"chain_rule": True}},
    "exact KL, plain sum": {"loss": "exact-kl", "trainer": {"chain_rule": False}},
}
# Other weights on the losses that leave no mass out: the paper's balance, which is the trainer's
# default, and three times the weight, looked at with one seed.
_TAILED = ("P-KL decay 0, tail", "prefix KL, tail")
BALANCED = {
    f"{arm}, balanced": {**ARMS[arm], "kd_weight": "balanced"}
    for arm in (*_TAILED, "exact KL", "exact KL, plain sum")
}
# More weight on what comes behind the first piece, where the two losses that have it are equal.
DEEPER = {
    f"{arm}, deeper x{weight:.0f}": {
        **ARMS[arm],
        "trainer": {**ARMS[arm].get("trainer", {}), "depth_weights": [1.0, weight]},
    }
    for weight in (2.0, 4.0)
    for arm in ("exact KL, plain sum", "prefix KL, tail")
}
# Of the teacher's rows the columns from a thousandth on, each, and all others together; or all that
# are stored.
CUT = {
    f"{arm}, from {least:g}": {**settings, "trainer": {**settings["trainer"], "min_prob": least}}
    for arm, settings in (ARMS | DEEPER).items()
    if arm.startswith("exact KL, plain sum")
    for least in (1e-3, 0.0)
}
HEAVY = {f"{arm}, weight 3": {**ARMS[arm], "kd_weight": 3.0} for arm in _TAILED}
ARMS |= BALANCED | HEAVY | DEEPER | CUT
SEEDS = (0, 1, 2)
HELD_OUT, NUMBER_SHARE = 60, 0.4


class Setting(NamedTuple):
    """How much text there is to train on, in passages, and how many of them make a step."""

    passages: int = 260
    batch_size: int = 6


class Unit(NamedTuple):
    """One student to train."""

    arm: str
    seed: int
    steps: int
    setting: Setting = Setting()


# What prefix KL adds to P-KL is looked at with more text (680 passages are all that the number-rich
# part allows for) and with smaller steps, which make more noise.
PAIR = ("P-KL decay 0", "prefix KL")
OTHER_SETTINGS = (Setting(680), Setting(680, 3), Setting(210, 3))


def plan() -> list[Unit]:
    """All units, the most telling ones first."""
    controls = ("prefix KL without END", "P-KL decay 0, weight 3")
    everywhere = [arm for arm in ARMS if arm not in BALANCED | HEAVY | DEEPER | CUT]
    units = [
        *(Unit(arm, seed, 480) for arms in (PAIR, controls) for seed in SEEDS for arm in arms),
        *(Unit(arm, seed, steps) for steps in (480, 160) for arm in everywhere for seed in SEEDS),
        *(Unit(arm, seed, 480) for arm in BALANCED for seed in SEEDS),
        *(Unit(arm, seed, 480) for arm in DEEPER | CUT for seed in SEEDS),
        *(Unit(arm, SEEDS[0], 480) for arm in HEAVY),
        *(Unit(a, s, 480, OTHER_SETTINGS[0]) for a in (*PAIR, *_TAILED) for s in SEEDS),
        *(Unit(a, s, 480, other) for other in OTHER_SETTINGS[1:] for s in SEEDS for a in PAIR),
        *(Unit(a, s, 160, OTHER_SETTINGS[2]) for s in SEEDS for a in PAIR),
    ]
    return list(dict.fromkeys(units))
