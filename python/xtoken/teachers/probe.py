"""What a model makes of its inputs, tried once with a few tokens, where no class or config says it.

A forward pass of a sharded model is one of all processes: what is asked here is asked right before
another pass, so that each process comes by, and answers of a time when the model was whole in one
process are not used later.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from xtoken.errors import ModelSourceError, OptionError
from xtoken.teachers.forward import embedding_rows
from xtoken.teachers.model_head import bare_model
from xtoken.teachers.offloaded import working_device

# The tokens of a document that is tried.
_DOCUMENT = 8
# By model, then by question, attention, device and whether it is sharded.
_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], bool | None]]
_KNOWN = weakref.WeakKeyDictionary()


def check_kind(model: nn.Module, side: str = "model") -> None:
    """Refuse what no next-token logits can come from, by config alone.

    Raises:
        ModelSourceError: an encoder-decoder.
        OptionError: an adapter of peft with tokens of its own before the text.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", None) is True:
        raise ModelSourceError(
            f"the {side} {_name(model)} is an encoder-decoder, which reads a text before it writes "
            "one; pass a causal language model, as AutoModelForCausalLM loads"
        )
    adapter = getattr(model, "active_peft_config", None)
    kind = str(getattr(getattr(adapter, "peft_type", None), "value", None))
    # These two stand in the cache of keys and values, and add no positions.
    if getattr(adapter, "is_prompt_learning", False) and kind not in ("PREFIX_TUNING", "CARTRIDGE"):
        raise OptionError(
            f"peft_type = {kind} puts tokens of its own before the text, so that the {side}'s "
            "logits are not those of its tokens; take LoRA or prefix tuning"
        )


def check_causal(model: nn.Module, side: str = "model") -> None:
    """Refuse a model that sees the tokens it should predict, as masked and permutation models do.

    Models of others than transformers, and those that a few tokens alone cannot be put to, are not
    tried.

    Raises:
        ModelSourceError: names the model.
        OptionError: as `check_kind`.
    """
    check_kind(model, side)
    if _answer(model, _hides_what_follows) is False:
        _KNOWN.pop(model, None)  # its config may be put right
        raise ModelSourceError(
            f"the {side} {_name(model)} sees the tokens that follow: another last token changes "
            "its logits before it, so there is nothing to predict; pass a causal language model "
            "(of BERT's family one that is loaded with is_decoder=True)"
        )


def keeps_documents_apart(model: nn.Module) -> bool:
    """Whether documents in one row, told by positions that start again, are read each alone; not
    where the model cannot be asked."""
    return _answer(model, _documents_apart) is True


def mixes_documents(model: nn.Module) -> bool:
    """Whether documents in one row are known to be read together, whatever their positions."""
    return _answer(model, _documents_apart) is False


def takes_left_padding(model: nn.Module) -> bool:
    """Whether a row padded on the left, with its positions, has the logits of the row alone.

    A sharded model is taken not to: a batch may be padded so in one process alone.
    """
    return not is_sharded(model) and _answer(model, _same_behind_padding) is True


def spoilt_by_left_padding(model: nn.Module, *, positions: bool = True) -> bool:
    """Whether a row is known to have other logits behind padding than alone.

    Args:
        positions: whether the model is given those that count tokens.
    """
    ask = _same_behind_padding if positions else _same_behind_mask
    return _answer(model, ask) is False


def position_inputs(attention_mask: Tensor) -> dict[str, Tensor]:
    """The positions of a batch that is padded on the left: they count tokens."""
    return {"position_ids": (attention_mask.long().cumsum(-1) - 1).clamp(min=0)}


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass is one of several processes together."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    if any(isinstance(each, DTensor) or hasattr(each, "ds_id") for each in model.parameters()):
        return True
    return any(type(each).__name__ == "FullyShardedDataParallel" for each in model.modules())


def _answer(model: nn.Module, ask: Callable[[nn.Module], bool | None]) -> bool | None:
    """None where the model cannot be asked."""
    bare = cast(Any, bare_model(model))
    config: Any = getattr(bare, "config", None)
    if not hasattr(config, "get_text_config") or not hasattr(bare, "get_output_embeddings"):
        return None
    attention = getattr(config.get_text_config(), "_attn_implementation", None)
    device = next((each.device for each in model.parameters()), None)
    key = (ask, attention, device, is_sharded(model))
    known = _KNOWN.setdefault(model, {})
    if key not in known:
        # Compiled, a pass of another shape takes minutes.
        whole = cast(nn.Module, getattr(model, "_orig_mod", model))
        with _aside(whole):
            known[key] = ask(whole)
    return known[key]


