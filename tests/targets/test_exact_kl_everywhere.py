"""exact-kl with targets made before: on devices that nobody may look at, and compiled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from exact_kl_cases import V, chunks_of, laid_out, loss_of, pair, random_targets, student
from fake_devices import FAKE_DEVICES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from xtoken.errors import PairError
from xtoken.losses import LmHead, LossInputs, LossOptions, PairParts
from xtoken.losses.exact_kl.loss import exact_kl
from xtoken.tensors.host import blind

OPTIONS: dict[str, dict[str, object]] = {
    "chain rule": {"chain_rule": True},
    "chain rule, in blocks": {"chain_rule": True, "block_size": 3},
    "plain sum": {},
    "plain sum, in blocks": {"block_size": 3},
    "depth weights": {"chain_rule": False, "depth_weights": (1.0, 0.25)},
    "jsd": {"direction": "jsd"},
    "head": {},
}


def head_of(leaf: Tensor) -> LmHead:
    eye = torch.eye(leaf.shape[-1], dtype=leaf.dtype)
    return LmHead(leaf, eye, scale=0.5, softcap=9.0)


def inputs_of(seed: int, logits: Tensor) -> LossInputs:
    targets, tokens = random_targets(seed)
    ids = torch.zeros(logits.shape[:2], dtype=torch.int64)
    return LossInputs(
        logits,
        torch.zeros(*logits.shape[:2], V),
        chunks_of(targets),
        student_ids=ids,
        teacher_ids=ids,
        targets=laid_out(targets, tokens),
    )


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_without_looking_the_value_and_the_gradient_are_the_same(name: str, scale: float) -> None:
    targets, tokens = random_targets(3)
    batch = laid_out(targets, tokens)
    found = []
    for hidden in (False, True):
        leaf = (scale * student(3, padded=0)).detach().requires_grad_()
        logits = head_of(leaf) if name == "head" else leaf
        if hidden:
            with blind():
                output = loss_of(logits, targets, batch.to("cpu"), **OPTIONS[name])
        else:
            output = loss_of(logits, targets, batch, **OPTIONS[name])
        (gradient,) = torch.autograd.grad(output.loss, leaf)
        found.append((output.loss, gradient, output.metrics))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("device", FAKE_DEVICES)
@pytest.mark.parametrize("name", OPTIONS)
def test_no_value_is_looked_at(name: str, device: str) -> None:
    targets, tokens = random_targets(4)
    batch, chunks = laid_out(targets, tokens), chunks_of(targets)
    assert chunks.host.predicted
    logits = student(4, padded=0).detach().float()
    # Torch's backward wants a real device, also where a loss calls it in its forward.
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        torch.set_grad_enabled(device == "cpu"),
    ):

        def fake(tensor: Tensor) -> Tensor:
            return mode.from_tensor(tensor).to(device)

        leaf = fake(logits).requires_grad_()
        ids = fake(torch.zeros(logits.shape[:2], dtype=torch.int64))
        inputs = LossInputs(
            LmHead(leaf, fake(torch.eye(V))) if name == "head" else leaf,
            fake(torch.zeros(logits.shape)),
            chunks.mapped(fake),
            student_ids=ids,
            teacher_ids=ids,
            targets=batch.mapped(fake),
        )
        output = exact_kl(inputs, pair(), LossOptions(**OPTIONS[name]))  # type: ignore[arg-type]
        assert output.loss.device.type == device
        if device == "cpu":
            output.loss.backward()
            assert leaf.grad is not None


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) <= (2, 8), reason="an older torch.compile"
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_it_compiles_to_the_same_value_and_gradient() -> None:
    inputs = inputs_of(6, student(6, padded=0).detach().float().requires_grad_())
    parts, options = pair(), LossOptions()
    logits = inputs.student
    assert isinstance(logits, Tensor)

    def value(logits: Tensor) -> Tensor:
        return exact_kl(replace(inputs, student=logits), parts, options).loss

    found = torch.compile(value, backend="aot_eager")(logits)
    wanted = value(logits)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(x, logits)[0] for x in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_targets_made_before_need_no_builder_and_without_both_the_call_is_refused() -> None:
    inputs = inputs_of(7, student(7, padded=0))
    bare = PairParts((V, V))
    found = exact_kl(inputs, bare, LossOptions())
    torch.testing.assert_close(found.loss, exact_kl(inputs, pair(), LossOptions()).loss)
    with pytest.raises(PairError, match="targets"):
        exact_kl(replace(inputs, targets=None), bare, LossOptions())
