"""Settings that a trainer reads once, when it is made."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from xtoken.errors import OptionError
from xtoken.training.settings import DistillSettings

# Read in each step, or where training begins.
_LIVE = frozenset(
    {
        *("kd_weight", "fused", "projection_learning_rate", "on_policy_max_new_tokens"),
        *("on_policy_temperature", "on_policy_top_p", "on_policy_prompt_tokens"),
    }
)


class FixedSettings(TrainerCallback):
    """Refuses a step after one of the settings was changed that nothing reads again, as a search
    over hyperparameters and callbacks do.

    Args:
        settings: as the trainer was made with.
    """

    def __init__(self, settings: DistillSettings) -> None:
        self._settings = settings
        names = [each.name for each in fields(DistillSettings) if each.name not in _LIVE]
        self._made = {name: copy.deepcopy(getattr(settings, name)) for name in names}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Raise OptionError, which names the setting."""
        for name, made in self._made.items():
            now = getattr(self._settings, name)
            if now != made:
                raise OptionError(
                    f"{name} = {now!r} was set after the trainer was made with {made!r}, and "
                    "nothing reads it again; make another trainer"
                )
