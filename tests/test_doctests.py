"""The examples in the docstrings run as printed."""

from __future__ import annotations

import doctest
import importlib
import linecache
import pkgutil
from types import ModuleType

import pytest

import xtoken


def modules() -> list[str]:
    found = pkgutil.walk_packages(xtoken.__path__, "xtoken.")
    return ["xtoken", *(module.name for module in found)]


def run(module: ModuleType) -> doctest.TestResults:
    # doctest looks once a docstring whether any file of which a line was ever shown has changed.
    linecache.clearcache()
    return doctest.testmod(
        module, optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL, verbose=False
    )


@pytest.mark.parametrize("name", modules())
def test_the_examples_of_a_module_run_as_printed(name: str) -> None:
    assert run(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize(
    "name",
    ["xtoken.pair", "xtoken.distillation.distiller", "xtoken.losses.inputs"],
)
def test_the_door_has_examples(name: str) -> None:
    assert run(importlib.import_module(name)).attempted > 0


def test_an_example_that_is_wrong_fails() -> None:
    wrong = ModuleType("wrong", ">>> 1 + 1\n3\n")
    assert run(wrong).failed == 1
