"""What a model has positions and an embedding for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from xtoken.errors import OptionError, TokenIdError
from xtoken.vocab.head_size import least_columns

# Families whose positions are numbered from that of the padding token on.
_PADDED_POSITIONS = frozenset(
    "roberta roberta-prelayernorm camembert xlm-roberta xlm-roberta-xl data2vec-text xmod".split()
)


def position_limit(config: object) -> int | None:
    """The positions that a transformers config has; None where it sets no limit."""
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    # MPT's slopes end there.
    limit = getattr(text, "max_position_embeddings", getattr(text, "max_seq_len", None))
    if not isinstance(limit, int) or limit <= 0:
        return None
    if getattr(text, "model_type", None) in _PADDED_POSITIONS:
        # The first token is at the place after that of padding.
        limit -= (getattr(text, "pad_token_id", None) or 0) + 1
    return limit if limit > 0 else None


def positions_of(model: nn.Module) -> int | None:
    """The positions that a model has; None where it sets no limit, or is none of transformers."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) in _PADDED_POSITIONS:
        # Its own padding: a Trainer writes that of the tokenizer into the config.
        for name, each in model.named_modules():
            padding = getattr(each, "padding_idx", None)
            if name.endswith("position_embeddings") and padding is not None:
                return int(cast(Any, each).num_embeddings) - int(padding) - 1
    return position_limit(config)


def check_positions(
    model: nn.Module, inputs: Mapping[str, Tensor], side: str | None = None
) -> None:
    """Refuse rows with more tokens than the model has positions: what it says there is noise.

    Args:
        model: a transformers model; others are not checked.
        inputs: what it is called with; padding is no token, and packed documents count each alone.
        side: for the message; None for the model's class.

    Raises:
        OptionError: names the model and its limit.
    """
    limit = positions_of(model)
    ids = inputs.get("input_ids")
    if limit is None or ids is None or ids.shape[1] <= limit:
        return  # so only rows that may be too long are read back from a GPU
    length = ids.shape[1]
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if positions is not None:
        length = int(positions.max()) + 1
    elif mask is not None:
        length = int(mask.sum(1).max())
    if length > limit:
        raise OptionError(
            f"a row of {length} tokens, but the {side or type(model).__name__} has {limit} "
            f"positions; cut the texts at {limit} tokens or less (max_tokens; max_length in TRL)"
        )


def check_ids(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    side: str | None = None,
    tokens: int | None = None,
) -> None:
    """Refuse ids of which the model's embedding has no row, as of a token that was added without
    `resize_token_embeddings`; torch would say no more than "index out of range".

    Args:
        model: a transformers model; others are not checked.
        inputs: what it is called with.
        side: for the message; None for the model's class.
        tokens: of its tokenizer: where the model has as many rows no id is looked at, which on a
            GPU would wait for it. None looks.

    Raises:
        TokenIdError: names the token and the rows.
    """
    ids, rows = inputs.get("input_ids"), embedding_rows(model)
    if ids is None or rows is None or not ids.numel() or (tokens is not None and tokens <= rows):
        return
    highest = int(ids.max())
    if highest < rows:
        return
    name, size = side or type(model).__name__, max(tokens or 0, highest + 1)
    if rows < least_columns(size):
        raise TokenIdError(
            f"the batch holds token {highest}, but the {name}'s embedding has {rows} rows; this is "
            "another model's tokenizer: pass the one of this model"
        )
    mask = inputs.get("attention_mask")
    if mask is not None and int(ids.masked_fill(mask == 0, 0).max()) < rows:
        raise TokenIdError(
            f"the batch is padded with token {highest}, but the {name}'s embedding has {rows} rows;"
            " pad with a token that it has (tokenizer.pad_token = tokenizer.eos_token), or call "
            f"model.resize_token_embeddings({size})"
        )
    raise TokenIdError(
        f"the batch holds token {highest}, but the {name}'s embedding has {rows} rows; call "
        f"model.resize_token_embeddings({size}), or leave out the texts with that token"
    )


def embedding_rows(model: nn.Module) -> int | None:
    """The rows of a transformers model's embedding, those of all its shards; None where it has
    none that is known."""
    if not hasattr(model, "get_input_embeddings"):
        return None
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:  # of models with a table of another kind
        return None
    rows = getattr(table, "num_embeddings", None)  # the weight's own shape may be a shard's
    return rows if isinstance(rows, int) and rows > 0 else None
