"""W on torch: products, slices, log space, learnable weights, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import random_csr

from xtoken.errors import ArgumentTypeError, OptionError, ShapeError, TokenIdError
from xtoken.tensors.projection import SparseProjection
from xtoken.tensors.sparse_ops import log_project

from reference_losses import dense


def build(seed: int = 0, v_s: int = 17, v_t: int = 12) -> tuple[SparseProjection, torch.Tensor]:
    csr = random_csr(np.random.default_rng(seed), v_s, v_t)
    return SparseProjection.from_csr(*csr), dense(*csr)


def probs(rows: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.softmax(torch.randn(rows, size, generator=generator, dtype=torch.float64), -1)


def test_projecting_is_the_dense_product() -> None:
    projection, w = build()
    p = probs(5, 17)
    shared, own = torch.tensor([7, 0, 3]), torch.tensor([[0, 5], [1, 1], [11, 2], [3, 3], [4, 0]])
    assert torch.allclose(projection.project(p), p @ w)
    assert torch.allclose(projection.project(p, shared), (p @ w)[:, shared])
    assert torch.allclose(projection.project(p, own), (p @ w).gather(1, own))


def test_supported_columns_and_empty_rows_are_those_of_w() -> None:
    projection, w = build()
    assert projection.supported.tolist() == (w.sum(0) > 0).tolist()
    assert projection.empty_rows.tolist() == (w.sum(1) == 0).tolist()
    assert not projection.supported.all()
    assert projection.empty_rows.any()


def test_identity_changes_nothing() -> None:
    p = probs(3, 9)
    assert torch.equal(SparseProjection.identity(9).project(p), p)


@pytest.mark.parametrize("learnable", [False, True])
def test_gradients_of_rows_and_weights_are_right(learnable: bool) -> None:
    csr = random_csr(np.random.default_rng(2), 8, 6)
    projection = SparseProjection.from_csr(*csr, learnable=learnable).double()
    p = probs(3, 8).requires_grad_()
    assert torch.autograd.gradcheck(projection.project, (p,))
    if learnable:
        free = projection.free
        assert free is not None
        loss = (projection.project(p) ** 2).sum()
        (found,) = torch.autograd.grad(loss, free)
        step = 1e-6
        for index in range(len(free)):
            with torch.no_grad():
                free[index] += step
                above = (projection.project(p) ** 2).sum()
                free[index] -= 2 * step
                below = (projection.project(p) ** 2).sum()
                free[index] += step
            slope = float((above - below) / (2 * step))
            assert float(found[index]) == pytest.approx(slope, abs=1e-8)


def test_log_projection_is_the_log_of_the_projection_with_its_gradient() -> None:
    projection, w = build(3)
    part = projection.full()
    values = projection.values()[part.entries].double().requires_grad_()
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 17, generator=generator, dtype=torch.float64, requires_grad=True)

    def function(z: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return log_project(z, v, part.map)

    columns = projection.supported_ids
    assert torch.allclose(function(logits, values).exp(), (logits.exp() @ w)[:, columns])
    assert torch.autograd.gradcheck(function, (logits, values))


def test_log_projection_does_not_underflow_where_the_logits_are_finite() -> None:
    projection, w = build(3)
    part = projection.full()
    values = projection.values()[part.entries]
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(4, 17, generator=generator) * 4
    logits[:, ::2] -= 400.0  # exp is 0 in float32, and the answer is not
    w = w[:, projection.supported_ids]
    exact = torch.logsumexp(logits.double()[:, :, None] + torch.log(w), 1)
    z, d = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found = log_project(z, values, part.map)
    assert torch.isfinite(exact).all()
    assert torch.allclose(found.double(), exact, rtol=1e-5)
    factor = torch.randn(found.shape, generator=generator)
    (fast,) = torch.autograd.grad((found * factor).sum(), z)
    log_w = torch.where(w > 0, torch.log(w.clamp(min=1e-300)), -1e9)
    slow = torch.logsumexp(d[:, :, None] + log_w, 1)
    (wanted,) = torch.autograd.grad((slow * factor).sum(), d)
    # A share is exp of a difference of numbers near 400, known to 400 roundings of float32.
    assert torch.allclose(fast.double(), wanted, atol=1e-4)


def test_learnable_weights_start_at_w_and_stay_row_distributions() -> None:
    csr = random_csr(np.random.default_rng(4), 10, 8)
    projection = SparseProjection.from_csr(*csr, learnable=True)
    assert torch.allclose(projection.values(), projection.weights, atol=1e-6)
    with torch.no_grad():
        projection.free.add_(torch.randn_like(projection.free))
    sums = torch.zeros(10, dtype=torch.float64)
    sums.index_add_(0, projection.row_of, projection.values().detach())
    assert torch.allclose(sums, (~projection.empty_rows).double(), atol=1e-6)


def test_slices_are_the_blocks_of_w() -> None:
    projection, w = build()
    p = probs(3, 17)
    rows = projection.row_slice(4, 11)
    assert torch.allclose(rows.project(p[:, 4:11]), p[:, 4:11] @ w[4:11])
    assert torch.allclose(projection.column_slice(2, 9).project(p), p @ w[:, 2:9])


def test_slices_of_slices_and_of_low_precision_are_taken() -> None:
    projection, w = build()
    low = projection.bfloat16()
    again = SparseProjection(low.indptr, low.indices, low.weights, low.shape)
    part = again.row_slice(2, 15).column_slice(1, 9).row_slice(1, 12).column_slice(0, 5)
    dense = part.project(torch.eye(11).bfloat16()).double()
    assert torch.allclose(dense, w[3:14, 1:6].double(), atol=4e-3)


def test_explicit_zeros_reach_no_column() -> None:
    projection = SparseProjection.from_csr([0, 2, 3], [0, 1, 2], [1.0, 0.0, 1.0], (2, 4))
    assert projection.supported.tolist() == [True, False, True, False]
    assert projection.indices.tolist() == [0, 2]


def test_state_dict_restores_learned_weights() -> None:
    csr = random_csr(np.random.default_rng(5), 9, 7)
    trained, fresh = (SparseProjection.from_csr(*csr, learnable=True) for _ in range(2))
    with torch.no_grad():
        trained.free.mul_(0.5)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.values(), trained.values())


def test_wrong_shapes_ids_and_weights_are_refused() -> None:
    projection, _ = build()
    with pytest.raises(ShapeError, match=r"probs has shape \(2, 16\), expected \[R, 17\]"):
        projection.project(torch.ones(2, 16))
    with pytest.raises(TokenIdError, match="below V_t = 12"):
        projection.project(torch.ones(2, 17), torch.tensor([12]))
    with pytest.raises(ShapeError, match="columns has 3 rows, expected 2"):
        projection.project(torch.ones(2, 17), torch.zeros(3, 1, dtype=torch.int64))
    for indptr, indices, weights, shape, message in (
        ([0, 1], [0], [1.0], (2, 2), "indptr has 2 entries, expected V_s \\+ 1 = 3"),
        ([0, 1, 2], [0, 2], [1.0, 1.0], (2, 2), "below V_t = 2"),
        ([0, 1, 3], [0, 1], [1.0, 1.0], (2, 2), "rise from 0 to nnz"),
        ([0, 1, 2], [0, 1], [1.0, -1.0], (2, 2), "above 0"),
        ([0, 1, 2], [0, 1], [1.0], (2, 2), "expected 2 like indices"),
        ([0, 1, 3], [0, 0, 1], [1.0, 4.5, 0.5], (2, 2), "row 1 of W sums to 5.0000, as do 1 rows"),
        ([0, 0, 2], [0, 1], [0.7, 0.2], (2, 2), "row 1 of W sums to 0.9000.*divide the weights"),
    ):
        with pytest.raises(ShapeError, match=message):
            SparseProjection.from_csr(indptr, indices, weights, shape)
    for indptr, indices in (([0, 1.5], [0]), ([0, 1], [0.5])):
        with pytest.raises(ShapeError, match=r"torch\.float32, expected whole numbers"):
            SparseProjection.from_csr(indptr, indices, [1.0], (1, 2))
    with pytest.raises(ArgumentTypeError, match="start is float, expected a whole number"):
        projection.row_slice(0.0, 2)
    with pytest.raises(ArgumentTypeError, match="stop is float, expected a whole number"):
        projection.column_slice(0, 2.0)
    with pytest.raises(ShapeError, match="rows = 18, expected 1 to 17"):
        projection.limited(18, 2)
    ones = torch.arange(2), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ShapeError, match=r"row 0 of W sums to 0\.1000"):
        SparseProjection(*ones, torch.tensor([0.1]), (1, 2))
    with pytest.raises(ShapeError, match=r"weights is torch\.int64, expected a floating dtype"):
        SparseProjection(*ones, torch.tensor([1]), (1, 2))
    with pytest.raises(ShapeError, match="not inside V_s"):
        projection.row_slice(3, 18)
    with pytest.raises(ShapeError, match="not inside V_t"):
        projection.column_slice(-1, 3)
    learnable = SparseProjection.from_csr(
        *random_csr(np.random.default_rng(0), 4, 4), learnable=True
    )
    with pytest.raises(OptionError, match="cannot be cut by columns"):
        learnable.column_slice(0, 2)


@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(2, 20))
def test_projection_log_projection_and_slices_agree_with_the_dense_product(
    seed: int, v_s: int, v_t: int
) -> None:
    projection, w = build(seed, v_s, v_t)
    p = probs(3, v_s)
    whole = p @ w
    assert torch.allclose(projection.project(p), whole)
    part = projection.full()
    logs = log_project(torch.log(p), projection.values()[part.entries], part.map)
    assert torch.allclose(torch.exp(logs), whole[:, projection.supported_ids])
    columns = torch.arange(v_t).flip(0)[: v_t // 2]
    assert torch.allclose(projection.project(p, columns), whole[:, columns])
    cut = v_s // 2
    assert torch.allclose(
        projection.row_slice(0, cut).project(p[:, :cut])
        + projection.row_slice(cut, v_s).project(p[:, cut:]),
        whole,
    )
