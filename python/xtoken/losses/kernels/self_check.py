"""Each kernel against the torch path, on a small batch, where it runs for the first time.

Users' worst experience with kernels is silence: a compiler or a card that computes something else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from xtoken.losses.engine.merge import ChunkRows
from xtoken.losses.engine.row_blocks import BlockLoss, run_blocks
from xtoken.losses.engine.shared_gradient import CrossEntropyRows, SharedLogits
from xtoken.losses.engine.student_rows import LogitRows
from xtoken.losses.engine.teacher_rows import TeacherRows
from xtoken.losses.kernels.choice import forced
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.group_tokens import GroupTokens
from xtoken.tensors.pair_parts import PairParts
from xtoken.tensors.projection import SparseProjection
from xtoken.tensors.target_batch import TargetBatch
from xtoken.tensors.teacher_signal import TeacherTopK
from xtoken.tensors.trie import TrieSlots, first_pieces
from xtoken.trie import PieceTrie

if TYPE_CHECKING:
    from xtoken.losses.inputs import LossInputs, LossOptions
    from xtoken.losses.output import LossOutput

# Wider than a block, and no multiple of anything.
_SIZE, _PADDED, _ROWS = 1531, 1537, 5
_SCALE = 0.25

_SIDES: tuple[Literal["teacher"], Literal["student"]] = ("teacher", "student")
_Results = tuple[Tensor, Tensor, Tensor]


def same_vocab(device: torch.device, student: torch.dtype, teacher: torch.dtype) -> str | None:
    """See `choice.Check`."""
    from xtoken.losses.same_vocab_kl import SameVocabBlocks

    source, signal = some_logits(student, device, 0), some_logits(teacher, device, 1)
    rows = some_rows(device)
    loss = SameVocabBlocks(
        student=rows,
        teacher=TeacherRows(signal, rows, _SIZE, 1.5),
        top_k=None,
        by_student=False,
        tail_bucket=False,
        full_metrics=False,
        temperature=1.5,
        direction="forward",
        beta=0.5,
    )
    return difference(lambda: loss, source)


def cross_entropy(device: torch.device, student: torch.dtype, teacher: torch.dtype) -> str | None:
    """See `choice.Check`."""
    from xtoken.losses.cross_entropy import CrossEntropyBlocks

    targets = torch.tensor([0, 1024, _SIZE - 1, 700, 3], device=device)
    counted = torch.tensor([True, True, False, True, True], device=device)
    loss = CrossEntropyBlocks(student=some_rows(device), targets=targets, counted=counted)
    return difference(lambda: loss, some_logits(student, device, 0))


def p_kl(device: torch.device, student: torch.dtype, teacher: torch.dtype) -> str | None:
    """See `choice.Check`."""
    from xtoken.losses.inputs import LossInputs, LossOptions
    from xtoken.losses.p_kl.loss import p_kl

    pair = PairParts((_SIZE, _SIZE), projection=_some_w().to(device))
    mask = torch.arange(_ROWS + 1)[None] > 1  # the first row is cross-entropy's alone
    chunks = ChunkBatch.from_mask(mask).to(device)
    logits = some_logits(student, device, 0).requires_grad_()
    signal = some_logits(teacher, device, 1)
    stored = TeacherTopK.from_logits(signal[..., :_SIZE], 40, vocab_size=_SIZE)
    variants: dict[str, tuple[Tensor | TeacherTopK, LossOptions]] = {
        "all columns": (signal, LossOptions(temperature=1.5)),
        "a chunk's top-k": (signal, LossOptions(top_k=100, tail_bucket=True)),
        "a micro-batch's top-k": (signal, LossOptions(top_k=100, top_k_scope="microbatch")),
        "a stored top-k": (stored, LossOptions(tail_bucket=True)),
    }
    for name, (of, options) in variants.items():
        results = []
        for mode in ("torch", "triton"):
            with forced(mode), torch.enable_grad():
                inputs = LossInputs(logits, of, chunks)
                output = p_kl(inputs, pair, options)
                (grad,) = torch.autograd.grad(output.loss, logits)
                joined = _with_cross_entropy(p_kl, inputs, pair, options, mode == "triton")
                metrics = torch.stack(list(output.metrics.values()))
                grads = torch.stack([grad.float(), joined])
                results.append((output.loss.detach(), metrics, grads))
        found = _apart(results[0], results[1], logits.dtype)
        if found is not None:
            return f"{found} ({name})"
    return None


def prefix_kl(device: torch.device, student: torch.dtype, teacher: torch.dtype) -> str | None:
    """See `choice.Check`; of the slots: the root is P-KL's."""
    from xtoken.losses.inputs import LossInputs, LossOptions
    from xtoken.losses.prefix_kl.loss import prefix_kl

    # Tokens of one to three pieces out of few, on either side.
    pieces = [[s % 3, 3 + s % 5, 8 + s % 2][: 3 - s % 4 // 2] for s in range(_SIZE)]
    tries = [TrieSlots(PieceTrie.from_pieces(pieces, _SIZE, side=side)) for side in _SIDES]
    w = first_pieces(SparseProjection.identity(_SIZE), tries[0])
    pair = PairParts((_SIZE, _SIZE), projection=w, student_trie=tries[0], teacher_trie=tries[1])
    pair = pair.to(device)
    ids = torch.tensor([[7, 1, 4, 1, 4, 8]], device=device)
    # One student token of two and of three pieces, then one teacher token of three.
    ranges = torch.tensor([[0, 1, 2, 1, 3], [0, 2, 3, 3, 6]]).T
    other = torch.tensor([[0, 3, 6, 1, 2]]).T
    logits = some_logits(student, device, 0).requires_grad_()
    signal = some_logits(student, device, 1)
    results = []
    for mode in ("torch", "triton"):
        with forced(mode), torch.enable_grad():
            output, grads = [], []
            options = LossOptions(temperature=1.5, min_mass=0.0)
            metrics: list[Tensor] = []
            for each in (ranges, other):
                chunks = ChunkBatch.from_ranges(*each).to(device)
                inputs = LossInputs(logits, signal, chunks, student_ids=ids, teacher_ids=ids)
                found = prefix_kl(inputs, pair, options)
                grads.append(torch.autograd.grad(found.loss, logits)[0].float())
                shares = mode == "triton"
                grads.append(_with_cross_entropy(prefix_kl, inputs, pair, options, shares))
                output.append(found.loss.detach())
                metrics += found.metrics.values()
            results.append((torch.stack(output), torch.stack(metrics), torch.stack(grads)))
    return _apart(results[0], results[1], logits.dtype)


def _some_w() -> SparseProjection:
    """W with empty rows, columns of one, of several and of 60 tokens, and columns of none."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(0, 4, (_SIZE,), generator=generator)
    ids = torch.randint(0, _SIZE - 40, (int(sizes.sum()),), generator=generator)
    ids[torch.randperm(len(ids), generator=generator)[:60]] = 5
    ptr = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    weights = torch.rand(len(ids), generator=generator) + 0.1
    row = torch.repeat_interleave(torch.arange(_SIZE), sizes)
    weights = weights / torch.zeros(_SIZE).index_add_(0, row, weights)[row]
    return SparseProjection(ptr, ids, weights, (_SIZE, _SIZE))


def exact(device: torch.device, student: torch.dtype, teacher: torch.dtype) -> str | None:
    """See `choice.Check`."""
    from xtoken.losses.exact_kl.block import ExactKLBlocks

    targets = some_targets().to(device)
    for weights in (None, (1.0, 0.5)):
        loss = ExactKLBlocks(targets=targets, depth_weights=weights)
        found = difference(lambda: loss, some_logits(student, device, 0))  # noqa: B023
        if found is not None:
            return found if weights is None else f"{found} (without the chain rule)"
    return None


def some_targets() -> TargetBatch:
    """Targets of all rows but one, in three chunks; one of them open."""
    generator = torch.Generator().manual_seed(2)
    order = [torch.randperm(_SIZE, generator=generator) for _ in range(_ROWS)]
    # Groups of 0, 1, 40 and 700 tokens; one position without any.
    sizes = torch.tensor([0, 1, 40, 700] * (_ROWS - 1))
    probs = 0.2 * torch.rand(len(sizes), generator=generator, dtype=torch.float64)
    probs[sizes == 0] = 0.0
    open_ = torch.tensor([True] + [False] * (_ROWS - 1))
    ptr = torch.arange(_ROWS + 1).clamp(max=_ROWS - 1) * 4
    return TargetBatch(
        torch.tensor([3, 0, 5, 1, 4]),
        torch.tensor([0, 2, 2, _ROWS]),
        torch.where(open_, 0.3, 1.0 - _sums(probs, ptr)),
        open_,
        ptr,
        probs,
        torch.arange(len(sizes)) % 3,
        GroupTokens.of_lists(
            torch.nn.functional.pad(sizes.cumsum(0), (1, 0)),
            torch.cat([each[:741] for each in order[:-1]]),
        ),
    )


def _sums(values: Tensor, ptr: Tensor) -> Tensor:
    return torch.stack([values[a:b].sum() for a, b in itertools.pairwise(ptr.tolist())])


def some_logits(dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """[1, rows + 1, V'] random logits, some of them -inf, made on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(1, _ROWS + 1, _PADDED, generator=generator)
    if seed == 1:  # a teacher's alone: else the loss is infinite
        logits[torch.rand(logits.shape, generator=generator) < 0.1] = -torch.inf
    return logits.to(device, dtype)


def some_rows(device: torch.device) -> ChunkRows:
    """All rows but one, in no order."""
    index = torch.tensor([3, 0, 5, 1, 4], device=device)
    return ChunkRows(index, None, len(index))


def difference(make: Callable[[], BlockLoss], logits: Tensor) -> str | None:
    """What the kernel has otherwise than torch, of a loss of these logits; None for nothing."""
    source = LogitRows(logits, _SIZE)
    results = []
    for mode in ("torch", "triton"):
        with forced(mode), torch.no_grad():
            total, sums, grads = run_blocks(make(), source, _SCALE, 64, (True,))
        assert grads[0] is not None
        results.append((total, sums[:-1], grads[0].float()))
    with forced("triton"), torch.no_grad():
        in_two = make().in_two(source, _SCALE)
        if in_two is None:
            return _apart(results[0], results[1], logits.dtype)
        # Of two rows that the loss has, and one that it has not.
        index = torch.tensor([0, 2, 4], device=logits.device)
        targets = torch.tensor([7, _SIZE - 1, 1024], device=logits.device)
        shares = torch.log_softmax(logits[0, index, :_SIZE].float(), 1)
        logs = torch.logsumexp(logits[0, index, :_SIZE].float(), 1)
        scale = torch.full((), _SCALE, device=logits.device)
        joined = in_two[2](scale, CrossEntropyRows(index, targets, logs, scale))
        added = shares.exp().scatter_add(1, targets[:, None], -torch.ones_like(shares[:, :1]))
        both = results[0][2].clone()
        both[0, index, :_SIZE] += _SCALE * added
        grads_of = torch.stack([results[0][2], both]), torch.stack([results[1][2], joined.float()])
    one, other = ((*each[:2], grad) for each, grad in zip(results, grads_of, strict=True))
    return _apart(one, other, logits.dtype)


def _with_cross_entropy(
    loss: Callable[[LossInputs, PairParts, LossOptions], LossOutput],
    inputs: LossInputs,
    pair: PairParts,
    options: LossOptions,
    shares: bool,
) -> Tensor:
    """The gradient of a loss and a cross-entropy; `shares`: in one write."""
    from xtoken.losses.cross_entropy import cross_entropy

    logits = inputs.student
    assert isinstance(logits, Tensor)
    student = SharedLogits.of(logits) if shares else logits
    ids = torch.arange(_ROWS + 1, device=logits.device)[None] * 300
    entropy = cross_entropy(student, ids, ids != 600, vocab_size=_SIZE).loss
    total = loss(replace(inputs, student=student), pair, options).loss + 0.5 * entropy
    (grad,) = torch.autograd.grad(total, logits)
    return grad.float()


def _apart(one: _Results, other: _Results, dtype: torch.dtype) -> str | None:
    """What of loss, metrics and gradient is not the same, up to rounding; None for nothing."""
    names = ("the loss", "a metric", "the gradient")
    tolerances = (1e-3, 1e-3, 4 * torch.finfo(dtype).eps + 1e-3)
    for name, mine, found, tolerance in zip(names, one, other, tolerances, strict=True):
        apart = (mine - found).abs().amax() / mine.abs().amax().clamp(min=1e-6)
        if not bool(apart <= tolerance):  # NaN is none
            return f"{name} is off by {float(apart):.2g} of its largest value"
    return None
