"""The kernels compute what the definitions say: in Triton's interpreter, on the CPU.

The interpreter is chosen when Triton is imported, so the files `interpreted_*.py` run in processes
of their own, each with a share of the tests of all files.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import Forked
from packaging.version import Version

triton = pytest.importorskip("triton")
if Version(triton.__version__) < Version("3.9"):
    pytest.skip("the interpreter of Triton 3.2 fails with today's numpy", allow_module_level=True)

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("interpreted_*.py"))
PARTS = 3

RUN = """
import sys

import fast_interpreter
import pytest

part, parts = map(int, sys.argv[1:3])

class Part:
    def pytest_collection_modifyitems(self, config, items):
        kept = items[part::parts]
        config.hook.pytest_deselected(items=[each for each in items if each not in kept])
        items[:] = kept

# numpy computes the lanes that a mask leaves out too.
options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
sys.exit(pytest.main([*options, *sys.argv[3:]], plugins=[Part()]))
"""


@pytest.mark.parametrize("part", range(PARTS))
def test_interpreted(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)
    variables = {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = Forked(RUN, part, PARTS, *FILES, **variables)
    output, errors = run.communicate(timeout=600)
    assert run.returncode == 0, output + errors
    assert " passed" in output
    assert "skipped" not in output
