"""A pass of a Trainer's own loss that leaves what the Trainer counts as it was."""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor

# Lists of rows may be plain too, and are too long to copy in each step.
_DATA = ("train_dataset", "eval_dataset")


@contextlib.contextmanager
def counts_kept(trainer: object) -> Iterator[None]:
    """Undo what the block adds to the numbers, lists and dicts that a Trainer keeps.

    TRL's trainers collect metrics and count tokens in `compute_loss`; what is computed twice must
    not be logged twice.
    """
    own = vars(trainer)
    kept = {name: value for name, value in own.items() if name not in _DATA and _is_count(value)}
    own.update(copy.deepcopy(kept))
    try:
        yield
    finally:
        own.update(kept)


def _is_count(value: Any) -> bool:
    # A flag, such as of a warning that was given, stays as the block left it.
    if isinstance(value, dict | list | tuple | deque):
        return _is_plain(value)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(each) for each in value.values())
    if isinstance(value, list | tuple | deque):
        return all(_is_plain(each) for each in value)
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.requires_grad
    return value is None or isinstance(value, int | float)
