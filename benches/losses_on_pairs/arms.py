"""The arms of the experiment: what each trains on, and in which order they are run."""

from __future__ import annotations

from typing import Any, NamedTuple

# All arms have cross-entropy at weight 1 but where they say otherwise; the teacher's loss is at
# weight 1, not balanced: that would make losses of different size equal, and hide what size does.
COMMON: dict[str, Any] = {"ce_weight": 1.0}
TEACHER_TOP_K = 512

_TAIL: dict[str, Any] = {"top_k": TEACHER_TOP_K, "tail_bucket": "auto"}
# Depths weighed by their parents' mass, but where an arm says otherwise.
_CHAIN: dict[str, Any] = {"chain_rule": True}
ARMS: dict[str, dict[str, Any]] = {
    "CE": {"loss": "ce"},
    "ULD": {"loss": "uld"},
    "GOLD": {"loss": "gold"},
    "H-KL": {"loss": "h-kl"},
    "ALM": {"loss": "alm"},
    "P-KL": {"loss": "p-kl", "top_k": TEACHER_TOP_K},
    "P-KL, tail": {"loss": "p-kl", **_TAIL},
    "prefix KL, tail": {"loss": "prefix-kl", **_TAIL},
    "exact KL": {"loss": "exact-kl", **_CHAIN},
    "exact KL, cells alone": {"loss": "exact-kl", **_CHAIN, "consistent": False, "carry_levels": 0},
    "exact KL without carry": {"loss": "exact-kl", **_CHAIN, "carry_levels": 0},
    "exact KL, carry of 8 levels": {"loss": "exact-kl", **_CHAIN, "carry_levels": 8},
    "exact KL, sure places": {"loss": "exact-kl", **_CHAIN, "sure": True},
    "exact KL, depth 0 alone": {"loss": "exact-kl", **_CHAIN, "max_depth": 0},
    "exact KL, plain sum": {"loss": "exact-kl", "chain_rule": False},
    "BPM": {"loss": "bpm"},
    "ESCD": {"loss": "escd"},
    "partition KL": {"loss": "partition-kl"},
    "strict top-k": {"loss": "strict-top-k"},
}
_WEIGHTED = (
    "exact KL",
    "exact KL, plain sum",
    "P-KL",
    "P-KL, tail",
    "prefix KL, tail",
    "BPM",
    "ESCD",
    "partition KL",
    "strict top-k",
)
ARMS |= {
    f"{arm}, weight {weight:g}": {**ARMS[arm], "kd_weight": weight}
    for arm in _WEIGHTED
    for weight in (0.3, 3.0)
}
# Twice the weight on what comes behind the first piece; see `benches.uncommon_tokens`.
ARMS["exact KL, deeper x2, weight 0.3"] = {
    **ARMS["exact KL, plain sum, weight 0.3"],
    "depth_weights": (1.0, 2.0),
}
# Of the teacher's rows the columns from a thousandth on, each, and all others together.
ARMS["exact KL, from 0.001, weight 0.3"] = {
    **ARMS["exact KL, plain sum, weight 0.3"],
    "min_prob": 1e-3,
}
ARMS |= {f"{arm} without CE": {**ARMS[arm], "ce_weight": 0.0} for arm in _WEIGHTED}


class Setting(NamedTuple):
    """How a student is trained: on how much text, and how fast."""

    steps: int = 30
    batch_size: int = 2
    learning_rate: float = 2e-4


class Unit(NamedTuple):
    """One student to train."""

    arm: str
    text: str
    seed: int = 0
    setting: Setting = Setting()


TEXTS = ("wesnoth-de", "wesnoth-ru")
# The text on which a model learns its new tokenizer from itself.
TRANSFER = "mixed"
SEEDS = (0, 1, 2)
FIRST = ("CE", "exact KL", "P-KL", "prefix KL, tail")
SECOND = (
    "exact KL, weight 3",
    "BPM",
    "ESCD",
    "partition KL",
    "strict top-k",
    "P-KL, tail",
    "exact KL, plain sum",
    "exact KL, cells alone",
    "exact KL, depth 0 alone",
)
# Each side at its own best learning rate: what is weak alone is easily helped.
RATES = (1e-4, 5e-4, 1e-3)
RATED = ("CE", "exact KL", "exact KL, weight 0.3")
# Whether what a loss gains beside cross-entropy grows with the text that is read.
LONGER = Setting(steps=120)
READ_LONGER = ("CE", "exact KL, plain sum, weight 0.3", "exact KL, plain sum", "ESCD, weight 0.3")


def plan() -> list[Unit]:
    """All units, the most telling ones first."""
    units = [
        *(Unit(arm, text) for text in TEXTS for arm in FIRST),
        *(Unit(arm, text) for text in TEXTS for arm in SECOND),
        *(
            Unit(arm, text, 0, Setting(learning_rate=rate))
            for rate in RATES
            for text in TEXTS
            for arm in RATED
        ),
        *(Unit(arm, text, 0, LONGER) for text in TEXTS for arm in READ_LONGER),
        *(Unit(arm, TRANSFER) for arm in FIRST),
        *(Unit(arm, text, seed) for seed in SEEDS for arm in FIRST for text in TEXTS),
        *(Unit(arm, text) for arm in ARMS for text in TEXTS),
        *(Unit(arm, text, seed) for arm in ARMS for seed in SEEDS for text in (*TEXTS, TRANSFER)),
    ]
    return list(dict.fromkeys(units))