@contextlib.contextmanager
def _aside(model: nn.Module) -> Iterator[None]:
    """As in evaluation, without a graph; modes and torch's random numbers stay as they were."""
    modes = [(each, each.training) for each in model.modules()]
    devices = {each.device for each in model.parameters() if each.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(list(devices)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the call that is made next says it
        model.eval()
        try:
            yield
        finally:
            for each, training in modes:
                each.training = training


def _hides_what_follows(model: nn.Module) -> bool | None:
    found = _few_ids(model, 15)
    if found is None:
        return None
    rows = found.view(3, 5)
    ids = torch.cat([rows[:, [0, 1, 2, 3]], rows[:, [0, 1, 2, 4]]])  # two that end otherwise, x 3
    logits = _logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    if logits is None or not bool(logits[:, 2].isfinite().all()):
        return None
    one, other = logits[:, 2].float().chunk(2)
    # In a mixture of experts rounding may send a token elsewhere; not three times.
    near = _near(one, other, max(1e-4, _eps(model, logits)))
    return bool(near.any())


def _documents_apart(model: nn.Module) -> bool | None:
    found = _few_ids(model, 2 * _DOCUMENT)
    if found is None:
        return None
    first, second = found[:_DOCUMENT], found[_DOCUMENT:]
    places = torch.arange(_DOCUMENT, device=found.device)
    packed, others = (
        _logits(
            model,
            {
                "input_ids": torch.cat([document, second])[None],
                "position_ids": torch.cat([places, places])[None],
            },
        )
        for document in (first, first.flip(0))
    )
    rows = torch.stack([first, second])
    alone = _logits(model, {"input_ids": rows, "attention_mask": torch.ones_like(rows)})
    if packed is None or others is None or alone is None:
        return None
    packed, others = packed[0], others[0]
    # The same shapes with another document before: there is next to no rounding in what differs.
    sharp = _near(packed[_DOCUMENT:], others[_DOCUMENT:], max(1e-4, _eps(model, alone)))
    same = _near(alone.flatten(0, 1), packed, _rounding(model, alone))
    return bool(sharp.all() and same.all())


def _same_behind_mask(model: nn.Module) -> bool | None:
    return _same_behind_padding(model, positions=False)


def _same_behind_padding(model: nn.Module, *, positions: bool = True) -> bool | None:
    found = _few_ids(model, _DOCUMENT)
    if found is None:
        return None
    config = cast(Any, bare_model(model)).config.get_text_config()
    pad = getattr(config, "pad_token_id", None)
    ids = nn.functional.pad(found[None], (3, 0), value=pad if isinstance(pad, int) else 0)
    mask = nn.functional.pad(torch.ones_like(found)[None], (3, 0))
    inputs = {"input_ids": ids, "attention_mask": mask}
    padded = _logits(model, inputs | (position_inputs(mask) if positions else {}))
    alone = _logits(
        model, {"input_ids": found[None], "attention_mask": torch.ones_like(found)[None]}
    )
    if padded is None or alone is None:
        return None
    return bool(_near(alone[0], padded[0, 3:], _rounding(model, alone)).all())


def _logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
    """[B, T, V]; None where the model cannot be asked with a few tokens alone."""
    # Others' hooks see no passes but their own; those of a sharded model gather its weights.
    call = model if is_sharded(model) else model.forward
    try:
        logits = call(**inputs, use_cache=False).logits
    except Exception:  # the call that is made next says it: it may lack an image
        return None
    whole = isinstance(logits, Tensor) and logits.shape[:2] == inputs["input_ids"].shape
    return cast(Tensor, logits) if whole else None


def _near(one: Tensor, other: Tensor, tolerance: float) -> Tensor:
    """[N] bool: whether rows are the same, beside their largest number."""
    one, other = one.float(), other.float()
    return (one - other).abs().amax(-1) <= tolerance * one.abs().amax(-1)


def _rounding(model: nn.Module, logits: Tensor) -> float:
    return 1e-3 if _eps(model, logits) < 1e-6 else 3e-2


def _eps(model: nn.Module, logits: Tensor) -> float:
    """Of the coarsest numbers that logits are made of: they may be given in float32 in the end."""
    kinds = {each.dtype for each in model.parameters() if each.dtype.is_floating_point}
    # Accelerate's autocast stands in `forward`.
    if torch.is_autocast_enabled(logits.device.type) or hasattr(model, "_original_forward"):
        kinds.add(torch.bfloat16)
    coarsest = max(torch.finfo(each).eps for each in (*kinds, logits.dtype))
    return min(coarsest, torch.finfo(torch.bfloat16).eps)


def _few_ids(model: nn.Module, count: int) -> Tensor | None:
    """[count] distinct ids of plain tokens; None where there are not so many."""
    device = working_device(model)
    config = cast(Any, bare_model(model)).config.get_text_config()
    rows = embedding_rows(model) or getattr(config, "vocab_size", None)
    if device.type == "meta" or not isinstance(rows, int):
        return None
    special = _special_ids(cast(Any, bare_model(model)).config.to_dict())
    # From a quarter on: special tokens, and those of images, lie at the ends.
    step = max(1, rows // (2 * count))
    pool = [each for each in range(rows // 4, rows, step) if each not in special]
    if len(pool) < count:
        pool = [each for each in range(rows) if each not in special]
    return torch.tensor(pool[:count], device=device) if len(pool) >= count else None


def _special_ids(values: dict[str, Any]) -> set[int]:
    """What a config gives as the id of a token."""
    found: set[int] = set()
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _special_ids(value)
        elif str(name).endswith(("_id", "_ids", "_index")):
            each = value if isinstance(value, list) else [value]
            found |= {one for one in each if isinstance(one, int)}
    return found


def _name(model: nn.Module) -> str:
    return type(bare_model(model)).__name__
