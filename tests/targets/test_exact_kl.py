"""exact-kl against a plain float64 loop over positions, groups and tokens."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from exact_kl_cases import LENGTH, V, chunks_of, laid_out, loss_of, pair, random_targets, student
from gradients import gradcheck
from torch import Tensor

from xtoken import Projection, Vocab
from xtoken.errors import OptionError, ShapeError
from xtoken.losses import LossInputs, LossOptions, PairParts
from xtoken.losses.exact_kl import block
from xtoken.losses.exact_kl.loss import exact_kl
from xtoken.targets import TargetBuilder, Targets
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.lm_head import LmHead
from xtoken.tensors.target_batch import TargetBatch


def slow_loss(
    logits: Tensor,
    targets: Targets,
    tokens: np.ndarray,
    direction: str = "forward",
    beta: float = 0.5,
    depth_weights: tuple[float, ...] | None = None,
) -> Tensor:
    """The sum over all positions, from the definition."""
    total = torch.zeros((), dtype=torch.float64)
    for example in range(len(targets.position_indptr) - 1):
        for at in range(*targets.position_indptr[example : example + 2]):
            row = torch.softmax(logits[example, targets.positions[at] - 1, :V], 0)
            q, p, depths, rest = [], [], [], set(range(V))
            for mass, depth, ids in targets.groups_at(at, tokens):
                q.append(mass)
                p.append(row[sorted(ids)].sum())
                depths.append(depth)
                rest -= ids
            outside = row[sorted(rest)].sum()
            tail = torch.tensor(float(targets.tails[at]), dtype=torch.float64)
            q, p = torch.tensor(q, dtype=torch.float64), torch.stack(p)
            if not rest:  # nobody can say what the target keeps for no token
                q, tail = q / q.sum(), torch.zeros_like(tail)
            if targets.open[at]:
                # Known is that all others have at most so much.
                tail = torch.minimum(outside.detach(), tail)
                if direction == "forward":
                    groups = position_loss(q, p / p.sum(), depths, direction, beta, depth_weights)
                    total = total + (1 - tail) * groups
                    sides = torch.stack([tail, 1 - tail]), torch.stack([outside, p.sum()])
                    total = total + kl(*sides)
                    continue
                q = q * (1 - tail)
            q, p = torch.cat([q, tail[None]]), torch.cat([p, outside[None]])
            total = total + position_loss(
                q, p / p.sum(), [*depths, 0], direction, beta, depth_weights
            )
    return total


def kl(a: Tensor, b: Tensor) -> Tensor:
    return sum(
        (x * torch.log(x / y) for x, y in zip(a, b, strict=True) if x > 0), torch.zeros(()).double()
    )


def position_loss(
    q: Tensor, p: Tensor, depths: list[int], direction: str, beta: float,
    depth_weights: tuple[float, ...] | None,
) -> Tensor:  # fmt: skip
    if direction == "reverse":
        return kl(p, q)
    if direction == "jsd":
        mean = beta * q + (1 - beta) * p
        return beta * kl(q, mean) + (1 - beta) * kl(p, mean)
    if depth_weights is None:
        return kl(q, p)
    total, last = torch.zeros(()).double(), 1.0
    for depth in range(max(depths) + 1):
        here = [i for i, d in enumerate(depths) if d == depth]
        below = [i for i, d in enumerate(depths) if d > depth]
        mass = float(q[here].sum() + q[below].sum())
        if mass <= 0:
            continue
        sides = [torch.stack([*side[here], side[below].sum()]) for side in (q, p)]
        sides = [side / side.sum() for side in sides]
        weight = depth_weights[min(depth, len(depth_weights) - 1)]
        # Too little mass: the depth stays under the weight of the one above.
        last = weight / mass if mass >= 1e-3 else last
        total = total + last * mass * kl(*sides)
    return total


OPTIONS: dict[str, dict[str, object]] = {
    "chain rule": {"chain_rule": True},
    "plain sum": {},
    "depth weights": {"chain_rule": False, "depth_weights": (1.0, 0.5, 2.0)},
    "reverse": {"direction": "reverse"},
    "jsd": {"direction": "jsd", "beta": 0.3},
}


def slow_options(name: str) -> dict[str, object]:
    options = dict(OPTIONS[name])
    by_chain_rule = options.pop("chain_rule", "direction" in options)
    if not by_chain_rule:
        options.setdefault("depth_weights", (1.0,))
    return options


@pytest.mark.parametrize("by", ["core", "torch"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("seed", range(4))
def test_value_and_gradient_are_those_of_the_definition(
    name: str, seed: int, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "torch":
        monkeypatch.setattr(block, "native_pass", lambda *_: None)
    targets, tokens = random_targets(seed)
    batch = laid_out(targets, tokens)
    logits = student(seed)
    found = loss_of(logits, targets, batch, normalizer=1.0, block_size=3, **OPTIONS[name])
    expected = slow_loss(logits, targets, tokens, **slow_options(name))
    torch.testing.assert_close(found.loss, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found.loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)
    assert int(found.num_chunks) == len(batch)


@pytest.mark.parametrize("by", ["core", "torch"])
@pytest.mark.parametrize("name", ["chain rule", "plain sum", "depth weights"])
def test_a_group_that_neither_side_gives_any_mass_changes_nothing(
    name: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "torch":
        monkeypatch.setattr(block, "native_pass", lambda *_: None)
    targets, tokens = random_targets(6, opened=False)
    probs, logits = targets.probs.copy(), student(6).detach()
    for at in range(0, len(targets.tails), 2):
        group = int(targets.group_indptr[at])  # of each other position, the first
        probs[group] = 0.0
        rest = slice(*targets.group_indptr[at : at + 2])
        probs[rest] *= (1.0 - targets.tails[at]) / probs[rest].sum()
        example = int(np.searchsorted(targets.position_indptr, at, "right")) - 1
        _, _, ids = next(iter(targets.groups_at(at, tokens)))
        logits[example, targets.positions[at] - 1, sorted(ids)] = -torch.inf
    targets = replace(targets, probs=probs)
    logits.requires_grad_()
    found = loss_of(logits, targets, laid_out(targets, tokens), normalizer=1.0, **OPTIONS[name])
    expected = slow_loss(logits, targets, tokens, **slow_options(name))
    torch.testing.assert_close(found.loss, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("by", ["core", "torch"])
@pytest.mark.parametrize("tail", [1e-7, 0.2])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_tail_of_no_token_is_left_out_and_its_mass_given_back(
    name: str, tail: float, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "torch":
        monkeypatch.setattr(block, "native_pass", lambda *_: None)
    targets, tokens = random_targets(6, opened=False)
    probs, tails = targets.probs.copy(), targets.tails.copy()
    starts, ends = targets.starts.copy(), targets.ends.copy()
    for at in range(0, len(tails), 2):  # the groups of each other position have all tokens
        here = slice(*targets.group_indptr[at : at + 2])
        ends[here] = [*starts[here][1:], V]
        starts[here.start] = 0
        probs[here] *= (1 - tail) / probs[here].sum()
        tails[at] = tail
    targets = replace(targets, probs=probs, tails=tails, starts=starts, ends=ends)
    logits, batch = student(6), laid_out(targets, tokens)
    found = loss_of(logits, targets, batch, normalizer=1.0, block_size=3, **OPTIONS[name])
    expected = slow_loss(logits, targets, tokens, **slow_options(name))
    assert torch.isfinite(expected)
    torch.testing.assert_close(found.loss, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found.loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)
    again = loss_of(logits, targets, batch, normalizer=1.0, **OPTIONS[name])
    torch.testing.assert_close(again.loss, found.loss, rtol=1e-12, atol=1e-12)
    assert float(batch.tails[0]) == tail  # those of the caller stay as they are


def made_here(parts: PairParts, ids: list[int], student: Tensor, teacher: Tensor, **given: object):
    """The loss of a text that has these tokens on both sides, its targets made in the step."""
    row = torch.tensor([ids])
    chunks = ChunkBatch.from_mask(torch.arange(len(ids))[None] > 0)
    inputs = LossInputs(student, teacher, chunks, student_ids=row, teacher_ids=row)
    return exact_kl(inputs, parts, LossOptions(**given))  # type: ignore[arg-type]


@pytest.mark.parametrize("min_prob", [0.0, 1e-7])
@pytest.mark.parametrize("seed", range(4))
def test_of_all_columns_and_one_tokenizer_it_is_the_plain_kl(seed: int, min_prob: float) -> None:
    # The float32 log-probabilities sum to 1 but for their rounding.
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 1, 12, V, generator=generator)
    ids = [i % V for i in range(12)]
    found = made_here(pair(), ids, *logits, top_k=V, min_prob=min_prob)
    own, other = torch.log_softmax(logits.double(), -1)[:, 0, :-1]
    wanted = (torch.exp(other) * (other - own)).sum(1).mean()
    torch.testing.assert_close(found.loss.double(), wanted, rtol=1e-5, atol=1e-6)
    assert float(found.metrics["target_tail"]) == 0


def test_a_student_that_is_its_teacher_has_the_loss_of_what_it_would_have_joined() -> None:
    vocab = Vocab.from_tokens([b"a", b"b", b"ab"], ranked=True)
    projection = Projection.build(vocab, vocab, cache_dir=False)
    parts = PairParts((3, 3), targets=TargetBuilder(projection))
    logits = torch.zeros(1, 5, 3)
    ids, given = [0, 0, 2, 1, 2], {"top_k": 3, "min_prob": 0.0}

    def loss(**more: object) -> float:
        return float(made_here(parts, ids, logits, logits, **given, **more).loss) * 4

    # `b` behind `a` would have been `ab`: at the one such place a third of the mass is left out.
    assert loss(max_depth=0) == pytest.approx(math.log(1.5), abs=1e-6)
    # And `a`, then `b`, is counted as `ab`.
    assert loss() > loss(max_depth=0) + 0.01
    plain = {"consistent": False, "carry_levels": 0, "max_depth": 0}
    assert loss(**plain) == pytest.approx(0.0, abs=1e-6)


def test_a_reverse_kl_to_targets_without_a_tail_is_refused() -> None:
    logits = torch.randn(2, 1, 6, V, generator=torch.Generator().manual_seed(0))
    call = functools.partial(made_here, pair(), [0, 1, 2, 3, 4, 5], *logits, direction="reverse")
    for top_k in (None, V):
        with pytest.raises(OptionError, match=f"min_prob = 0 and top_k = .* of {V} columns is inf"):
            call(top_k=top_k, min_prob=0.0)
        assert torch.isfinite(call(top_k=top_k, min_prob=0.0, consistent=False).loss)
    assert torch.isfinite(call(top_k=4, min_prob=0.0).loss)
    assert torch.isfinite(call(min_prob=0.2).loss)


@pytest.mark.parametrize("name", ["reverse", "jsd"])
@pytest.mark.parametrize("gap", [21.0, 40.0, 400.0])
def test_the_loss_of_a_teacher_that_is_sure_is_finite(gap: float, name: str) -> None:
    ids = [i % V for i in range(8)]
    teacher = torch.zeros(1, 8, V)
    teacher[0, range(7), ids[1:]] = gap
    own = torch.randn(1, 8, V, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = made_here(pair(), ids, own, teacher, **OPTIONS[name])
    found.loss.backward()
    assert own.grad is not None
    assert torch.isfinite(own.grad).all()
    if name == "reverse":
        # About one rounding is outside, however sure the teacher is; the student has most there.
        log_p = torch.log_softmax(own.detach(), -1)[0, range(7), ids[1:]]
        outside = 1 - log_p.exp()
        wanted = log_p * log_p.exp() + outside * (torch.log(outside) + 23 * math.log(2))
        assert found.loss.item() == pytest.approx(float(wanted.mean()), rel=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_in_the_reverse_loss_a_tail_has_one_rounding_of_float32(seed: int) -> None:
    targets, tokens = random_targets(seed)
    tails = targets.tails.copy()
    tails[::2], tails[1::4] = 0.0, 1e-30
    low, floor = replace(targets, tails=tails), replace(targets, tails=tails.clip(2.0**-23))
    logits = student(seed)
    found = loss_of(logits, low, laid_out(low, tokens), normalizer=1.0, direction="reverse")
    expected = slow_loss(logits, floor, tokens, direction="reverse")
    assert torch.isfinite(expected)
    torch.testing.assert_close(found.loss, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found.loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


class Said:
    """Targets as the tokens below `size` can say them, the slow way; as `slow_loss` reads them."""

    def __init__(self, targets: Targets, tokens: np.ndarray, size: int) -> None:
        self.position_indptr, self.open = targets.position_indptr, targets.open
        self.positions, self.tails = targets.positions, targets.tails.copy()
        self.groups = []
        for at in range(len(targets)):
            groups = [
                (mass, depth, {token for token in ids if token < size})
                for mass, depth, ids in targets.groups_at(at, tokens)
            ]
            groups = [group for group in groups if group[2]]
            rest = sum(mass for mass, _, _ in groups)
            whole = float(targets.tails[at])
            if targets.open[at]:
                self.tails[at] = whole / (rest * (1 - whole) + whole)
            else:
                rest += whole
                self.tails[at] = whole / rest
            self.groups.append([(mass / rest, depth, ids) for mass, depth, ids in groups])

    def groups_at(self, at: int, tokens: np.ndarray) -> list[tuple[float, int, set[int]]]:
        return self.groups[at]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_what_the_head_lacks_has_no_mass(seed: int, name: str) -> None:
    targets, tokens = random_targets(seed)
    size = V - 4
    batch = laid_out(targets, tokens).limited(size)
    assert batch.host is not None
    assert batch.host.most_token() < size
    assert len(batch) == len(laid_out(targets, tokens))
    logits = student(seed).detach()
    logits[..., size:] = -torch.inf
    found = loss_of(logits, targets, batch, normalizer=1.0, **OPTIONS[name])
    said: Any = Said(targets, tokens, size)
    expected = slow_loss(logits, said, tokens, **slow_options(name))
    torch.testing.assert_close(found.loss, expected, rtol=1e-10, atol=1e-10)


def test_a_position_of_which_the_head_can_say_nothing_has_no_target() -> None:
    targets, tokens = random_targets(0)
    batch = laid_out(targets, tokens)
    assert batch.limited(V) is batch
    nothing = batch.limited(0)
    assert len(nothing) == len(batch)
    assert len(nothing.rows) == 0
    logits = student(0)
    loss = loss_of(logits, targets, nothing, normalizer=1.0).loss
    assert float(loss.detach()) == 0.0


@pytest.mark.parametrize("name", ["chain rule", "plain sum", "jsd"])
def test_gradcheck(name: str) -> None:
    # In open positions the student's mass outside the groups counts as a constant.
    targets, tokens = random_targets(9, examples=1, opened=False)
    batch = laid_out(targets, tokens)

    def loss(logits: Tensor) -> Tensor:
        return loss_of(logits, targets, batch, block_size=2, **OPTIONS[name]).loss

    assert gradcheck(loss, (student(5)[:1].detach().requires_grad_(),))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_student_that_has_the_targets_masses_has_a_loss_and_gradient_of_zero(name: str) -> None:
    targets, tokens = random_targets(3)
    probs = torch.zeros(2, LENGTH, V, dtype=torch.float64)
    for example in range(2):
        for at in range(*targets.position_indptr[example : example + 2]):
            row, rest = probs[example, targets.positions[at] - 1], set(range(V))
            for mass, _, ids in targets.groups_at(at, tokens):
                share = torch.rand(len(ids), dtype=torch.float64) + 0.1
                row[sorted(ids)] = mass * share / share.sum()
                rest -= ids
            outside = float(targets.tails[at])
            if targets.open[at]:  # any share up to the most
                outside *= 0.9
                row *= 1 - outside
            row[sorted(rest)] = outside / max(len(rest), 1)
    probs[probs.sum(-1) == 0] = 1 / V
    logits = probs.clamp(min=1e-300).log().requires_grad_()
    found = loss_of(logits, targets, laid_out(targets, tokens), **OPTIONS[name])
    assert abs(found.loss.item()) < 1e-12
    assert float(torch.autograd.grad(found.loss, logits)[0].abs().max()) < 1e-12


def test_the_head_is_fused_as_the_logits_are() -> None:
    targets, tokens = random_targets(1)
    batch = laid_out(targets, tokens)
    hidden = torch.randn(2, LENGTH, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V + 2, 5, dtype=torch.float64, requires_grad=True)
    fused = loss_of(LmHead(hidden, weight), targets, batch)
    plain = loss_of(hidden @ weight.T, targets, batch)
    torch.testing.assert_close(fused.loss, plain.loss)
    for one, other in zip(
        torch.autograd.grad(fused.loss, (hidden, weight)),
        torch.autograd.grad(plain.loss, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_neither_blocks_nor_a_cut_batch_change_the_gradient() -> None:
    targets, tokens = random_targets(2)
    batch, chunks = laid_out(targets, tokens), chunks_of(targets)
    logits = student(2, padded=0)
    whole = loss_of(logits, targets, batch)
    small = loss_of(logits, targets, batch, block_size=1)
    torch.testing.assert_close(whole.loss, small.loss)
    halves = []
    for example in range(2):
        part = chunks.select(chunks.sample == example)
        own = TargetBatch.from_targets(targets, tokens, part, LENGTH)
        found = loss_of(logits, targets, own, chunks=part, normalizer=float(len(batch)))
        halves.append(found.loss)
    gradient = torch.autograd.grad(whole.loss, logits)[0]
    torch.testing.assert_close(torch.autograd.grad(sum(halves), logits)[0], gradient)


def test_chunks_may_come_in_any_order_and_without_a_target() -> None:
    targets, tokens = random_targets(5)
    chunks = chunks_of(targets)
    mixed = chunks.select(torch.randperm(len(chunks)))
    none = targets.positions[0] == 1
    assert none
    logits = student(5, padded=0)
    plain = loss_of(logits, targets, laid_out(targets, tokens))
    moved = TargetBatch.from_targets(targets, tokens, mixed, LENGTH)
    torch.testing.assert_close(loss_of(logits, targets, moved, chunks=mixed).loss, plain.loss)
    # The first chunk's targets taken away: it counts, and adds nothing.
    first = int((targets.chunks[: targets.position_indptr[1]] == 0).sum())
    weights = torch.ones(len(chunks), dtype=torch.float64)
    weights[0] = 0.0
    lacking = replace(
        laid_out(targets, tokens),
        chunk_ptr=laid_out(targets, tokens).chunk_ptr.clone(),
    )
    lacking.chunk_ptr[1:] -= first
    lacking = replace(
        lacking,
        rows=lacking.rows[first:],
        tails=lacking.tails[first:],
        open=lacking.open[first:],
        group_ptr=lacking.group_ptr[first:],
    )
    torch.testing.assert_close(
        loss_of(logits, targets, lacking).loss,
        loss_of(logits, targets, laid_out(targets, tokens), chunk_weights=weights).loss,
    )


def test_padding_on_the_left_moves_the_rows() -> None:
    targets, tokens = random_targets(4)
    logits = student(4, padded=0)
    padded = torch.cat([torch.full((2, 3, V), 7.0, dtype=torch.float64), logits], 1)
    plain = loss_of(logits, targets, laid_out(targets, tokens))
    moved = laid_out(targets, tokens, shift=3)
    torch.testing.assert_close(loss_of(padded, targets, moved, shift=3).loss, plain.loss)


def test_chunk_weights_are_factors() -> None:
    targets, tokens = random_targets(6)
    batch = laid_out(targets, tokens)
    logits = student(6, padded=0)
    weights = torch.rand(len(batch), dtype=torch.float64)

    def weighted(factors: Tensor) -> Tensor:
        return loss_of(logits, targets, batch, chunk_weights=factors, normalizer=1.0).loss

    each = [weighted(row).item() for row in torch.eye(len(batch), dtype=torch.float64)]
    assert math.isclose(
        weighted(weights).item(), float(weights @ torch.tensor(each, dtype=torch.float64))
    )
    gradients = [torch.autograd.grad(weighted(w), logits)[0] for w in (weights, 2 * weights)]
    torch.testing.assert_close(2 * gradients[0], gradients[1])


def test_half_precision_stays_near_and_no_chunk_gives_zero_with_a_graph() -> None:
    targets, tokens = random_targets(7)
    batch = laid_out(targets, tokens)
    logits = student(7, padded=0)
    exact = loss_of(logits, targets, batch).loss.item()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        found = loss_of(logits.to(dtype), targets, batch).loss.item()
        assert abs(found - exact) < tolerance * exact
    none = ChunkBatch.empty()
    nothing = TargetBatch.from_targets(targets, tokens, none, LENGTH)
    empty = loss_of(logits, targets, nothing, chunks=none)
    assert empty.loss.item() == 0.0
    assert float(torch.autograd.grad(empty.loss, logits)[0].abs().sum()) == 0.0


def test_a_hopeless_student_gets_a_finite_loss_and_gradient() -> None:
    targets, tokens = random_targets(8)
    logits = (200 * student(8, padded=0)).detach().float().requires_grad_()
    found = loss_of(logits, targets, laid_out(targets, tokens), normalizer=1.0)
    gradient = torch.autograd.grad(found.loss, logits)[0]
    assert torch.isfinite(found.loss)
    assert torch.isfinite(gradient).all()
    expected = slow_loss(logits.double(), targets, tokens)
    if torch.isfinite(expected):
        torch.testing.assert_close(found.loss.double(), expected, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    targets, tokens = random_targets(0)
    batch = laid_out(targets, tokens)
    logits = student(0, padded=0)
    others = replace(batch.members, order=batch.members.order + V)
    with pytest.raises(ShapeError, match="chunks of this batch"):
        loss_of(logits, targets, batch, chunks=ChunkBatch.empty())
    with pytest.raises(ShapeError, match="padded length"):
        loss_of(logits, targets, replace(batch, rows=batch.rows + 100))
    with pytest.raises(ShapeError, match="this student's tokenizer"):
        loss_of(logits, targets, replace(batch, members=others))
    for given in ({"chain_rule": True}, {"direction": "reverse"}):
        with pytest.raises(OptionError, match="chain_rule"):
            loss_of(logits, targets, batch, depth_weights=(2.0,), **given)
    with pytest.raises(OptionError, match="chain_rule"):
        loss_of(logits, targets, batch, direction="reverse", chain_rule=False)
    with pytest.raises(OptionError, match="temperature"):
        loss_of(logits, targets, batch, temperature=2.0)
    with pytest.raises(ShapeError, match="one per sample"):
        TargetBatch.from_targets(targets, tokens, chunks_of(targets), LENGTH, [0])
    assert batch.to("cpu").rows.equal(batch.rows)
