"""losses/README.md: the loss that it adds works as written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_cases import make_case

import xtoken.losses
from xtoken.losses import LossInputs
from xtoken.tensors import pair_parts

IMPORTS = """
from dataclasses import dataclass

import torch

from xtoken.losses import LossInputs, LossOptions, LossOutput, LossSpec, PairParts
from xtoken.losses.engine.merge import ChunkRows, merge_rows
from xtoken.losses.engine.row_blocks import BlockLoss
from xtoken.losses.engine.run import LossCall, run_loss
from xtoken.losses.engine.teacher_rows import TeacherRows
from xtoken.losses.inputs import DEFAULT_OPTIONS
"""


def test_the_loss_of_the_readme_runs_with_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(xtoken.losses.__file__).parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    lines = [line.removeprefix("   ") for line in "\n".join(blocks).splitlines()]
    made: dict[str, Any] = {"__name__": __name__}
    exec(IMPORTS + "\n".join(lines), made)
    monkeypatch.setitem(pair_parts.PARTS_OF_LOSS, "peak", frozenset())
    case = make_case(0)
    output = made["peak"](
        LossInputs(case.student_logits, case.teacher_logits, case.usable), case.pair
    )
    (grad,) = torch.autograd.grad(output.loss, case.student_logits)
    rows = case.usable.sample, case.usable.student_start - 1
    others = case.usable.sample, case.usable.teacher_start - 1
    sides = (
        case.student_logits[rows][:, : case.v_s].log_softmax(-1).amax(-1),
        case.teacher_logits[others][:, : case.v_t].log_softmax(-1).amax(-1),
    )
    expected = (sides[0] - sides[1]).square().mean()
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, case.student_logits)[0])
