"""The package as a whole: what importing it costs, and that its version is one."""

from __future__ import annotations

import ast
import functools
import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import xtoken

HEAVY = ("torch", "transformers", "accelerate", "datasets", "matplotlib")


def modules_after(statement: str) -> set[str]:
    return modules_after_each(statement)[0]


@functools.cache
def modules_after_each(*statements: str) -> list[set[str]]:
    """What is there after the first, after the second too, and so on: torch is read once."""
    code = "import sys\n" + "".join(f"{each}\nprint(*sys.modules)\n" for each in statements)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in done.stdout.splitlines()]


OF_TORCH = ("import torch", "import xtoken.losses", "import xtoken.teachers.served")


@pytest.mark.parametrize("statement", ["import xtoken", "import xtoken.cli"])
def test_importing_xtoken_brings_nothing_heavy(statement):
    assert not modules_after(statement) & set(HEAVY)


def test_importing_xtoken_and_listing_its_commands_brings_no_numpy_and_no_command() -> None:
    listing = "import sys; from typer.testing import CliRunner; from xtoken.cli import app\n"
    listing += "assert CliRunner().invoke(app, ['--help']).exit_code == 0"
    found = modules_after("import xtoken") | modules_after(listing)
    assert not found & {"numpy", "xtoken.pair", "xtoken.cli.vocab"}, found


def test_names_of_the_package_are_those_that_type_checkers_see() -> None:
    tree = ast.parse(Path(xtoken.__file__).read_text())
    seen = {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("xtoken.")
        for alias in node.names
    }
    assert set(seen) <= set(dir(xtoken))
    for name, home in seen.items():
        assert getattr(xtoken, name) is getattr(importlib.import_module(home), name), name
    assert set(xtoken._NAMES) <= set(seen)
    with pytest.raises(AttributeError, match="no attribute 'Piar'"):
        _ = xtoken.Piar


def test_modules_of_the_package_are_attributes_of_it() -> None:
    code = "import xtoken; print(xtoken.align.Aligner, xtoken.targets, xtoken.errors.XTokenError)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_xtoken_brings_neither_http_nor_locks_nor_encoders():
    """Each is imported by the calls that need it."""
    unwanted = {"urllib.request", "http.client", "filelock", "tokenizers", "packaging"}
    assert not modules_after("import xtoken.cli") & unwanted


def test_the_losses_bring_no_compiler():
    _, losses, _ = modules_after_each(*OF_TORCH)
    assert "xtoken.losses" in losses
    assert not losses & {"torch._dynamo", "torch._inductor"}


def test_the_client_of_a_served_teacher_brings_no_http_library():
    *_, client = modules_after_each(*OF_TORCH)
    assert "xtoken.teachers.served.client" in client
    assert "httpx2" not in client


def test_the_check_for_heavy_imports_can_fail():
    torch, *_ = modules_after_each(*OF_TORCH)
    assert set(HEAVY) & torch == {"torch"}


def test_the_core_and_the_package_have_one_version():
    assert xtoken.__version__ == version("xtoken")


def test_the_command_explains_itself_and_gives_its_version():
    run = lambda *args: subprocess.run(  # noqa: E731
        [sys.executable, "-c", "from xtoken.cli import main; main()", *args],
        capture_output=True,
        text=True,
    )
    assert run("--version").stdout == f"xtoken {xtoken.__version__}\n"
    assert "tokenizer is different" in run("--help").stdout


def test_no_wing_imports_from_the_package_itself():
    """The import contract in pyproject.toml cannot see through the root."""
    root = Path(xtoken.__file__).parent
    found = {
        f"{path.relative_to(root)}:{node.lineno}"
        for path in root.rglob("*.py")
        if path != root / "__init__.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        and node.module == "xtoken"
        and {alias.name for alias in node.names} - {"_core", "__version__"}
    }
    assert not found
