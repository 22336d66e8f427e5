"""From a teacher to the predictions of sequences, and from these to the signal of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from xtoken.errors import OptionError
from xtoken.losses import TeacherTopK
from xtoken.teachers.live import LiveTeacher
from xtoken.teachers.predictions import Predictions

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
    columns = torch.empty(rows, width, count, dtype=torch.int64)
    log_probs = torch.empty(rows, width, count)
    token_log_probs = torch.zeros(rows, width)
    for row, (at, item) in enumerate(zip(places, stored, strict=True)):
        if len(item.ids) < width:
            columns[row] = torch.arange(count)
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
    width = max(map(len, batch))
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence)] = torch.from_numpy(sequence)
        mask[row, : len(sequence)] = 1
    logits = teacher.logits(ids, mask)
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
