"""Cross-entropy by kernels in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DTYPES, close, gradient_of, kernels, small_blocks, strided
from torch import Tensor

from xtoken.errors import NonFiniteError
from xtoken.losses import cross_entropy
from xtoken.tensors.host import blind

from reference_losses import cross_entropy as reference

__all__ = ["NonFiniteError", "small_blocks"]
pytestmark = pytest.mark.usefixtures("small_blocks")
SIZE = 53


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 5, SIZE + 3, generator=generator)
    ids = torch.randint(0, SIZE, (2, 5), generator=generator)
    mask = torch.rand(2, 5, generator=generator) < 0.6
    return logits.to(dtype).requires_grad_(), ids, mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unseen", [False, True])
def test_values_and_gradients(dtype: torch.dtype, unseen: bool) -> None:
    logits, ids, mask = batch(dtype)
    with torch.no_grad():  # padding may hold anything
        logits[:, :-1][~mask[:, 1:]] = torch.nan
    logits = strided(logits).requires_grad_()
    with kernels("cross-entropy"):
        if unseen:
            with blind():
                loss = cross_entropy(logits, ids, mask, vocab_size=SIZE).loss
        else:
            loss = cross_entropy(logits, ids, mask, vocab_size=SIZE).loss
        grad = gradient_of(loss, logits)
    doubles = logits.detach().double().nan_to_num().requires_grad_()
    expected = reference(doubles, ids, mask, SIZE) / int(mask[:, 1:].sum())
    close(loss, expected, torch.float32)
    close(grad, gradient_of(expected, doubles), dtype)


def test_a_target_outside_is_told() -> None:
    logits, ids, mask = batch(torch.float32)
    ids[mask] = SIZE
    with kernels("cross-entropy"), blind(), torch.no_grad():
        loss = cross_entropy(logits, ids, mask, vocab_size=SIZE).loss
    assert torch.isnan(loss)
