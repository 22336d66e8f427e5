"""A model gets another tokenizer: its embedding and head rows are made anew from W."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from xtoken._checks import check_number
from xtoken.errors import ArgumentTypeError, ModelSourceError, OptionError
from xtoken.pair import Pair
from xtoken.projection import Projection
from xtoken.tensors.host import ordinary
from xtoken.transfer.counts import TransferCounts, count_rows
from xtoken.transfer.rows import transferred_rows
from xtoken.transfer.token_ids import set_token_ids
from xtoken.vocab.display import special_name

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
    embedding, head = _parts(model)
    tied = head is None or head.weight is embedding.weight
    if decay is not None:
        pair = pair.with_options(decay=decay)
    w = _within(pair, min(embedding.weight.shape[0], *_rows(head)))
    _refuse_other_tables(model, embedding, head, w.shape[1])
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
    embedding, head = _parts(model)
    places = [embedding.weight]
    if head is not None and not tied:
        places.append(head.weight)
    if head is not None and head.bias is not None:
        places.append(head.bias)
    with torch.no_grad():
        for parameter, rows in zip(places, new, strict=True):
            parameter.copy_(rows)
    classes, unused = count_rows(pair.student_vocab, w)
    changed = set_token_ids(model, pair.student_vocab)
    pad = model.config.get_text_config().pad_token_id
    embedding.padding_idx = pad  # the row that gets no gradient
    return TransferCounts(classes, unused, size - tokens, tied, changed)


def _parts(model: nn.Module) -> tuple[nn.Embedding, nn.Linear | None]:
    """The embedding and the head; refused where they are no plain tables of floats.

    Raises:
        ArgumentTypeError: the model is not one of transformers.
        ModelSourceError: its parts are of another kind.
    """
    if not hasattr(model, "resize_token_embeddings"):
        raise ArgumentTypeError(
            f"model is a {type(model).__name__}; pass a model of transformers, as "
            "AutoModelForCausalLM.from_pretrained gives it"
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    for name, part, kind in (("embedding", embedding, nn.Embedding), ("head", head, nn.Linear)):
        if part is None and name == "head":
            continue
        if not isinstance(part, kind) or not part.weight.is_floating_point():
            raise ModelSourceError(
                f"the {name} of {type(model).__name__} is {type(part).__name__}, expected "
                f"{kind.__name__} with floating-point weights; load the model without quantization "
                "and without adapters"
            )
    return embedding, head


def _rows(head: nn.Linear | None) -> tuple[int, ...]:
    return () if head is None else (head.weight.shape[0],)


def _within(pair: Pair, rows: int) -> Projection:
    """W onto the rows that the model has."""
    projection = pair.projection
    size = projection.shape[1]
    if rows >= size:
        return projection
    if rows < size - max(64, size // 100):
        raise ModelSourceError(
            f"the model has {rows} embedding rows, its tokenizer {size} tokens; pass the model's "
            "own tokenizer as the pair's teacher"
        )
    name = special_name(pair.teacher_vocab, rows)
    warnings.warn(
        f"the model has {rows} embedding rows, its tokenizer {size} tokens: the last "
        f"{size - rows} ({name}, ...) have no row to give",
        stacklevel=4,
    )
    return projection.limited(projection.shape[0], rows)


def _refuse_other_tables(
    model: nn.Module, embedding: nn.Embedding, head: nn.Linear | None, tokens: int
) -> None:
    """Refuse a model with further tables by token, which would stay in the old order."""
    near = max(64, tokens // 100)  # tables are padded, each on its own
    for name, module in model.named_modules():
        rows: int | None = None
        if isinstance(module, nn.Embedding) and module is not embedding:
            rows = module.num_embeddings
        elif isinstance(module, nn.Linear) and module is not head and head is not None:
            rows = module.out_features if module.out_features == head.out_features else None
        if rows is not None and abs(rows - tokens) <= near:
            raise ModelSourceError(
                f"{type(model).__name__} also has {name} of {rows} rows, one per token as it "
                "seems, which cannot be transferred; models with one embedding and one head can"
            )


def _with_text(pair: Pair, rows: int) -> Tensor:
    """[n] int64, the rows of tokens with text: those of reserved tokens were never trained."""
    vocab = pair.teacher_vocab
    found = np.flatnonzero([bool(vocab.token_bytes(token)) for token in range(rows)])
    return torch.from_numpy(found if len(found) else np.arange(rows))
