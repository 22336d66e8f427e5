"""P-KL by kernels in Triton's interpreter, against float64 and a dense W."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import DTYPES, close, gradient_of, kernels, small_blocks, strided
from loss_cases import Case, make_case
from torch import Tensor

from xtoken.errors import NonFiniteError
from xtoken.losses import PairParts, TeacherTopK
from xtoken.losses.kernels import launch, w_map
from xtoken.losses.kernels.choice import forced
from xtoken.tensors.projection import SparseProjection
from xtoken.tensors.stop_fold import StopFold

import reference_losses as reference

__all__ = ["small_blocks"]
pytestmark = pytest.mark.usefixtures("small_blocks")

VARIANTS: dict[str, dict[str, object]] = {
    "all": {},
    "all, tail": {"tail_bucket": True},
    "chunk": {"top_k": 5, "tail_bucket": False},
    "chunk, tail": {"top_k": 5, "tail_bucket": True},
    "micro-batch": {"top_k": 7, "top_k_scope": "microbatch"},
    "micro-batch, tail": {"top_k": 7, "top_k_scope": "microbatch", "tail_bucket": True},
    "more than there are": {"top_k": 500},
}


def case_of(dtype: torch.dtype = torch.float32, seed: int = 5, **given: object) -> Case:
    """40 student tokens, 37 of the teacher: several blocks, and columns of many tokens."""
    case = make_case(seed, v_s=40, v_t=37, dtype=dtype, batch=1, chunks=9, **given)  # type: ignore[arg-type]
    return replace(case, pair=pair_of(some_w(seed)))


def pair_of(projection: SparseProjection, fold: bool = False) -> PairParts:
    stops = StopFold([2, 3], [1, 5]) if fold else None
    return PairParts((40, 37), projection=projection, stop_fold=stops)


def some_w(seed: int, v_s: int = 40, v_t: int = 37) -> SparseProjection:
    """W of which one column has 20 tokens, some have several and some none; some rows are empty."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.zeros(v_s, v_t, dtype=torch.float64)
    for token in range(v_s):
        columns = torch.randperm(v_t - 6, generator=generator)[: token % 4]
        dense[token, columns] = 0.1 ** torch.arange(len(columns), dtype=torch.float64)
        if token % 4 and token % 2:
            dense[token, 4] += 0.5
    dense /= dense.sum(1, keepdim=True).clamp(min=1e-9)
    counts, columns = (dense > 0).sum(1), dense.nonzero()[:, 1]
    ptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return SparseProjection.from_csr(ptr, columns, dense[dense > 0].float(), (v_s, v_t))


def dense_of(projection: SparseProjection) -> Tensor:
    return reference.dense(
        projection.indptr, projection.indices, projection.weights, projection.shape
    )


def found(case: Case, **given: object) -> tuple[Tensor, Tensor]:
    with kernels("p-kl"):
        output = case.loss("p-kl", **given)
        return output.loss, gradient_of(output.loss, case.student_logits)


