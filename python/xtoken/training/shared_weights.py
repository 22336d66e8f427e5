"""A live teacher that holds the student's own parameters, and so would not stay what it is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributed.tensor import DTensor

from xtoken.errors import OptionError
from xtoken.teachers import LiveTeacher, TeacherSource
from xtoken.teachers.model_head import bare_model


def check_teachers_apart(sources: Sequence[TeacherSource | None], student: nn.Module) -> None:
    """Refuse a `LiveTeacher` that shares parameters with the student.

    A teacher may share the frozen weights under the student's adapters, where it has none itself.

    Args:
        sources: of the teachers; others than live ones are not looked into.
        student: as it is trained, with its adapters.

    Raises:
        OptionError: the teacher would learn with the student, or the student is frozen with it.
    """
    own: dict[int, nn.Parameter] = {}
    for parameter in student.parameters():
        own |= dict.fromkeys(_places(parameter), parameter)
    trains = any(parameter.requires_grad for parameter in student.parameters())
    for source in sources:
        if not isinstance(source, LiveTeacher):
            continue
        shared = [
            own[found[0]]
            for parameter in source.model.parameters()
            if (found := [place for place in _places(parameter) if place in own])
        ]
        moves = any(parameter.requires_grad for parameter in shared)
        adapters = hasattr(student, "peft_config") and trains
        if shared and (moves or not adapters):
            raise OptionError(
                f"the teacher {type(bare_model(source.model)).__name__} holds {len(shared)} "
                "parameters of the student itself, which would be frozen with it, or put its "
                "adapters into it; pass the teacher's directory or name, or copy.deepcopy(model)"
            )


def _places(parameter: nn.Parameter) -> list[int]:
    # Weights that were cut over processes, or are not there yet, have no address of their own.
    if isinstance(parameter, DTensor) or parameter.is_meta or parameter.numel() == 0:
        return [id(parameter)]
    return [id(parameter), parameter.untyped_storage().data_ptr()]
