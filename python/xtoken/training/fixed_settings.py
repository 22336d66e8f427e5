"""Settings that a trainer reads once, when it is made, and a checkpoint keeps."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from xtoken._files import read_json, write_json
from xtoken.errors import FormatError, OptionError
from xtoken.training.settings import DistillSettings

SETTINGS_FILE = "distill_settings.json"
# Read in each step, or where training begins.
_LIVE = frozenset(
    {
        *("kd_weight", "fused", "projection_learning_rate", "on_policy_max_new_tokens"),
        *("on_policy_temperature", "on_policy_top_p", "on_policy_prompt_tokens"),
    }
)
# Of a machine or of how it is computed: what is learned is the same.
_HOW = frozenset({"fused", "fused_teacher", "dataset_num_proc", "padding_side", "pad_multiple"})


class FixedSettings(TrainerCallback):
    """Refuses a step after one of the settings was changed that nothing reads again, as a search
    over hyperparameters and callbacks do; and keeps all of them in checkpoints.

    Args:
        settings: as the trainer was made with.
        pairs: fingerprints, one per teacher.
    """

    def __init__(self, settings: DistillSettings, pairs: Sequence[str]) -> None:
        self._settings = settings
        self._pairs = list(pairs)
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

    def keep(self, checkpoint: Path | str) -> None:
        """Write them into a checkpoint."""
        write_json(Path(checkpoint) / SETTINGS_FILE, self._kept())

    def compare(self, folder: Path | str) -> None:
        """Warn where training goes on from a checkpoint with other settings than it has."""
        file = Path(folder) / SETTINGS_FILE
        if not file.is_file():
            return
        try:
            before = read_json(file, "the settings of a checkpoint,")
        except FormatError:
            before = None
        if not isinstance(before, dict):
            warnings.warn(f"{file} is damaged: the settings are not compared", stacklevel=4)
            return
        now = self._kept()
        others = [name for name in now if name in before and before[name] != now[name]]
        if others:
            told = [f"{name} = {now[name]!r} (it has {before[name]!r})" for name in others[:4]]
            warnings.warn(
                f"training goes on from {folder} with {', '.join(told)}"
                f"{' and others' if len(others) > 4 else ''}; leave resume_from_checkpoint out to "
                "begin anew",
                stacklevel=4,
            )

    def _kept(self) -> dict[str, Any]:
        values = {
            each.name: getattr(self._settings, each.name)
            for each in fields(DistillSettings)
            if each.name not in _HOW
        }
        # As JSON gives them back.
        kept: dict[str, Any] = json.loads(json.dumps({**values, "pairs": self._pairs}))
        return kept
