"""torch.compile: the losses are traced whole, without a graph break."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from loss_cases import every_loss, make_case

from xtoken.losses import LossOutput

LOSSES = every_loss()
# These first make index lists whose lengths depend on the data (non-zeros of W under the chosen
# columns, tokens of all chunks), where a graph may break; the tensor part is traced all the same.
RAGGED = ("p_kl microbatch top-k", "alm", "bpm", "escd", "partition_kl")


# torch 2.8 was seen to stop at a few of our operations, 2.15 traces all.
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) <= (2, 8), reason="an older torch.compile"
)
# Dynamo looks at .grad of the tensors it carries over a break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_one_graph_with_the_same_value_and_gradient(name: str) -> None:
    loss: Callable[..., LossOutput] = LOSSES[name]
    case = make_case(1, dtype=torch.float32)

    def value(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return loss(replace(case, student_logits=logits, teacher_logits=teacher)).loss

    traced = torch.compile(value, fullgraph=name not in RAGGED, backend="aot_eager")
    found = traced(case.student_logits, case.teacher_logits)
    wanted = value(case.student_logits, case.teacher_logits)
    assert torch.allclose(found, wanted, rtol=1e-5)
    gradients = [torch.autograd.grad(x, case.student_logits)[0] for x in (found, wanted)]
    assert torch.allclose(*gradients, atol=1e-6)


def test_importing_the_losses_imports_no_compiler() -> None:
    code = "import sys, xtoken.losses; print('torch._dynamo' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
