"""Checks of arguments: the class that was meant, and numbers inside their range."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Iterable, Iterator
from typing import TypeVar

from xtoken.errors import ArgumentTypeError, FormatError, OptionError

T = TypeVar("T")

# No count is larger; the products of larger factors and squared temperatures leave float32.
_LARGEST_WHOLE = 10**18
_LARGEST = 1e9
_LONGEST_SHOWN = 200


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


def expect_list(
    name: str, items: Iterable[object], cls: type | tuple[type, ...], what: str
) -> None:
    """Refuse what is no sequence of items of these classes; one text is a sequence of texts.

    Args:
        what: the items in words.

    Raises:
        ArgumentTypeError: names it, or the first item of another class.
    """
    if isinstance(items, str | bytes) or not hasattr(items, "__len__"):
        raise ArgumentTypeError(f"{name} is {_kind(items)}, expected a list of {what}; pass [...]")
    for index, item in enumerate(items):
        if not isinstance(item, cls):
            raise ArgumentTypeError(f"{name}[{index}] is {_kind(item)}, expected a list of {what}")


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
    high = _LARGEST_WHOLE if whole else _LARGEST
    if not isinstance(value, kinds) and hasattr(value, "dtype"):
        # One of NumPy or torch has no place in the JSON that settings are kept in.
        asked = "int" if whole else "float"
        raise OptionError(f"{name} = {shown(value)} is {_kind(value)}; pass {asked}(...) of it")
    good = isinstance(value, kinds) and not isinstance(value, bool) and _is_finite(value)
    if not good or not (value > low if inside else value >= low):  # type: ignore[operator]
        joint = "" if rule[0] in ",;" else " "
        raise OptionError(f"{name} = {shown(value)}{joint}{rule}")
    if value > high:  # type: ignore[operator]
        raise OptionError(f"{name} = {value:.3g} is out of range; expected at most {high:.0e}")


def check_flag(name: str, value: object) -> None:
    """Raise OptionError unless a value is True or False."""
    check_choice(name, value, (False, True))


def thread_count(threads: int | None) -> int:
    """A number of threads as the core takes it, where 0 is one per core.

    Raises:
        OptionError: it is no whole number from 1 to 2^31 - 1.
    """
    if threads is None:
        return 0
    rule = "is out of range; expected 1 or more, below 2^31, or None for one per core"
    check_number("threads", threads, 1, rule=rule, whole=True)
    if threads >= 2**31:
        raise OptionError(f"threads = {threads} {rule}")
    return threads


def whole_within(name: str, value: object, low: int, high: int, *, rule: str) -> int:
    """A whole number from `low` to `high`, those of NumPy among them.

    Args:
        rule: the range in words, and the remedy.

    Raises:
        OptionError: it is none, or outside.
    """
    number = _index(value)
    if number is None or not low <= number <= high:
        raise OptionError(f"{name} = {shown(value)} {rule}")
    return number


def token_limit(max_tokens: object, low: int = 2) -> int | None:
    """`max_tokens` of examples, or of sequences from 1 on; None for no limit.

    Raises:
        OptionError: it is no whole number from `low` on.
    """
    if max_tokens is None:
        return None
    why = ", as a first token has no loss" if low == 2 else ""
    rule = f"is out of range; expected a whole number of at least {low}{why}, or None for no limit"
    return whole_within("max_tokens", max_tokens, low, _LARGEST_WHOLE, rule=rule)


def as_whole(name: str, value: object, hint: str) -> int:
    """A whole number, those of NumPy among them.

    Raises:
        ArgumentTypeError: it is none.
    """
    number = _index(value)
    if number is None:
        raise ArgumentTypeError(f"{name} is {_kind(value)}, expected a whole number; {hint}")
    return number


def _index(value: object) -> int | None:
    """A whole number, those of NumPy among them; None for what is none."""
    # Truth values of arrays are whole numbers in some releases.
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return None


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise OptionError unless a value is one of the choices."""
    # An array equals nothing, and 1 is not True.
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        known = ", ".join(map(str, choices))
        raise OptionError(f"{name} = {shown(value)}, expected one of {known}")


def shown(value: object) -> str:
    """A value in one line of a message."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # such as a number of more digits than Python prints
        return f"one {_kind(value)}"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


@contextlib.contextmanager
def panics_refused(what: str) -> Iterator[None]:
    """Turn a panic of the tokenizers library, which no `except Exception` stops, into an error.

    Raises:
        FormatError: it panicked; `what` says on what.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise FormatError(
            f"{what} makes the tokenizers library panic ({str(error)[:200]}); the tokenizer is "
            "damaged: copy it again, or save it anew with tokenizer.save_pretrained"
        ) from error


def half_character(text: str) -> str | None:
    """Say which half of a character a text holds, with the remedy; None for Unicode text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"holds half a character, {text[error.start]!r}, at {error.start}; expected Unicode "
            "text; write whole characters"
        )
    return None
