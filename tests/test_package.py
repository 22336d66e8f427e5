"""The package as a whole: what importing it costs, and that its version is one."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import xtoken

HEAVY = ("torch", "transformers", "accelerate", "datasets", "matplotlib")


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import xtoken", "import xtoken.cli"])
def test_importing_xtoken_brings_nothing_heavy(statement):
    assert not modules_after(statement) & set(HEAVY)


def test_importing_xtoken_brings_neither_http_nor_locks_nor_encoders():
    """Each is imported by the calls that need it."""
    unwanted = {"urllib.request", "http.client", "filelock", "tokenizers", "packaging"}
    assert not modules_after("import xtoken.cli") & unwanted


def test_the_losses_bring_no_compiler():
    assert not modules_after("import xtoken.losses") & {"torch._dynamo", "torch._inductor"}


def test_the_check_for_heavy_imports_can_fail():
    assert "torch" in modules_after("import torch")


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
