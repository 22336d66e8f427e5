"""exact-kl against a plain float64 loop over positions, groups and tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from xtoken.errors import OptionError, ShapeError
from xtoken.losses.engine.lm_head import LmHead
from xtoken.losses.exact_kl.loss import exact_kl
from xtoken.losses.exact_kl.target_batch import TargetBatch
from xtoken.targets import Targets

V, LENGTH = 11, 9


def random_targets(seed: int, *, examples: int = 2, tail: bool = True) -> tuple[Targets, np.ndarray]:
    """Positions in chunks of one to three, groups of random tokens, some positions open."""
    rng = np.random.default_rng(seed)
    tokens = np.arange(V, dtype=np.int64)
    fields: dict[str, list] = {name: [] for name in Targets.__dataclass_fields__}
    for name in ("position_indptr", "group_indptr", "range_indptr"):
        fields[name] = [0]
    for _ in range(examples):
        position, chunk = 1, 0
        while position < LENGTH:
            for _ in range(int(rng.integers(1, 4))):
                if position == LENGTH:
                    break
                cuts = np.sort(rng.choice(np.arange(V + 1), size=7, replace=False))
                count = 3
                is_open = bool(rng.random() < 0.3)
                has_tail = tail and not is_open
                masses = rng.exponential(size=count + 1) * ([1] * count + [has_tail])
                masses /= masses.sum()
                for group in range(count):
                    fields["probs"].append(masses[group])
                    fields["depths"].append(int(rng.integers(0, 3)) if not is_open else 0)
                    fields["starts"].append(cuts[2 * group])
                    fields["ends"].append(cuts[2 * group + 1])
                    fields["range_indptr"].append(len(fields["starts"]))
                fields["tails"].append(masses[-1])
                fields["open"].append(is_open)
                fields["group_indptr"].append(len(fields["probs"]))
                fields["positions"].append(position)
                fields["chunks"].append(chunk)
                position += 1
            chunk += 1
        fields["position_indptr"].append(len(fields["positions"]))
    types = {"tails": np.float64, "probs": np.float64, "open": np.bool_, "depths": np.uint8}
    arrays = {k: np.array(v, dtype=types.get(k, np.int64)) for k, v in fields.items()}
    return Targets(**arrays), tokens


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
            if not targets.open[at]:
                q.append(float(targets.tails[at]))
                p.append(row[sorted(rest)].sum())
                depths.append(0)
            p = torch.stack(p)
            total = total + position_loss(
                torch.tensor(q, dtype=torch.float64), p / p.sum(), depths, direction, beta,
                depth_weights,
            )  # fmt: skip
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


def student(seed: int, padded: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, LENGTH, V + padded, generator=generator, dtype=torch.float64)
    return logits.requires_grad_()


OPTIONS = {
    "forward": {},
    "plain sum": {"depth_weights": (1.0,)},
    "depth weights": {"depth_weights": (1.0, 0.5, 2.0)},
    "reverse": {"direction": "reverse"},
    "jsd": {"direction": "jsd", "beta": 0.3},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("seed", range(4))
def test_value_and_gradient_are_those_of_the_definition(name: str, seed: int) -> None:
    targets, tokens = random_targets(seed)
    batch = TargetBatch.from_targets(targets, tokens, LENGTH)
    logits = student(seed)
    found = exact_kl(
        logits, batch, student_vocab_size=V, normalizer=1.0, block_size=3, **OPTIONS[name]
    )
    expected = slow_loss(logits, targets, tokens, **OPTIONS[name])
    torch.testing.assert_close(found.loss, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found.loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)
    assert int(found.num_chunks) == len(batch)


@pytest.mark.parametrize("name", ["forward", "plain sum", "jsd"])
def test_gradcheck(name: str) -> None:
    targets, tokens = random_targets(9, examples=1)
    batch = TargetBatch.from_targets(targets, tokens, LENGTH)

    def loss(logits: Tensor) -> Tensor:
        return exact_kl(logits, batch, student_vocab_size=V, block_size=2, **OPTIONS[name]).loss

    assert torch.autograd.gradcheck(loss, (student(5)[:1].detach().requires_grad_(),))


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
            outside = 0.4 if targets.open[at] else float(targets.tails[at])
            row[sorted(rest)] = outside / len(rest)
            row /= row.sum()
    probs[probs.sum(-1) == 0] = 1 / V
    logits = probs.log().requires_grad_()
    batch = TargetBatch.from_targets(targets, tokens, LENGTH)
    found = exact_kl(logits, batch, **OPTIONS[name])
    assert abs(float(found.loss)) < 1e-12
    assert float(torch.autograd.grad(found.loss, logits)[0].abs().max()) < 1e-12


def test_the_head_is_fused_as_the_logits_are() -> None:
    targets, tokens = random_targets(1)
    batch = TargetBatch.from_targets(targets, tokens, LENGTH)
    hidden = torch.randn(2, LENGTH, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V + 2, 5, dtype=torch.float64, requires_grad=True)
    fused = exact_kl(LmHead(hidden, weight), batch, student_vocab_size=V)
    plain = exact_kl(hidden @ weight.T, batch, student_vocab_size=V)
    torch.testing.assert_close(fused.loss, plain.loss)
    for one, other in zip(
        torch.autograd.grad(fused.loss, (hidden, weight)),
        torch.autograd.grad(plain.loss, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_neither_blocks_nor_a_cut_batch_change_the_gradient() -> None:
    targets, tokens = random_targets(2)
    batch = TargetBatch.from_targets(targets, tokens, LENGTH)
    logits = student(2, padded=0)
    whole = exact_kl(logits, batch)
    small = exact_kl(logits, batch, block_size=1)
    torch.testing.assert_close(whole.loss, small.loss)
    middle = int(targets.position_indptr[1])
    halves = []
    for example in range(2):
        used = (np.arange(len(targets)) < middle) == (example == 0)
        part = TargetBatch.from_targets(targets, tokens, LENGTH, used=used)
        halves.append(exact_kl(logits, part, normalizer=float(len(batch))).loss)
    gradient = torch.autograd.grad(whole.loss, logits)[0]
    torch.testing.assert_close(torch.autograd.grad(sum(halves), logits)[0], gradient)


def test_padding_on_the_left_moves_the_rows() -> None:
    targets, tokens = random_targets(4)
    logits = student(4, padded=0)
    padded = torch.cat([torch.full((2, 3, V), 7.0, dtype=torch.float64), logits], 1)
    plain = exact_kl(logits, TargetBatch.from_targets(targets, tokens, LENGTH))
    moved = TargetBatch.from_targets(targets, tokens, LENGTH + 3, offsets=[3, 3])
    torch.testing.assert_close(exact_kl(padded, moved).loss, plain.loss)


def test_chunk_weights_are_factors_and_chunks_are_numbered_as_in_the_batch() -> None:
    targets, tokens = random_targets(6)
    per_example = [int(targets.chunks[at - 1]) + 1 for at in targets.position_indptr[1:]]
    batch = TargetBatch.from_targets(
        targets, tokens, LENGTH, chunk_starts=[0, per_example[0]]
    )
    assert batch.chunk_index.tolist() == list(range(sum(per_example)))
    logits = student(6, padded=0)
    weights = torch.rand(len(batch), dtype=torch.float64)
    found = exact_kl(logits, batch, chunk_weights=weights, normalizer=1.0)
    each = [
        float(exact_kl(logits, batch, chunk_weights=row, normalizer=1.0).loss)
        for row in torch.eye(len(batch), dtype=torch.float64)
    ]
    assert math.isclose(float(found.loss), float(weights @ torch.tensor(each).double()))
    gradients = [
        torch.autograd.grad(exact_kl(logits, batch, chunk_weights=w, normalizer=1.0).loss, logits)[0]
        for w in (weights, 2 * weights)
    ]
    torch.testing.assert_close(2 * gradients[0], gradients[1])


def test_half_precision_stays_near_and_no_target_gives_zero_with_a_graph() -> None:
    targets, tokens = random_targets(7)
    batch = TargetBatch.from_targets(targets, tokens, LENGTH)
    logits = student(7, padded=0)
    exact = float(exact_kl(logits, batch).loss)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        assert abs(float(exact_kl(logits.to(dtype), batch).loss) - exact) < tolerance * exact
    none = TargetBatch.from_targets(targets, tokens, LENGTH, used=np.zeros(len(targets), np.bool_))
    empty = exact_kl(logits, none)
    assert float(empty.loss) == 0.0
    assert float(torch.autograd.grad(empty.loss, logits)[0].abs().sum()) == 0.0


def test_a_hopeless_student_gets_a_finite_loss_and_gradient() -> None:
    targets, tokens = random_targets(8)
    batch = TargetBatch.from_targets(targets, tokens, LENGTH)
    logits = (200 * student(8, padded=0)).detach().float().requires_grad_()
    found = exact_kl(logits, batch)
    gradient = torch.autograd.grad(found.loss, logits)[0]
    assert torch.isfinite(found.loss)
    assert torch.isfinite(gradient).all()
    expected = slow_loss(logits.double(), targets, tokens)
    if torch.isfinite(expected):
        torch.testing.assert_close(
            found.loss.double() * len(batch), expected, rtol=1e-4, atol=1e-4
        )


def test_what_does_not_fit_is_refused() -> None:
    targets, tokens = random_targets(0)
    batch = TargetBatch.from_targets(targets, tokens, LENGTH)
    logits = student(0, padded=0)
    with pytest.raises(ShapeError, match="pass the targets of this batch"):
        exact_kl(logits[:1], batch)
    with pytest.raises(ShapeError, match="this student's tokenizer"):
        exact_kl(logits[..., :3], batch)
    with pytest.raises(OptionError, match="direction"):
        exact_kl(logits, batch, direction="sideways")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="depth_weights"):
        exact_kl(logits, batch, direction="reverse", depth_weights=(1.0,))
    with pytest.raises(ShapeError, match="padded length"):
        TargetBatch.from_targets(targets, tokens, 3)
    with pytest.raises(ShapeError, match="one per target"):
        TargetBatch.from_targets(targets, tokens, LENGTH, used=np.ones(2, np.bool_))
    assert replace(batch).to("cpu").rows.equal(batch.rows)
