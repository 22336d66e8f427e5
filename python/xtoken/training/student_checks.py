"""Whether a student can be trained on next tokens, and on rows as they are padded or packed."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from xtoken.errors import OptionError
from xtoken.teachers.model_head import bare_model
from xtoken.teachers.probe import check_causal, check_kind, mixes_documents, spoilt_by_left_padding


def check_student(student: nn.Module, *, whole: bool) -> None:
    """Refuse a student whose logits are not predictions of the next token.

    Args:
        whole: whether a forward pass outside of the step is one of this process alone.

    Raises:
        ModelSourceError, OptionError: as `check_causal`; of one that is not whole by its config
            alone.
    """
    check_kind(student, "student")
    if whole:
        check_causal(student, "student")


def check_left_padding(student: nn.Module) -> None:
    """Refuse rows padded on the left where the student has other logits of them.

    Raises:
        OptionError: names the student.
    """
    if spoilt_by_left_padding(student):
        raise OptionError(
            f"padding_side = 'left', but the student {_name(student)} has other logits behind "
            "padding than for the row alone; set padding_side = 'right'"
        )


def warn_of_rows(student: nn.Module, inputs: dict[str, Any]) -> None:
    """Say it where rows that another collator made are not what the student reads.

    Args:
        inputs: of the student, the first of a training.
    """
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    said = None
    if mask is not None and mask.dim() == 2 and not bool(mask[:, 0].all()):
        if spoilt_by_left_padding(student, positions=positions is not None):
            said = "has other logits of rows padded on the left; have the collator pad on the right"
    elif mask is None and positions is not None and int((positions == 0).sum()) > len(positions):
        if mixes_documents(student):
            said = "reads the documents of a packed row together; set packing = False"
    if said is not None:
        warnings.warn(f"the student {_name(student)} {said}", stacklevel=2)


def _name(student: nn.Module) -> str:
    return type(bare_model(student)).__name__
