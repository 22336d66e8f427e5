"""A model gets another tokenizer: its embedding and head rows are made anew from W."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from xtoken._checks import check_number
from xtoken.errors import OptionError
from xtoken.pair import Pair
from xtoken.tensors.host import ordinary
from xtoken.transfer.counts import TransferCounts, count_rows
from xtoken.transfer.parts import (
    declare_tie,
    is_tied,
    parts,
    refuse_other_tables,
    tie_error,
    with_all_pieces,
    within,
)
from xtoken.transfer.rows import transferred_rows
from xtoken.transfer.token_ids import new_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOST_PADDING = 2**16


@ordinary()
def transfer_embeddings(
    pair: Pair,
    model: PreTrainedModel,
    *,
    decay: float | None = 1.0,
    pad_to_multiple_of: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> TransferCounts:
    """Give a model the pair's student tokenizer; see `Pair.transfer_embeddings`."""
    rule = f"is out of range; expected a whole number of at least 1, at most {_MOST_PADDING}"
    check_number("pad_to_multiple_of", pad_to_multiple_of, 1, rule=rule, whole=True)
    if pad_to_multiple_of > _MOST_PADDING:
        raise OptionError(f"pad_to_multiple_of = {pad_to_multiple_of} {rule}")
    embedding, head = parts(model)
    tied = is_tied(embedding, head)
    if decay is not None:
        pair = with_all_pieces(pair, decay)
    w = within(pair, embedding, head)
    refuse_other_tables(model, embedding, head, w.shape[1])
    ids = new_token_ids(model, pair.student_vocab)
    declare_tie(model, embedding, head)
    tokens = w.shape[0]
    size = -(-tokens // pad_to_multiple_of) * pad_to_multiple_of
    mean_of = _with_text(pair, w.shape[1])

    old = [embedding.weight.detach()]
    if head is not None and not tied:
        old.append(head.weight.detach())
    if head is not None and head.bias is not None:
        old.append(head.bias.detach())
    new: list[Tensor] = []
    for place, matrix in enumerate(old):

        def told(rows: int, done: int = place * tokens) -> None:
            if progress is not None:
                progress(done + rows, len(old) * tokens)

        new.append(transferred_rows(matrix, w.csr, size, mean_of, told))
    with torch.random.fork_rng():  # transformers draws random rows first
        model.resize_token_embeddings(size, mean_resizing=False)
    embedding, head = parts(model)
    if is_tied(embedding, head) != tied:
        raise tie_error(model, tied)
    places = [embedding.weight]
    if head is not None and not tied:
        places.append(head.weight)
    if head is not None and head.bias is not None:
        places.append(head.bias)
    with torch.no_grad():
        for parameter, rows in zip(places, new, strict=True):
            parameter.copy_(rows)
    classes, unused = count_rows(pair.student_vocab, w)
    changed = ids.set()
    embedding.padding_idx = pair.student_vocab.roles.get("pad")  # the row that gets no gradient
    if ids.kept:
        warnings.warn(
            f"{', '.join(ids.kept)}: kept, as the configuration wants a number, though the new "
            "tokenizer has no such token; set it to one that it has, or do not use it",
            stacklevel=4,
        )
    return TransferCounts(classes, unused, size - tokens, tied, changed, ids.kept)


def _with_text(pair: Pair, rows: int) -> Tensor:
    """[n] int64, the rows of tokens with text: those of reserved tokens were never trained."""
    vocab = pair.teacher_vocab
    found = np.flatnonzero([bool(vocab.token_bytes(token)) for token in range(rows)])
    return torch.from_numpy(found if len(found) else np.arange(rows))
