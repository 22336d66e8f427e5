"""torch.compile: the losses are traced whole, without a graph break."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from loss_cases import every_loss, make_case

from xtoken.losses import LossOutput

LOSSES = every_loss()
# Its columns depend on the data: how many non-zeros of W they reach is no static shape.
STATIC = {name: loss for name, loss in LOSSES.items() if name not in ("p_kl microbatch top-k",)}


@pytest.mark.parametrize("loss", STATIC.values(), ids=STATIC.keys())
def test_the_loss_is_one_graph_with_the_same_value_and_gradient(
    loss: Callable[..., LossOutput],
) -> None:
    case = make_case(1, dtype=torch.float32)

    def value(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return loss(replace(case, student_logits=logits, teacher_logits=teacher)).loss

    traced = torch.compile(value, fullgraph=True, backend="aot_eager")
    found = traced(case.student_logits, case.teacher_logits)
    wanted = value(case.student_logits, case.teacher_logits)
    assert torch.allclose(found, wanted, rtol=1e-5)
    gradients = [torch.autograd.grad(x, case.student_logits)[0] for x in (found, wanted)]
    assert torch.allclose(*gradients, atol=1e-6)
