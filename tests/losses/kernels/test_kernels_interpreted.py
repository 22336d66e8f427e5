"""The kernels compute what the definitions say: in Triton's interpreter, on the CPU.

The interpreter is chosen when Triton is imported, so each file runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

triton = pytest.importorskip("triton")
if Version(triton.__version__) < Version("3.9"):
    pytest.skip("the interpreter of Triton 3.2 fails with today's numpy", allow_module_level=True)

HERE = Path(__file__).parent


@pytest.mark.parametrize("file", sorted(each.stem for each in HERE.glob("interpreted_*.py")))
def test_interpreted(file: str) -> None:
    tests = HERE.parents[1]
    path = os.pathsep.join([str(tests), str(HERE), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
            # numpy computes the lanes that a mask leaves out too.
            "-W", "ignore::RuntimeWarning", str(HERE / f"{file}.py"),
        ],
        cwd=tests.parent, env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