def expected(case: Case, **given: object) -> tuple[Tensor, Tensor]:
    doubles = case.student_logits.detach().double().requires_grad_()
    total = reference.p_kl(
        doubles, case.teacher_logits.double(), dense_of(case.projection), case.usable, **given
    )
    loss = total / len(case.usable)
    return loss, gradient_of(loss, doubles)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [*((torch.bfloat16, name) for name in VARIANTS), *((d, "chunk, tail") for d in DTYPES[::2])],
)
def test_values_and_gradients(
    dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(w_map, "_FEW", 4)
    monkeypatch.setattr(launch, "SCRATCH", 150)  # several blocks of rows
    case = case_of(dtype)
    loss, grad = found(case, temperature=1.5, **VARIANTS[name])
    want, want_grad = expected(case, temperature=1.5, **VARIANTS[name])
    close(loss, want, torch.float32)
    close(grad, want_grad, dtype)


@pytest.mark.parametrize("name", VARIANTS)
def test_metrics_weights_and_strides_are_those_of_torch(name: str) -> None:
    case = case_of()
    case = replace(
        case,
        student_logits=strided(case.student_logits).requires_grad_(),
        teacher_logits=strided(case.teacher_logits),
    )
    given = {"chunk_weights": torch.linspace(0.0, 2.0, len(case.usable)), **VARIANTS[name]}
    with forced("torch"):
        output = case.loss("p-kl", **given)
        grad = gradient_of(output.loss, case.student_logits)
    loss, kernel_grad = found(case, **given)
    close(loss, output.loss, torch.float32)
    close(kernel_grad, grad, torch.float32)
    with kernels("p-kl"), torch.no_grad():
        value = case.loss("p-kl", **given)
    close(value.loss, output.loss, torch.float32)
    assert value.metrics.keys() == output.metrics.keys()
    for key, metric in output.metrics.items():
        close(value.metrics[key], metric, torch.float32)


@pytest.mark.parametrize("tail", [False, True, "auto"])
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("fold", [False, True])
def test_a_stored_top_k(tail: bool | str, top_k: int | None, fold: bool) -> None:
    case = case_of()
    stored = TeacherTopK.from_logits(case.teacher_logits[..., :37], 9, vocab_size=37)
    pads = stored.log_probs.clone()
    pads[:, ::3, 6:] = -torch.inf  # short rows
    stored = replace(stored, log_probs=pads)
    pair = pair_of(case.projection, fold)
    given = {"teacher": stored, "tail_bucket": tail, "top_k": top_k, "pair": pair}
    with forced("torch"):
        output = case.loss("p-kl", **given)
        grad = gradient_of(output.loss, case.student_logits)
    loss, kernel_grad = found(case, **given)
    close(loss, output.loss, torch.float32)
    close(kernel_grad, grad, torch.float32)


def test_stop_tokens_are_added() -> None:
    case = case_of()
    pair = pair_of(case.projection, fold=True)
    for name in ("all", "chunk, tail", "micro-batch"):
        with forced("torch"):
            output = case.loss("p-kl", pair=pair, temperature=2.0, **VARIANTS[name])
            grad = gradient_of(output.loss, case.student_logits)
        loss, kernel_grad = found(case, pair=pair, temperature=2.0, **VARIANTS[name])
        close(loss, output.loss, torch.float32)
        close(kernel_grad, grad, torch.float32)


def test_equal_logits_are_kept_from_the_lowest_id() -> None:
    """As many as asked for, where the k-th best is one of many."""
    case = case_of(torch.bfloat16)
    case.teacher_logits.copy_(case.teacher_logits.round() * 2)
    supported = case.projection.supported_ids
    with kernels("p-kl"):
        loss = case.loss("p-kl", top_k=6).loss.detach()
    total = torch.zeros((), dtype=torch.float64)
    for p, q in reference.pairs(
        case.student_logits.detach(), case.teacher_logits, case.usable, "chain", 1.0, 40, 37
    ):
        best = torch.argsort(q[supported], descending=True, stable=True)[:6]
        a, b = q[supported][best], (p @ dense_of(case.projection))[supported][best]
        total += reference.kl(a / a.sum(), b / b.sum())
    close(loss, total / len(case.usable), torch.float32)


def test_masses_that_underflow() -> None:
    for name in ("all", "chunk, tail", "micro-batch"):
        case = case_of(scale=70.0)
        loss, grad = found(case, **VARIANTS[name])
        want, want_grad = expected(case, **VARIANTS[name])
        if name == "all":
            close(loss, want, torch.float32)
            close(grad, want_grad, torch.float32)
        assert torch.isfinite(loss)
        assert torch.isfinite(grad).all()


def test_a_chunk_of_which_the_teacher_says_nothing() -> None:
    case = case_of()
    case.teacher_logits[..., case.projection.supported_ids] = -torch.inf
    loss, grad = found(case)
    assert float(loss.detach()) == 0
    assert not grad.any()


@pytest.mark.parametrize("side", ["student_logits", "teacher"])
def test_a_logit_that_is_no_number_is_told(side: str) -> None:
    case = case_of()
    tensor = case.student_logits if side == "student_logits" else case.teacher_logits
    with torch.no_grad():
        tensor[int(case.usable.sample[0]), :, 36] = torch.nan
    with kernels("p-kl"), pytest.raises(NonFiniteError, match=side):
        case.loss("p-kl")


def test_what_a_kernel_cannot_do_torch_does() -> None:
    case = case_of()
    learned = SparseProjection(
        case.projection.indptr, case.projection.indices, case.projection.weights, (40, 37),
        learnable=True,
    )  # fmt: skip
    for given in (
        {"direction": "jsd"},
        {"merge": "mean"},
        {"top_k": 3, "top_k_by": "student"},
        {"full_metrics": True},
        {"pair": pair_of(learned)},
    ):
        with kernels():
            output = case.loss("p-kl", **given)
        with forced("torch"):
            torch.testing.assert_close(output.loss, case.loss("p-kl", **given).loss)


def test_w_is_mapped_anew_where_its_weights_change() -> None:
    case = case_of()
    before, _ = found(case)
    case.projection.weights[case.projection.indptr[1]] *= 0.5
    after, _ = found(case)
    close(after, expected(case)[0], torch.float32)
    assert not torch.equal(before, after)
