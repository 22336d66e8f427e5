"""The public names: docstrings at run time, signatures without `Any`, one home for errors."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import pickle
import pkgutil
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import xtoken
from xtoken import errors
from xtoken.distillation.options import DistillerOptions
from xtoken.pair import PairOptions

WINGS = (
    *("xtoken", "xtoken.align", "xtoken.audit", "xtoken.data", "xtoken.distillation"),
    *("xtoken.losses", "xtoken.projection", "xtoken.report", "xtoken.teachers", "xtoken.tensors"),
    *("xtoken.training", "xtoken.vocab"),
)


def ours(value: object) -> bool:
    """Whether the package defines an object."""
    return str(getattr(value, "__module__", "")).partition(".")[0] == "xtoken"


def public_objects(module: ModuleType) -> Iterator[tuple[str, object]]:
    """The classes and functions of the package that a module gives to its users."""
    for name in dir(module):  # those too that the package imports at their first use
        value = getattr(module, name)
        if not name.startswith("_") and ours(value) and callable(value):
            yield f"{module.__name__}.{name}", value


def members(cls: type) -> Iterator[tuple[str, object]]:
    """What a class of the package adds itself: methods and properties."""
    for name, value in vars(cls).items():
        if not name.startswith("_"):
            inner = value.__func__ if isinstance(value, staticmethod | classmethod) else value
            described = inspect.isroutine(inner) or inspect.isdatadescriptor(inner)
            if described or hasattr(inner, "func"):  # cached_property
                yield name, inner


def documented() -> dict[str, object]:
    found: dict[str, object] = {}
    for wing in WINGS:
        for name, value in public_objects(importlib.import_module(wing)):
            found[name] = value
            if inspect.isclass(value):
                # What replaces another library's method has its docstring there.
                foreign = [base for base in value.__mro__[1:] if not ours(base)]
                if (
                    value.__name__ == "DistillMixin"
                ):  # over any Trainer, whose methods take anything
                    foreign.append(importlib.import_module("transformers").Trainer)
                found |= {
                    f"{name}.{inner}": item
                    for inner, item in members(value)
                    if not any(hasattr(base, inner) for base in foreign)
                }
    return found


def test_every_public_name_has_a_docstring_at_run_time() -> None:
    lacking = {
        name
        for name, value in documented().items()
        if not str(getattr(value, "__doc__", None) or "").strip()
    }
    assert not lacking, sorted(lacking)


def test_every_module_says_what_is_in_it() -> None:
    for module in pkgutil.walk_packages(xtoken.__path__, "xtoken."):
        if module.name != "xtoken._core":
            assert importlib.import_module(module.name).__doc__, module.name


def test_no_public_signature_takes_anything() -> None:
    found = set()
    for name, value in documented().items():
        target = getattr(value, "fget", None) or getattr(value, "func", None) or value
        if inspect.isfunction(target):
            words = re.findall(r"\w+", " ".join(map(str, target.__annotations__.values())))
            if "Any" in words:
                found.add((target.__module__, name))
    assert not found, sorted(found)


OPTIONS = {cls.__name__: cls for cls in (DistillerOptions, PairOptions)}


def named_arguments(docstring: str) -> set[str]:
    """The names in the section `Args:`; a line may have several."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", f"{docstring}\n", re.MULTILINE)
    lines = re.findall(r"^    (\w.*?):", section[1] if section else "", re.MULTILINE)
    return {name for line in lines for name in re.findall(r"\w+", line)}


def arguments(value: object) -> set[str]:
    """What a call takes, with the keys of a typed `**options`."""
    assert callable(value)
    found: set[str] = set()
    for name, each in inspect.signature(value).parameters.items():
        unpacked = re.fullmatch(r"Unpack\[(\w+)\]", str(each.annotation))
        found |= set(OPTIONS[unpacked[1]].__annotations__) if unpacked else set()
        found.add(name)
    return found


def test_arguments_that_a_docstring_names_are_those_of_the_call() -> None:
    found, checked = set(), 0
    for name, value in documented().items():
        if inspect.isfunction(value) or inspect.isclass(value):
            named = named_arguments(inspect.getdoc(value) or "")
            checked += len(named)
            if named and (strange := named - arguments(value)):
                found.add((name, *sorted(strange)))
    assert not found, sorted(found)
    assert checked > 300


