"""The teachers that options name, one or several: where each is, its store, weight and loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from xtoken.distillation import DistillLossName
from xtoken.distillation.options import LOSS_NAMES
from xtoken.errors import OptionError
from xtoken.training.models import ModelPair, ServedSource, load_models


@dataclass(frozen=True)
class TeacherOption:
    """A teacher as it was named.

    Attributes:
        source: directory or hub name; None takes the tokenizer in the store.
        weight: after the last `=`.
        store: folder of its predictions, in place of its weights.
        loss: its own; None for that of the run.
        served: a server that runs it, in place of its weights.
    """

    source: str | None
    weight: float = 1.0
    store: Path | None = None
    loss: DistillLossName | None = None
    served: ServedSource | None = None


def parse_teachers(
    sources: Sequence[str],
    stores: Sequence[Path] = (),
    losses: Sequence[str] = (),
    served: Sequence[ServedSource] = (),
) -> list[TeacherOption]:
    """The teachers of `--teacher A --teacher B=0.8`.

    Args:
        sources: a directory or hub name each, with `=WEIGHT` or without.
        stores: one per teacher; without any teacher, each is one.
        losses: one per teacher, or none.
        served: the server of each teacher, or none.

    Raises:
        OptionError: there is no teacher, a weight or a loss is none, or they are not as many.
    """
    if stores and sources and len(stores) != len(sources):
        raise OptionError(
            f"{len(stores)} --teacher-store and {len(sources)} --teacher; pass a store for each "
            "teacher, or stores alone, which hold their tokenizers"
        )
    if served and stores:
        raise OptionError(
            f"--teacher-url {served[0].address} and --teacher-store {stores[0]}; pass one of them: "
            "xtoken teach --url stores what a server says"
        )
    if served and len(served) != len(sources):
        raise OptionError(
            f"{len(served)} --teacher-url and {len(sources)} --teacher; pass --teacher for each, a "
            "directory with the tokenizer of the model that is served"
        )
    found = [_weighted(source) for source in sources]
    if not found:
        found = [TeacherOption(None) for _ in stores]
    if not found:
        raise OptionError(
            "no teacher was given; pass --teacher, a directory by save_pretrained or a hub name, "
            "or --teacher-store, a folder that xtoken teach filled"
        )
    if losses and len(losses) != len(found):
        raise OptionError(
            f"{len(losses)} --teacher-loss for {len(found)} teachers; pass one for each, in their "
            "order, or --loss for all"
        )
    for loss in losses:
        if loss not in LOSS_NAMES:
            raise OptionError(f"--teacher-loss {loss}, expected one of {', '.join(LOSS_NAMES)}")
    return [
        replace(
            each,
            store=stores[at] if stores else None,
            served=served[at] if served else None,
            loss=cast(DistillLossName, losses[at]) if losses else None,
        )
        for at, each in enumerate(found)
    ]


def _weighted(text: str) -> TeacherOption:
    source, mark, number = text.rpartition("=")
    if not mark:
        return TeacherOption(text)
    try:
        weight = float(number)
    except ValueError:
        raise OptionError(f"--teacher {text}, expected a number after '='; 1 is the default") from (
            None
        )
    if not 0 <= weight < math.inf:
        raise OptionError(f"--teacher {text}, expected a weight of at least 0")
    return TeacherOption(source, weight)


def load_teachers(student: str, teachers: Sequence[TeacherOption]) -> list[ModelPair]:
    """The student with each teacher; see `load_models`."""
    return [
        replace(
            load_models(student, each.source, store=each.store, served=each.served),
            weight=each.weight,
            loss=each.loss,
        )
        for each in teachers
    ]
