"""Checks of arguments: the class that was meant, and numbers inside their range."""

from __future__ import annotations

import math
from typing import TypeVar

from xtoken.errors import ArgumentTypeError, OptionError

T = TypeVar("T")


def expect(value: object, cls: type[T] | tuple[type[T], ...], name: str, hint: str) -> T:
    """The value, where it is of the class meant.

    Args:
        hint: the call that makes what was meant.

    Raises:
        ArgumentTypeError: it is of another class.
    """
    if isinstance(value, cls):
        return value
    classes = cls if isinstance(cls, tuple) else (cls,)
    wanted = " or ".join(one.__name__ for one in classes)
    raise ArgumentTypeError(f"{name} is {_kind(value)}, expected {wanted}; {hint}")


def _kind(value: object) -> str:
    """`numpy.ndarray`, `list`, `xtoken.Vocab`: a class as its users write it."""
    cls = type(value)
    package = cls.__module__.split(".")[0]
    return cls.__name__ if package == "builtins" else f"{package}.{cls.__name__}"


def check_number(
    name: str, value: object, low: float, *, inside: bool = False, rule: str, whole: bool = False
) -> None:
    """Raise OptionError unless a value is a finite number from `low` on.

    Args:
        inside: `low` itself is refused.
        rule: the range in words, and the remedy.
        whole: only an int is one.
    """
    kinds = int if whole else (int, float)
    good = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not (value > low if inside else value >= low):  # type: ignore[operator]
        raise OptionError(f"{name} = {value!r} {rule}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise OptionError unless a value is one of the choices."""
    if not any(value is choice or value == choice for choice in choices):
        raise OptionError(f"{name} = {value!r}, expected one of {', '.join(map(str, choices))}")
