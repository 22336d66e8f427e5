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
) -> TeacherTopK:
    """The predictions of the sequences of a padded batch, on the device of its ids.

    Args:
        read: gives the predictions of one sequence without padding.
        tokenizer: fingerprint of the teacher's vocabulary; empty where it is not known.
        ids, attention_mask, and what is returned: as in `TopKStore.signal`.
    """
    rows, width = ids.shape
    masks = attention_mask.bool().cpu()
    stored = [read(row[mask].numpy()) for row, mask in zip(ids.cpu(), masks, strict=True)]
    count = max(item.ids.shape[1] for item in stored)
    columns = torch.arange(count).expand(rows, width, count).clone()
    log_probs = torch.full((rows, width, count), -float(np.log(count)))
    token_log_probs = torch.zeros(rows, width)
    for row, (mask, item) in enumerate(zip(masks, stored, strict=True)):
        missing = (0, count - item.ids.shape[1])
        columns[row, mask] = F.pad(torch.from_numpy(item.ids), missing)
        log_probs[row, mask] = F.pad(torch.from_numpy(item.log_probs), missing, value=-torch.inf)
        token_log_probs[row, mask] = torch.from_numpy(item.token_log_probs)
    signal = TeacherTopK(
        columns,
        log_probs,
        token_log_probs=token_log_probs,
        teacher_fingerprint=tokenizer or None,
    )
    return signal.to(ids.device)


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
