"""From a teacher to the predictions of sequences, and from these to the signal of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from xtoken.errors import OptionError
from xtoken.losses import TeacherTopK
from xtoken.teachers.kept_rows import KeptRows, Rest
from xtoken.teachers.live import LiveTeacher
from xtoken.teachers.predictions import Predictions, overflow
from xtoken.tensors.rows import block_rows
from xtoken.tensors.teacher_spread import TeacherSpread

Ids: TypeAlias = NDArray[np.int64]


def padded_signal(
    read: Callable[[Ids], Predictions],
    ids: Tensor,
    attention_mask: Tensor,
    tokenizer: str = "",
    *,
    checked: bool = False,
) -> TeacherTopK:
    """The predictions of the sequences of a padded batch, on the device of its ids.

    Args:
        read: gives the predictions of one sequence without padding.
        tokenizer: fingerprint of the teacher's vocabulary; empty where it is not known.
        checked: whether the predictions are known to be some, as `Predictions.check` says.
        ids, attention_mask, and what is returned: as in `TopKStore.signal`.
    """
    rows, width = ids.shape
    places = [_places(row) for row in attention_mask.bool().cpu()]
    stored = [read(row[at].numpy()) for row, at in zip(ids.cpu(), places, strict=True)]
    count = max(item.ids.shape[1] for item in stored)
    columns = torch.empty(rows, width, count, dtype=torch.int64, device="cpu")
    log_probs = torch.empty(rows, width, count, device="cpu")
    token_log_probs = torch.zeros(rows, width, device="cpu")
    for row, (at, item) in enumerate(zip(places, stored, strict=True)):
        if len(item.ids) < width:
            columns[row] = torch.arange(count, device="cpu")
            log_probs[row] = -float(np.log(count))
        missing = (0, count - item.ids.shape[1])
        columns[row, at] = F.pad(torch.from_numpy(item.ids), missing)
        log_probs[row, at] = F.pad(torch.from_numpy(item.log_probs), missing, value=-torch.inf)
        token_log_probs[row, at] = torch.from_numpy(item.token_log_probs)
    signal = TeacherTopK(
        columns,
        log_probs,
        token_log_probs=token_log_probs,
        teacher_fingerprint=tokenizer or None,
        validate=not checked,
    )
    return signal.to(ids.device)


def padded_spread(
    read: Callable[[Ids], KeptRows], ids: Tensor, attention_mask: Tensor, tokenizer: str = ""
) -> TeacherSpread:
    """The kept rows of the sequences of a padded batch, on the device of its ids.

    Args:
        read: gives those of one sequence without padding.
        ids, attention_mask, tokenizer: as in `padded_signal`.
    """
    rows, width = ids.shape
    places = [_places(row) for row in attention_mask.bool().cpu()]
    stored = [read(row[at].numpy()) for row, at in zip(ids.cpu(), places, strict=True)]
    # Sequences of one file have one prior.
    found = {id(item.log_prior): item.log_prior for item in stored}
    index = {key: at for at, key in enumerate(found)}
    log_priors = torch.from_numpy(
        np.stack([prior for prior in found.values() if prior is not None])
    )
    start, count, prior = torch.zeros(3, rows, width, dtype=torch.int64, device="cpu")
    log_scale = torch.zeros(rows, width, device="cpu")
    before = 0
    for row, (at, item) in enumerate(zip(places, stored, strict=True)):
        prior[row] = index[id(item.log_prior)]
        log_scale[row, at] = torch.from_numpy(item.log_scale())
        start[row, at] = torch.from_numpy(before + item.counts.cumsum() - item.counts)
        count[row, at] = torch.from_numpy(item.counts)
        before += len(item.ids)
    signal = TeacherSpread(
        torch.from_numpy(np.concatenate([item.ids for item in stored]).astype(np.int32)),
        torch.from_numpy(np.concatenate([item.log_probs for item in stored])),
        start,
        count,
        log_priors,
        prior,
        log_scale,
        int(count.max()),
        tokenizer or None,
    )
    return signal.to(ids.device)


def _places(mask: Tensor) -> Tensor | slice:
    """Where a row has tokens: a slice, unless something stands between them."""
    found = mask.nonzero().flatten()
    if not len(found):
        return slice(0, 0)
    first, last = int(found[0]), int(found[-1])
    return slice(first, last + 1) if len(found) == last - first + 1 else found


def predict(teacher: LiveTeacher, batch: Sequence[Ids], top_k: int) -> list[Predictions]:
    """The `top_k` likeliest columns of sequences, by one forward pass.

    Raises:
        OptionError: the teacher has fewer columns.
    """
    ids, logits = _run(teacher, batch)
    if logits.shape[-1] < top_k:
        raise OptionError(
            f"top_k = {top_k}, but the teacher has {logits.shape[-1]} columns; pass a smaller top_k"
        )
    predictions = []
    for row, sequence in enumerate(batch):
        values = logits[row, : len(sequence)].float()  # [T, V]
        total = values.logsumexp(-1, keepdim=True)  # [T, 1]
        top = values.topk(top_k, dim=-1)
        following = ids[row, 1 : len(sequence), None].to(values.device)
        tokens = F.pad((values[:-1].gather(1, following) - total[:-1])[:, 0], (0, 1))  # [T]
        stored = [part.cpu().numpy() for part in (top.indices, top.values - total, tokens)]
        predictions.append(Predictions(stored[0], stored[1], stored[2]))
    return predictions


@torch.no_grad()
def predict_rows(
    teacher: LiveTeacher, batch: Sequence[Ids], top_k: int, min_prob: float
) -> tuple[list[KeptRows], Rest]:
    """All columns of at least `min_prob`, at most the `top_k` likeliest, and the token that
    follows; and what the rows leave to other columns. By one forward pass.

    Raises:
        NonFiniteError: the teacher predicts NaN.
    """
    ids, logits = _run(teacher, batch)
    columns = logits.shape[-1]
    mass, left = torch.zeros(2, columns, dtype=torch.float64, device=logits.device)
    step, found = block_rows(columns, logits.device), []
    for row, sequence in enumerate(batch):
        length = len(sequence)
        following = ids[row, 1:length].to(logits.device)
        parts = []
        for start in range(0, length, step):
            stop = min(start + step, length)
            rows = torch.log_softmax(logits[row, start:stop].float(), -1)  # [N, V]
            if bool(torch.isnan(rows).any()):
                position = start + int(torch.isnan(rows).any(-1).nonzero()[0])
                raise overflow(math.nan, position, length)
            next_tokens = following[start:stop]
            kept = _kept(rows, next_tokens, min(top_k, columns), min_prob)
            probs = torch.exp(rows)
            rest = probs.masked_fill(kept, 0.0)
            mass += rest.sum(0)
            each = rest.sum(1)
            left += each.sum() - each @ kept.to(each.dtype)
            at, column = kept.nonzero(as_tuple=True)
            tokens = F.pad(rows[: len(next_tokens)].gather(1, next_tokens[:, None])[:, 0],
                           (0, stop - start - len(next_tokens)))  # fmt: skip
            parts.append(
                (kept.sum(1), column, rows[at, column], torch.log1p(-each.clamp(max=0.999999)),
                 tokens)
            )  # fmt: skip
        arrays = [torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True)]
        found.append(KeptRows(*arrays))
    return found, Rest(mass.cpu().numpy(), left.cpu().numpy())


def _kept(rows: Tensor, following: Tensor, top_k: int, min_prob: float) -> Tensor:
    """[N, V] bool: the columns that are kept; `following` may be shorter by the last row."""
    kept = rows >= float(np.log(min_prob))
    kept.scatter_(1, rows.argmax(1, keepdim=True), True)
    many = (kept.sum(1) > top_k).nonzero().flatten()
    if len(many):
        best = rows[many].topk(top_k).indices
        kept[many] = torch.zeros_like(kept[many]).scatter_(1, best, True)
    count = len(following)
    kept[:count].scatter_(1, following[:, None], True)
    return kept


def _run(teacher: LiveTeacher, batch: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Ids [B, T] on the CPU, padded on the right, and the teacher's logits of them."""
    ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64, device="cpu")
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence)] = torch.from_numpy(sequence)
        mask[row, : len(sequence)] = 1
    return ids, teacher.logits(ids, mask)


def by_tokens(sequences: Sequence[Ids], limit: int) -> Iterator[list[Ids]]:
    """Cut a list of rising lengths into groups of at most `limit` padded tokens, or of one item."""
    group: list[Ids] = []
    for sequence in sequences:
        if group and len(sequence) * (len(group) + 1) > limit:
            yield group
            group = []
        group.append(sequence)
    if group:
        yield group
