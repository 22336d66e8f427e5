"""The tables of a model that have a row per token, refused where they cannot be transferred."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from xtoken.errors import ArgumentTypeError, ModelSourceError
from xtoken.pair import Pair
from xtoken.projection import Projection
from xtoken.vocab.display import special_name
from xtoken.vocab.head_size import least_columns, most_columns

# Tables are padded to a multiple of this, or of a multiple of it.
_LEAST_MULTIPLE = 8


MERGE_ADAPTERS = (
    "merge them first: peft.AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload()"
)


def with_all_pieces(pair: Pair, decay: float) -> Pair:
    """The pair whose W has all of `max_pieces`: of even weights a smaller `top_k` would take pieces
    out again."""
    options = pair.projection_options
    return pair.with_options(decay=decay, top_k=max(options.top_k, options.max_pieces))


def parts(model: nn.Module) -> tuple[nn.Embedding, nn.Linear | None]:
    """The embedding and the head; refused where they are no plain tables of floats.

    Raises:
        ArgumentTypeError: the model is not one of transformers.
        ModelSourceError: its parts are of another kind, or it has adapters.
    """
    if not hasattr(model, "resize_token_embeddings"):
        raise ArgumentTypeError(
            f"model is a {type(model).__name__}; pass a model of transformers, as "
            "AutoModelForCausalLM.from_pretrained gives it"
        )
    if _has_adapters(model):
        raise ModelSourceError(
            f"{type(model).__name__} has adapters, which were made for the rows as they are and "
            f"would be all that is saved; {MERGE_ADAPTERS}"
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


def _has_adapters(model: nn.Module) -> bool:
    """Whether peft has wrapped the model, or put layers into it; peft need not be installed."""
    if hasattr(model, "get_base_model") or getattr(model, "_hf_peft_config_loaded", False):
        return True
    return any(hasattr(module, "adapter_layer_names") for module in model.modules())


def within(pair: Pair, embedding: nn.Embedding, head: nn.Linear | None) -> Projection:
    """W onto the rows that the model has.

    Raises:
        ModelSourceError: they are more or fewer than a model of the pair's teacher has.
    """
    projection = pair.projection
    new, size = projection.shape
    rows = embedding.weight.shape[0]
    if head is not None:
        rows = min(rows, head.weight.shape[0])
    if rows > size:
        refuse_too_many(rows, size, new)
    if rows >= size:
        return projection
    if rows < least_columns(size):
        raise ModelSourceError(
            f"the model has {rows} embedding rows, its tokenizer {size} tokens; pass the model's "
            "own tokenizer as the pair's teacher"
        )
    name = special_name(pair.teacher_vocab, rows)
    warnings.warn(
        f"the model has {rows} embedding rows, its tokenizer {size} tokens: the last "
        f"{size - rows} ({name}, ...) have no row to give",
        stacklevel=5,
    )
    return projection.limited(projection.shape[0], rows)


def refuse_too_many(rows: int, size: int, new: int) -> None:
    """Refuse what is no padding: by its number, or as it is the other tokenizer's own."""
    exchanged = rows == new and rows % _LEAST_MULTIPLE
    if rows <= most_columns(size) and not exchanged:
        return
    why, remedy = "", "pass the model's own tokenizer as the pair's teacher"
    if rows == new:
        why, remedy = ", the new one as many", "exchange the pair, Pair(new, the model's own)"
    raise ModelSourceError(
        f"the model has {rows} embedding rows, its tokenizer {size} tokens{why}, where padding "
        f"adds {most_columns(size) - size} at most; {remedy}, or take off rows that no token has: "
        f"model.resize_token_embeddings({size})"
    )


def refuse_other_tables(
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


def is_tied(embedding: nn.Embedding, head: nn.Linear | None) -> bool:
    """Whether the head has no rows of its own."""
    return head is None or head.weight is embedding.weight


def declare_tie(model: Any, embedding: nn.Embedding, head: nn.Linear | None) -> None:
    """Have the configurations say whether head and embedding are one parameter.

    By them transformers ties a model that is resized or loaded: one with two tables, whose config
    calls them tied, would lose its embedding.

    Raises:
        ModelSourceError: the class goes by something else; nothing has changed then.
    """
    if head is None:
        return
    tied = is_tied(embedding, head)
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}
    before = {key: getattr(config, "tie_word_embeddings", None) for key, config in configs.items()}
    for key, config in configs.items():
        if bool(before[key]) != tied:
            config.tie_word_embeddings = tied
    heads = {
        name for name, each in model.named_parameters(remove_duplicate=False) if each is head.weight
    }
    if bool(heads & model.get_expanded_tied_weights_keys(all_submodels=True).keys()) == tied:
        return
    for key, config in configs.items():
        if bool(before[key]) != tied:
            config.tie_word_embeddings = before[key]
    raise tie_error(model, tied)


def tie_error(model: nn.Module, tied: bool) -> ModelSourceError:
    """Head and embedding are not what the class makes of them."""
    name = type(model).__name__
    if tied:
        return ModelSourceError(
            f"head and embedding are one parameter, but {name} has no such tie; give the head "
            "rows of its own: head.weight = torch.nn.Parameter(head.weight.detach().clone())"
        )
    return ModelSourceError(
        f"head and embedding are two parameters, but {name} ties them whatever its config says; "
        "give it one table: model.tie_weights()"
    )
