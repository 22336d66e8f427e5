"""Random targets, batches of them and students, for the tests of exact-kl."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from xtoken import Projection, Vocab
from xtoken.losses import LmHead, LossInputs, LossOptions, LossOutput, PairParts, SharedLogits
from xtoken.losses.exact_kl.loss import exact_kl
from xtoken.targets import TargetBuilder, Targets
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.target_batch import TargetBatch

V, LENGTH = 11, 9


@functools.cache
def pair(size: int = V) -> PairParts:
    vocab = Vocab.from_tokens([bytes([97 + i]) for i in range(size)], ranked=True)
    projection = Projection.build(vocab, vocab, cache_dir=False)
    return PairParts((size, size), targets=TargetBuilder(projection))


def chunks_of(targets: Targets, shift: int = 0) -> ChunkBatch:
    """The chunks that the targets name, as a batch whose teacher has the student's tokens."""
    ranges = []
    for sample in range(len(targets.position_indptr) - 1):
        here = slice(*targets.position_indptr[sample : sample + 2])
        for chunk in np.unique(targets.chunks[here]):
            at = targets.positions[here][targets.chunks[here] == chunk] + shift
            ranges.append((sample, at.min(), at.max() + 1, at.min(), at.max() + 1))
    return ChunkBatch.from_ranges(*torch.tensor(ranges, dtype=torch.int64).reshape(-1, 5).T)


def laid_out(targets: Targets, tokens: np.ndarray, shift: int = 0) -> TargetBatch:
    columns = [shift] * (len(targets.position_indptr) - 1)
    chunks = chunks_of(targets, shift)
    return TargetBatch.from_targets(targets, tokens, chunks, LENGTH + shift, columns)


def loss_of(
    logits: Tensor | LmHead | SharedLogits,
    targets: Targets,
    batch: TargetBatch,
    *,
    chunks: ChunkBatch | None = None,
    shift: int = 0,
    normalizer: float | None = None,
    chunk_weights: Tensor | None = None,
    **options: object,
) -> LossOutput:
    hidden = logits.hidden if isinstance(logits, LmHead) else logits
    hidden = logits.logits if isinstance(logits, SharedLogits) else hidden
    ids = torch.zeros(hidden.shape[:2], dtype=torch.int64)
    inputs = LossInputs(
        logits,
        torch.zeros(*hidden.shape[:2], V),
        chunks_of(targets, shift) if chunks is None else chunks,
        student_ids=ids,
        teacher_ids=ids,
        normalizer=normalizer,
        chunk_weights=chunk_weights,
        targets=batch,
    )
    return exact_kl(inputs, pair(), LossOptions(**options))  # type: ignore[arg-type]


def random_targets(
    seed: int, *, examples: int = 2, tail: bool = True, opened: bool = True
) -> tuple[Targets, np.ndarray]:
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
                is_open = bool(rng.random() < 0.3) and opened
                has_tail = tail and not is_open
                masses = rng.exponential(size=count + 1) * ([1] * count + [has_tail])
                masses /= masses.sum()
                for group in range(count):
                    fields["probs"].append(masses[group])
                    fields["depths"].append(int(rng.integers(0, 3)))
                    fields["starts"].append(cuts[2 * group])
                    fields["ends"].append(cuts[2 * group + 1])
                    fields["range_indptr"].append(len(fields["starts"]))
                # In an open position the most that all others may have.
                fields["tails"].append(rng.random() if is_open else masses[-1])
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


def student(seed: int, padded: int = 2, samples: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(samples, LENGTH, V + padded, generator=generator, dtype=torch.float64)
    return logits.requires_grad_()
