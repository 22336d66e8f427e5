"""Where ESCD compares: the roots of a batch's chunks and the positions after their first token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xtoken.losses.engine.checks import check_token_ids
from xtoken.losses.engine.prepared import Ints, Items, Prepared
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.host import on_device
from xtoken.tensors.pair_parts import PairParts


@dataclass(frozen=True, eq=False)
class EventPlaces(Prepared):
    """The positions of a batch's chunks at which something is compared, in the chunks' order.

    Attributes:
        row_first, row_count: [C] on the host, each chunk's first predictor in the flattened
            positions, and 1, or 2 with the next where it has several tokens.
        teacher_index: [M] int64 rows of the flattened teacher positions: of each chunk its root,
            and that of the chunk of one token before it, where its first position follows that.
        teacher_ends: C + 1 numbers on the host, each chunk's range in them.
        children: the positions after a root's first student token, with that `token`, the root's
            teacher row `item`, and the numbers of groups `groups` and of tokens `tokens` that the
            token leaves to be completed.
    """

    row_first: Ints
    row_count: Ints
    teacher_index: Tensor
    teacher_ends: Ints
    children: Items


def event_places(
    pair: PairParts, chunks: ChunkBatch, student_ids: Tensor, teacher_ids: Tensor
) -> EventPlaces:
    """The places of a batch; ids on another device than the CPU are waited for.

    Raises:
        TokenIdError: an id inside a chunk is outside its vocabulary.
    """
    tables = pair.completions
    assert tables is not None
    host, device = chunks.host, chunks.device
    sizes = host.student_end - host.student_start
    base = host.sample * student_ids.shape[1]
    ids = student_ids.cpu().flatten()
    taken = torch.from_numpy(base + host.student_start)
    firsts = ids[taken]
    check_token_ids(firsts, pair.sizes[0], "student")
    first = firsts.numpy()
    before = _before(host.sample, host.student_start, host.student_end)
    roots = host.sample * teacher_ids.shape[1] + host.teacher_start - 1
    row_count = np.minimum(sizes, 2)
    ends = np.concatenate([[0], row_count.cumsum()]).astype(np.int64)
    counts = 1 + (before >= 0)
    teacher_ends = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
    index = np.zeros(teacher_ends[-1], np.int64)
    index[teacher_ends[:-1]] = roots
    linked = np.flatnonzero(before >= 0)
    index[teacher_ends[linked] + 1] = roots[before[linked]]
    long = np.flatnonzero(sizes > 1)
    row = np.concatenate([ends[linked], ends[long] + 1])
    token = np.concatenate([first[before[linked]], first[long]])
    item = np.concatenate([teacher_ends[linked] + 1, teacher_ends[long]])
    groups = tables.host_ptr[token + 1] - tables.host_ptr[token]
    some = np.flatnonzero(groups > 0)
    some = some[np.argsort(row[some], kind="stable")]
    columns = {
        "token": token, "item": item, "groups": groups, "tokens": tables.host_tokens[token]
    }  # fmt: skip
    return EventPlaces(
        host,
        base + host.student_start - 1,
        row_count,
        on_device(index, device),
        teacher_ends,
        Items.of(row[some], {name: values[some] for name, values in columns.items()}, device),
    )


def _before(sample: Ints, start: Ints, end: Ints) -> Ints:
    """[C] the chunk of one token that ends where each chunk starts; -1 for none."""
    short = np.flatnonzero(end - start == 1)
    found = np.full(len(start), -1, np.int64)
    if not len(short):
        return found
    key = sample[short] * 2**40 + end[short]
    order = np.argsort(key, kind="stable")
    wanted = sample * 2**40 + start
    at = np.searchsorted(key[order], wanted).clip(max=len(short) - 1)
    same = key[order][at] == wanted
    found[same] = short[order][at[same]]
    return found
