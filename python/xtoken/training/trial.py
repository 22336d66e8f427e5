"""What a run would refuse later, refused before anything is predicted, trained or written."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from xtoken.data.examples import Example, fit_example
from xtoken.data.loss_mask import is_predicted
from xtoken.distillation import Distiller, DistillLossName
from xtoken.errors import OptionError
from xtoken.losses.kernels.choice import forced, mode
from xtoken.teachers import TeacherSource, TopKStore
from xtoken.tensors.teacher_signal import Teacher, TeacherTopK
from xtoken.training.config import DistillConfig
from xtoken.training.prepare import PreparedData
from xtoken.training.processes import process_count
from xtoken.training.run import taught_by
from xtoken.training.settings import DistillSettings
from xtoken.training.teaching import teach

# Tokens of a text: enough for chunks of all kinds, and little beside a vocabulary.
_TOKENS = 24


def check_run(
    materials: PreparedData, config: DistillConfig, losses: Sequence[DistillLossName]
) -> None:
    """Refuse settings that do not go with these texts, or with each other under a loss.

    Each loss is made as its trainer will make it, and tried on a part of one text with predictions
    of the teachers' kind, drawn at random.

    Args:
        losses: that are trained one after another.

    Raises:
        OptionError, PairError: as `train`.
    """
    check_batches(materials, config)
    columns = [_columns(each, config) for each in materials.teachers]
    mode()  # of the kernels, for which the CPU is no place
    with warnings.catch_warnings(), forced("torch"):
        warnings.simplefilter("ignore")  # the run has its own
        for loss in losses:
            try:
                _try_loss(materials, config.with_loss(loss), columns)
            except OptionError as error:
                if loss == config.loss:
                    raise
                raise OptionError(f"{loss}, which is trained too: {error}") from error


def check_batches(materials: PreparedData, config: DistillConfig) -> None:
    """Refuse to leave out the last batch where there is no other."""
    rows, batch = len(materials.train), config.batch_size * process_count()
    if config.trainer.get("dataloader_drop_last") and materials.stream is None and rows < batch:
        several = f" in each of {process_count()} processes" if process_count() > 1 else ""
        raise OptionError(
            f"dataloader_drop_last = True with batch_size = {config.batch_size}{several} leaves "
            f"nothing of {rows:,} training examples to train on; lower batch_size, or leave it out"
        )


class _Untaught:
    """Stands in for a source that is not loaded yet."""

    def signal(self, *_: Any) -> Any:
        """Never asked."""
        raise NotImplementedError


def _try_loss(
    materials: PreparedData, config: DistillConfig, columns: Sequence[int | None]
) -> None:
    names = {each.name for each in fields(DistillSettings)}
    values: dict[str, Any] = {**config.settings(), **config.trainer}
    settings = DistillSettings(**{name: each for name, each in values.items() if name in names})
    sources: list[TeacherSource | None] = [_Untaught() for _ in materials.teachers]
    given = taught_by(materials, config, sources)
    teaching = teach(given, materials.pair, settings, torch.device("cpu"))
    # Cross-entropy alone has one member, of no teacher.
    for member, each, kept in zip(teaching.members, materials.teachers, columns, strict=False):
        example = _example(each)
        if example is not None and member.needs_teacher:
            member.options = replace(member.options, compiled=False)  # compiling takes its time
            _try_member(member, example, kept)


def _example(materials: PreparedData) -> Example | None:
    """The beginning of a short text."""
    taught = (each for each in materials.train.examples if is_predicted(each.teacher_loss_mask))
    for each in sorted(taught, key=lambda each: abs(len(each.teacher_ids) - _TOKENS))[:8]:
        for (cut,) in fit_example(each, materials.pair.aligner, _TOKENS).examples:
            if is_predicted(cut.teacher_loss_mask):
                return cut
    return None


def _columns(materials: PreparedData, config: DistillConfig) -> int | None:
    """The teacher's columns that are stored or asked for; None where all are read."""
    if materials.models.store is None:
        return config.teacher_top_k
    key = TopKStore.open(materials.models.store).key
    return None if key.is_spread else key.top_k


@torch.no_grad()
def _try_member(member: Distiller, example: Example, columns: int | None) -> None:
    batch = member.prepared(member.collator([example]))
    draw = torch.Generator().manual_seed(0)  # the run has its own random numbers
    sizes = zip((batch.student_ids, batch.teacher_ids), member.pair.sizes, strict=True)
    student, teacher = (torch.randn(*ids.shape, size, generator=draw) for ids, size in sizes)
    signal: Teacher = teacher
    if columns is not None:
        signal = TeacherTopK.from_logits(teacher, columns, ids=batch.teacher_ids)
    member(student, signal, batch)
