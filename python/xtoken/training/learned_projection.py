"""A learnable W in a Trainer: its group in the optimizer, its files, its part in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from xtoken.errors import OptionError
from xtoken.projection import Projection
from xtoken.training.settings import DistillSettings
from xtoken.training.teaching import Teaching

PROJECTION_FILE = "projection.safetensors"
_PARAMETERS_FILE = "learned_projection.pt"

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class LearnsProjection(_Base):
    """The part of `DistillMixin` that trains the weights of W with the student."""

    teaching: Teaching
    distill_settings: DistillSettings

    def _learned(self) -> list[nn.Parameter]:
        return [each for each in self.teaching.parameters() if each.requires_grad]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's own, with a group of the weights of W where they are learned."""
        optimizer = (
            super().create_optimizer(model) if model is not None else (super().create_optimizer())
        )
        held = {id(each) for group in optimizer.param_groups for each in group["params"]}
        learned = [each for each in self._learned() if id(each) not in held]
        if learned and self.lr_scheduler is not None:
            raise OptionError(
                "learnable_projection = True adds a group to the optimizer, which the scheduler in "
                "optimizers does not know; pass (optimizer, None)"
            )
        if learned:
            optimizer.add_param_group(
                {
                    "params": learned,
                    "lr": self.distill_settings.projection_learning_rate,
                    "weight_decay": 0.0,
                }
            )
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self._learned():
            self.save_projections(output_dir or str(self.args.output_dir))

    def save_projections(self, folder: Path | str) -> None:
        """Write each teacher's W as it was learned: `projection.safetensors`, with a number from
        the second teacher on, and the parameters behind it, from which training resumes."""
        for index in range(len(self.teaching.members)):
            self.learned_projection(index).save(Path(folder) / projection_file(index))
        torch.save([each.detach().cpu() for each in self._learned()], _parameters(folder))

    def learned_projection(self, teacher: int = 0) -> Projection:
        """W of a teacher with the weights that were learned, or as it was built."""
        member = self.teaching.members[teacher]
        projection = member.parts.projection if member.spec is not None else None
        if projection is None or not any(True for _ in projection.parameters()):
            return member.pair.projection
        return projection.to_projection(member.pair.projection)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_projections(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_projections(str(self.state.best_model_checkpoint))

    def _load_projections(self, folder: str) -> None:
        path = _parameters(folder)
        if self._learned() and path.is_file():
            with torch.no_grad():
                for each, saved in zip(
                    self._learned(), torch.load(path, weights_only=True), strict=True
                ):
                    each.copy_(saved)


def projection_file(teacher: int) -> str:
    """The name of the file with the W of a teacher, counted from 0."""
    return PROJECTION_FILE if teacher == 0 else f"projection-{teacher}.safetensors"


def _parameters(folder: Path | str) -> Path:
    return Path(folder) / _PARAMETERS_FILE


class KeepProjection(TrainerCallback):
    """What the Trainer does to the model's gradients alone, done to those of W."""

    def __init__(self, trainer: LearnsProjection) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Average over the processes."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        for each in self._trainer._learned():
            if each.grad is not None:
                dist.all_reduce(each.grad)
                each.grad /= dist.get_world_size()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Forget the gradients of this step."""
        for each in self._trainer._learned():
            each.grad = None