def test_names_of_arguments_are_read_from_a_line_of_several() -> None:
    text = "Adds.\n\nArgs:\n    a, b: numbers: whole\n        or not.\n    c: more.\n\nReturns: d."
    assert named_arguments(text) == {"a", "b", "c"}
    assert arguments(named_arguments) == {"docstring"}


@pytest.mark.parametrize("module", sorted(
    module.name for module in pkgutil.walk_packages(xtoken.__path__, "xtoken.")
    if module.name != "xtoken._core"
))  # fmt: skip
def test_error_classes_are_defined_in_errors_alone(module: str) -> None:
    for name, value in vars(importlib.import_module(module)).items():
        if inspect.isclass(value) and issubclass(value, BaseException):
            own = value.__module__ == module and module != "xtoken.errors"
            assert not own, f"{module}.{name} belongs into xtoken/errors.py"


def test_every_error_is_ours_and_the_builtin_that_users_expect() -> None:
    expected = {
        "ArgumentTypeError": TypeError,
        "MissingFileError": FileNotFoundError,
        "MissingExtraError": ImportError,
        "OptionError": ValueError,
        "NonFiniteError": ValueError,
        "BackwardError": RuntimeError,
    }
    classes = {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value)
        and issubclass(value, Exception)
        and not issubclass(value, Warning)
    }
    assert set(expected) <= set(classes)
    for name, value in classes.items():
        assert issubclass(value, errors.XTokenError), name
        assert issubclass(value, expected.get(name, errors.XTokenError)), name
        assert name.endswith("Error")
        assert name not in vars(builtins)
        assert name in dir(xtoken) or name in (
            "DamagedStoreError", "ForeignFileError", "InterruptedRunError",
            "RefusedRequestError", "UnavailableServerError", "FailedWriteError", "HeldLockError",
            "NoLockError",
        ), f"{name} is not exported"  # fmt: skip


# What Python's own protocols ask for: an index of a sequence, a method of an abstract class.
PROTOCOL_ERRORS = {"IndexError", "NotImplementedError"}


def raised_builtins(source: str) -> list[str]:
    """The builtin errors that a module raises itself."""
    names = []
    tree = ast.parse(source)
    # Python asks `__getattr__` for this one, and nothing else.
    asked = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            call = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = call.id if isinstance(call, ast.Name) else ""
            known = getattr(builtins, name, None)
            if name == "AttributeError" and id(node) in asked:
                continue
            if inspect.isclass(known) and issubclass(known, Exception):
                names.append(name)
    return names


def caught_at_once(source: str) -> bool:
    """Whether a module turns what it raises into an error of ours, as parsers do."""
    return "except (" in source or "except ValueError" in source


def test_every_error_comes_through_a_process_boundary() -> None:
    found = [each for each in vars(errors).values() if isinstance(each, type)]
    for cls in (each for each in found if issubclass(each, errors.XTokenError)):
        given = {"signal": signal.SIGTERM, "status": 400, "reason": "why"}
        # Those without one of their own have a message alone.
        own = inspect.signature(vars(cls)["__init__"]).parameters if "__init__" in vars(cls) else ()
        more = [name for name in given if name in own]
        error = cls("a line", *(given[name] for name in more))
        back = pickle.loads(pickle.dumps(error))
        assert (type(back), str(back)) == (cls, "a line")
        assert all(getattr(back, name) == given[name] for name in more)


def test_an_attribute_error_is_for_the_lookup_of_attributes_alone() -> None:
    code = "def {name}(name):\n    raise {error}(name)"
    assert not raised_builtins(code.format(name="__getattr__", error="AttributeError"))
    assert raised_builtins(code.format(name="__getattr__", error="KeyError")) == ["KeyError"]
    assert raised_builtins(code.format(name="get", error="AttributeError")) == ["AttributeError"]


def test_modules_raise_our_errors() -> None:
    for file in sorted(Path(xtoken.__file__).parent.rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        found = set(raised_builtins(source)) - PROTOCOL_ERRORS
        if caught_at_once(source):
            found -= {"ValueError"}
        assert not found, f"{file.name} raises {sorted(found)}; use a class of xtoken.errors"


def test_the_search_for_builtin_errors_finds_one() -> None:
    assert raised_builtins("raise TypeError('x')") == ["TypeError"]
