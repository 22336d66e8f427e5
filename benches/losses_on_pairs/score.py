"""Bits per byte on held-out text: of all chunks, by the class of their bytes and by their shape.

Both sides are scored on the same chunks, so that a student's number stands beside the teacher's: a
chunk spells the same bytes on both, and all tokens in it are predicted on both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from xtoken.data import Example
from xtoken.distillation import Batch, Distiller
from xtoken.teachers import causal_logits
from xtoken.vocab.classes import class_of
from xtoken.vocab.side import SideName

BATCH = 4


class Sums:
    """Nats and bytes by name."""

    def __init__(self) -> None:
        self.nats: dict[str, float] = {}
        self.bytes: dict[str, int] = {}

    def add(self, name: str, nats: float, size: int) -> None:
        self.nats[name] = self.nats.get(name, 0.0) + nats
        self.bytes[name] = self.bytes.get(name, 0) + size

    def scores(self) -> dict[str, float]:
        """Bits per byte by name."""
        found = {
            name: self.nats[name] / math.log(2) / size for name, size in sorted(self.bytes.items())
        }
        return {name: round(value, 5) for name, value in found.items()}

    def shares(self) -> dict[str, float]:
        """Share of the bytes by name."""
        return {name: round(size / self.bytes["all"], 5) for name, size in self.bytes.items()}


@torch.no_grad()
def score(
    model: nn.Module,
    side: SideName,
    examples: Sequence[Example],
    distiller: Distiller,
    kinds: Sequence[str] = (),
) -> Sums:
    """Of a model on examples: `all`, `class NAME`, `shape m:n`, and `kind NAME` where kinds are
    given, one per example."""
    model.eval()
    sums = Sums()
    for start in range(0, len(examples), BATCH):
        part = slice(start, start + BATCH)
        batch = distiller.collate(examples[part])
        nats = _token_nats(model, getattr(batch, side))
        _add_batch(sums, batch, side, nats, distiller, kinds[part])
    return sums


def _token_nats(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """[B, T] the negative log-likelihood of each token; 0 at the first."""
    ids = inputs["input_ids"]
    logits = causal_logits(model, ids, inputs["attention_mask"])
    nats = torch.zeros(ids.shape, dtype=torch.float64)
    for row in range(len(ids)):  # a row at a time: a large vocabulary in float32 is much memory
        log_probs = logits[row, :-1].float().log_softmax(-1)
        nats[row, 1:] = -log_probs.gather(1, ids[row, 1:, None])[:, 0].double()
    return nats


def _add_batch(
    sums: Sums,
    batch: Batch,
    side: SideName,
    nats: Tensor,
    distiller: Distiller,
    kinds: Sequence[str],
) -> None:
    chunks = batch.chunks
    vocab = distiller.pair.student_vocab
    before = np.concatenate([np.zeros((len(nats), 1)), nats.cumsum(1).numpy()], 1)
    start, end = getattr(chunks, f"{side}_start"), getattr(chunks, f"{side}_end")
    rows = chunks.sample.tolist()
    ranges = zip(start.tolist(), end.tolist(), strict=True)
    own = zip(chunks.student_start.tolist(), chunks.student_end.tolist(), strict=True)
    sizes = (chunks.teacher_end - chunks.teacher_start).tolist()
    ids = batch.student_ids.tolist()
    for row, (first, stop), (begin, finish), teacher_tokens in zip(
        rows, ranges, own, sizes, strict=True
    ):
        text = b"".join(vocab.token_bytes(ids[row][place]) for place in range(begin, finish))
        value = float(before[row, stop] - before[row, first])
        shape = f"{'1' if finish - begin == 1 else 'm'}:{'1' if teacher_tokens == 1 else 'n'}"
        names = ["all", f"class {class_of(text)}", f"shape {shape}"]
        if kinds:
            names.append(f"kind {kinds[row]}")
        for name in names:
            sums.add(name, value, len(text))
