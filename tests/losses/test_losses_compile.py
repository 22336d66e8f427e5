"""`compiled`: one graph forward and one backward per loss, whatever the batch; values as eager."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from exact_kl_cases import laid_out, random_targets
from exact_kl_cases import loss_of as exact_kl
from exact_kl_cases import student as exact_student
from loss_cases import Case, every_loss, loss_of, make_case, pair_of
from prefix_cases import make_prefix_case
from torch import Tensor

from xtoken.errors import OptionError
from xtoken.losses import LmHead, LossOptions, LossOutput, TeacherTopK, cross_entropy
from xtoken.losses.engine.row_blocks import BlockLoss
from xtoken.losses.exact_kl import block as exact_kl_block
from xtoken.losses.p_kl import block as p_kl_block
from xtoken.losses.p_kl.native import native_pass
from xtoken.losses.prefix_kl import block as prefix_kl_block
from xtoken.tensors.projection import SparseProjection

# torch 2.8 was seen to stop at a few of our operations, 2.15 traces all.
pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) <= (2, 8), reason="an older torch.compile"
)

BATCHES = 20
Run = Callable[[int, bool | str], tuple[LossOutput, list[Tensor]]]


class Graphs:
    """Counts what is compiled, and runs it as it is."""

    def __init__(self) -> None:
        self.forward = self.backward = 0

    def first(self, graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        self.forward += 1
        return boxed(graph)

    def second(self, graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        self.backward += 1
        return boxed(graph)


def boxed(graph: torch.fx.GraphModule) -> Callable[..., object]:
    from functorch.compile import make_boxed_func

    return make_boxed_func(graph.forward)


@functools.cache
def counting_backend() -> Graphs:
    from torch._dynamo import register_backend
    from torch._dynamo.backends.common import aot_autograd

    graphs = Graphs()
    backend = aot_autograd(fw_compiler=graphs.first, bw_compiler=graphs.second)
    register_backend(backend, name="counting")
    return graphs


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    # What the core computes is not compiled.
    monkeypatch.setattr(p_kl_block, "native_pass", lambda *_: None)
    monkeypatch.setattr(prefix_kl_block, "native_prefix_pass", lambda *_: None)
    monkeypatch.setattr(exact_kl_block, "native_pass", lambda *_: None)
    # It empties the processor's caches to time the guards, for a log.
    guards = torch._dynamo.guards
    monkeypatch.setattr(guards, "profile_guard_manager", lambda *_: 0.0, raising=False)
    found = counting_backend()
    torch._dynamo.reset()
    found.forward = found.backward = 0
    return found


@functools.cache
def batch(seed: int, **sizes: int) -> Case:
    """Batches of one pair, of 1 to 3 samples and 2 to 21 chunks each."""
    case = make_case(seed, batch=1 + seed % 3, chunks=2 + seed % BATCHES, **sizes)
    if len(case.usable) == 0:
        return batch(seed + BATCHES, **sizes)
    pair = pair_case()
    return replace(case, pair=pair.pair, shared=pair.shared)


@functools.cache
def pair_case() -> Case:
    return make_case(1)


def of_case(loss: Callable[..., LossOutput], *, stored: int | None = None, **given: object) -> Run:
    def run(seed: int, compiled: bool | str) -> tuple[LossOutput, list[Tensor]]:
        case = batch(seed)
        leaf = case.student_logits
        if stored is not None:
            best = TeacherTopK.from_logits(
                case.teacher_logits, stored, vocab_size=case.v_t, ids=case.teacher_ids
            )
            case = replace(case, teacher_logits=best)
        return loss(case, compiled=compiled, block_size=4, **given), [leaf]

    return run


def weighted(case: Case, **given: object) -> LossOutput:
    weights = torch.linspace(0.5, 2.0, len(case.usable), dtype=torch.float64)
    return case.loss("p-kl", chunk_weights=weights, **given)


def head(case: Case, **given: object) -> LossOutput:
    width = case.student_logits.shape[-1]
    student = LmHead(case.student_logits, torch.eye(width, dtype=torch.float64))
    return case.loss("p-kl", student=student, **given)


def learnable(seed: int, compiled: bool | str) -> tuple[LossOutput, list[Tensor]]:
    case, w = batch(seed), pair_case().projection
    own = SparseProjection(w.indptr, w.indices, w.weights, w.shape, learnable=True)
    output = case.loss("p-kl", pair=pair_of(own), compiled=compiled, block_size=4)
    assert own.free is not None
    return output, [case.student_logits, own.free]


def likelihoods(seed: int, compiled: bool | str) -> tuple[LossOutput, list[Tensor]]:
    case = batch(seed)
    output = cross_entropy(
        case.student_logits, case.student_ids, case.student_mask, vocab_size=case.v_s,
        block_size=4, full_metrics=True, compiled=compiled,
    )  # fmt: skip
    return output, [case.student_logits]


@functools.cache
def prefix_pair() -> object:
    return make_prefix_case(1).pair


def prefix(stored: int | None = None, **options: object) -> Run:
    def run(seed: int, compiled: bool | str) -> tuple[LossOutput, list[Tensor]]:
        case = batch(seed, v_s=16, v_t=13)
        teacher = case.teacher_logits
        if stored is not None:
            teacher = TeacherTopK.from_logits(teacher, stored, vocab_size=13)
        output = loss_of(
            "prefix-kl", case.student_logits, teacher, case.usable, prefix_pair(),
            student_ids=case.student_ids, teacher_ids=case.teacher_ids, compiled=compiled,
            block_size=4, **options,
        )  # fmt: skip
        return output, [case.student_logits]

    return run


def exact(**options: object) -> Run:
    def run(seed: int, compiled: bool | str) -> tuple[LossOutput, list[Tensor]]:
        samples = 1 + seed % 4
        targets, tokens = random_targets(seed, examples=samples)
        leaf = exact_student(seed, samples=samples)
        found = laid_out(targets, tokens)
        output = exact_kl(leaf, targets, found, compiled=compiled, block_size=4, **options)
        return output, [leaf]

    return run


LOSSES = every_loss()
RUNS: dict[str, Run] = {name: of_case(loss) for name, loss in LOSSES.items()} | {
    "p_kl last": of_case(LOSSES["p_kl"], merge="last"),
    "p_kl mean": of_case(LOSSES["p_kl"], merge="mean"),
    "p_kl stored, tail": of_case(LOSSES["p_kl"], stored=4, tail_bucket="auto"),
    "p_kl stored, all metrics": of_case(LOSSES["p_kl"], stored=4, full_metrics=True),
    "p_kl chunk, tail": of_case(LOSSES["p_kl"], top_k=3, tail_bucket=True),
    "p_kl microbatch, all metrics": of_case(
        LOSSES["p_kl microbatch top-k"], full_metrics=True, temperature=2.0
    ),
    "p_kl weighted": of_case(weighted),
    "p_kl lm_head": of_case(head),
    "p_kl learnable": learnable,
    "gold mean": of_case(LOSSES["gold"], merge="mean"),
    "bpm stored": of_case(LOSSES["bpm"], stored=4),
    "escd stored": of_case(LOSSES["escd"], stored=4),
    "partition_kl stored": of_case(LOSSES["partition_kl"], stored=4, mismatch_weight=2.0),
    "prefix_kl": prefix(),
    "prefix_kl no mirror, microbatch": prefix(mirror=False, top_k=4, top_k_scope="microbatch"),
    "prefix_kl stored, tail": prefix(4, tail_bucket="auto", depth_weights=(1.0, 0.5)),
    "prefix_kl stored": prefix(4),
    "exact_kl chain rule": exact(chain_rule=True),
    "exact_kl plain sum": exact(chain_rule=False, depth_weights=(1.0, 0.25)),
    "exact_kl jsd": exact(direction="jsd"),
    "cross_entropy": likelihoods,
}  # fmt: skip


# Losses whose graphs are those of another.
SHARED: dict[str, list[str]] = {
    "p_kl": ["p_kl last", "p_kl weighted", "p_kl lm_head"],
    "h_kl": ["gold"],
    "bpm": ["bpm stored"],
    "escd": ["escd stored"],
    "exact_kl chain rule": ["exact_kl plain sum"],
}
OWN = [name for name in RUNS if all(name not in others for others in SHARED.values())]


@pytest.mark.parametrize("name", OWN)
def test_twenty_batches_of_other_sizes_are_one_graph_each_way(name: str, graphs: Graphs) -> None:
    for each in (name, *SHARED.get(name, ())):
        sizes = set()
        for seed in range(BATCHES):
            (wanted, leaves), (found, own) = (RUNS[each](seed, c) for c in (False, "counting"))
            sizes.add(int(wanted.num_chunks))
            torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-9, atol=1e-11)
            gradients = (
                torch.autograd.grad(output.loss, tensors)
                for output, tensors in ((found, own), (wanted, leaves))
            )
            torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-11)
            for key, value in wanted.metrics.items():
                torch.testing.assert_close(found.metrics[key], value, rtol=1e-8, atol=1e-11)
        assert len(sizes) > 5
    assert graphs.forward == 1
    assert graphs.backward <= 1  # a closed form has no backward of its own


@pytest.mark.parametrize("name", ["p_kl", "gold", "prefix_kl"])
def test_without_a_gradient_too(name: str, graphs: Graphs) -> None:
    with torch.no_grad():
        for seed in range(4):
            wanted, found = (RUNS[name](seed, c)[0] for c in (False, "counting"))
            torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-9, atol=1e-11)
    assert (graphs.forward, graphs.backward) == (1, 0)


def test_a_row_without_mass_is_told_as_it_is_by_eager(graphs: Graphs) -> None:
    case = batch(3)
    logits = case.student_logits.detach().clone()
    logits[:, :, 0] = torch.nan
    case = replace(case, student_logits=logits.requires_grad_())
    messages = []
    for compiled in (False, "counting"):
        with pytest.raises(Exception, match="expected a finite logit") as raised:
            LOSSES["p_kl"](case, compiled=compiled)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


# Dynamo looks at .grad of the tensors it carries over a break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("compiled", [False, "counting"])
def test_inside_a_compiled_step_the_loss_is_an_island(compiled: bool | str, graphs: Graphs) -> None:
    def step(case: Case, logits: Tensor) -> Tensor:
        whole = replace(case, student_logits=torch.sin(1.5 * logits))
        return 2 * LOSSES["p_kl"](whole, compiled=compiled, block_size=4).loss

    traced, made = torch.compile(step, backend="counting"), []
    for seed in range(BATCHES):
        case = batch(seed)
        found, wanted = traced(case, case.student_logits), step(case, case.student_logits)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
        gradients = [torch.autograd.grad(x, case.student_logits)[0] for x in (found, wanted)]
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-11)
        made.append(graphs.forward)
    assert made[-1] == made[len(made) // 2]  # sizes are symbols by then


def test_what_the_core_computes_is_not_compiled(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(p_kl_block, "native_pass", native_pass)
    wanted, found = (RUNS["p_kl"](3, compiled)[0] for compiled in (False, "counting"))
    assert torch.equal(found.loss, wanted.loss)
    assert (graphs.forward, graphs.backward) == (0, 0)


def test_what_has_no_compiled_form_and_no_backend_is_refused() -> None:
    for value in ("fast", "\ud800", 2, None):
        with pytest.raises(OptionError, match="expected True, False or the name of a backend"):
            LossOptions(compiled=value)
    with pytest.raises(OptionError, match="each block is filled up to its size; pass 65536 at"):
        LossOptions(compiled=True, block_size=10**9)
    with pytest.raises(OptionError, match="has no `narrowed`"):
        BlockLoss().narrowed(None)
