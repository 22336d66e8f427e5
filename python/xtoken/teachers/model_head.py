"""A forward pass without logits: a model's hidden states, and what its head does to them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from xtoken.losses.engine.lm_head import LmHeadRows
from xtoken.tensors.lm_head import LmHead


@dataclass(frozen=True, eq=False)
class Head:
    """What a causal language model does to its last hidden states.

    Attributes:
        name: of the model's class.
        decoder: the module whose output they are.
        inner: the one in it that some models (OPT, Bart's decoders) call themselves.
        linear: the lm_head.
        scale, softcap: see `LmHead`.
    """

    name: str
    decoder: nn.Module
    inner: nn.Module | None
    linear: nn.Linear
    scale: float
    softcap: float | None

    def hidden(self, found: list[Tensor], ids: Tensor) -> Tensor | str:
        """The hidden states [B, T, H] of the first forward pass of a `capture`; or the reason why
        they are none that this head makes logits of."""
        if not found:
            return f"{self.name} makes its logits without its decoder's hidden states"
        hidden = found[0]
        if hidden.dim() != 3 or hidden.shape[:2] != ids.shape:
            return f"{self.name} has hidden states {tuple(hidden.shape)} of {tuple(ids.shape)} ids"
        features = self.linear.weight.shape[1]
        if hidden.shape[2] != features:
            return f"{self.name} has {hidden.shape[2]} features, and its lm_head takes {features}"
        return hidden

    def of(self, hidden: Tensor, dtype: torch.dtype | None) -> LmHead:
        """The losses' input; `dtype` is that of an autocast, under which logits would be made."""
        if dtype is not None:
            hidden = hidden.to(dtype)
        return LmHead(hidden, self.linear.weight, self.linear.bias, self.scale, self.softcap)

    @contextlib.contextmanager
    def capture(self, *, check: bool = False) -> Iterator[list[Tensor]]:
        """Collect the last hidden states of the forward passes inside the block.

        Args:
            check: whether their logits are for `same_logits` alone, which reads one position more.
        """
        found: list[Tensor] = []
        ahead: list[int] = []  # where the inner one's are, until those of the outer one come

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            hidden = getattr(output, "last_hidden_state", None)
            if module is not self.inner and ahead:
                found.pop(ahead.pop())
            if module is self.inner:
                ahead[:] = [len(found)]
            found.append(hidden if isinstance(hidden, Tensor) else output[0])

        modules = [self.decoder] if self.inner is None else [self.inner, self.decoder]
        handles = [module.register_forward_hook(keep) for module in modules]
        if check:
            handles.append(self.linear.register_forward_pre_hook(_stretch_last))
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


# Small logits hide a softcap.
_STRETCH = 16.0


def _stretch_last(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The hidden states [B, T, H] of an lm_head with the last ones once more, far from 0."""
    if not args or args[0].dim() != 3:
        return args  # of a layout that `same_logits` does not know
    hidden: Tensor = args[0]
    return (torch.cat([hidden, _STRETCH * hidden[:, -1:]], 1), *args[1:])


def find_head(model: nn.Module) -> Head | str:
    """The head of a transformers model, or the reason why its logits must be made.

    Args:
        model: unwrapped; torch.compile and adapters of peft are looked through.
    """
    base = cast(Any, bare_model(model))
    name = type(base).__name__
    if not hasattr(base, "get_output_embeddings") or not hasattr(base, "config"):
        return f"{name} is no model of transformers"
    linear = base.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        return f"the lm_head of {name} is a {type(linear).__name__}, not a plain linear layer"
    if hasattr(linear, "base_layer"):
        return f"the lm_head of {name} has an adapter"
    weight = linear.weight
    # In 4 or 8 bits, or in another shape, the layer itself makes numbers of them.
    if weight.dim() != 2 or not weight.dtype.is_floating_point or weight.dtype.itemsize == 1:
        return f"the lm_head of {name} keeps its weights as {weight.dtype} {tuple(weight.shape)}"
    decoder = getattr(base, "base_model", None)
    if not isinstance(decoder, nn.Module) or decoder is base:
        return f"{name} has no decoder apart from its head"
    more = _trained_beside(base, decoder, linear)
    if more is not None:  # it may change no logits as yet
        return f"{name} trains {more}, which is neither in its decoder nor its lm_head's weight"
    config = base.config.get_text_config()
    return Head(name, decoder, _inner(base, decoder), linear, _scale(config), _softcap(config))


def _trained_beside(base: nn.Module, decoder: nn.Module, linear: nn.Linear) -> str | None:
    """The name of a parameter that is trained and that a `Head` would not read."""
    read = {id(each) for each in decoder.parameters()}
    for name, each in linear.named_parameters():
        if name.removeprefix("parametrizations.").partition(".")[0] in ("weight", "bias"):
            read.add(id(each))
    for name, each in base.named_parameters():
        if each.requires_grad and id(each) not in read:
            return name
    return None


def _inner(base: Any, decoder: nn.Module) -> nn.Module | None:
    found = base.get_decoder() if hasattr(base, "get_decoder") else None
    inside = isinstance(found, nn.Module) and any(each is found for each in decoder.modules())
    return found if inside and found is not decoder else None


def bare_model(model: nn.Module) -> nn.Module:
    """The model itself, below torch.compile and the adapters of peft."""
    base = cast(Any, model)
    base = getattr(base, "_orig_mod", base)
    if hasattr(base, "get_base_model"):
        base = base.get_base_model()
    return cast(nn.Module, getattr(base, "_orig_mod", base))


def _softcap(config: Any) -> float | None:
    """The bound of `cap * tanh(logits / cap)`, which model families spell in three ways."""
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    return None


def _scale(config: Any) -> float:
    """The factor on the logits, which model families spell in four ways."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        # MPT may name a rule, which its class here does not follow: `same_logits` says.
        if value is not None and not isinstance(value, str):
            return float(value)
    scaling = getattr(config, "logits_scaling", None)  # Granite and MiniCPM3 divide by it
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def keeps_few_logits(model: nn.Module) -> bool:
    """Whether the model can make the logits of its last position alone."""
    return "logits_to_keep" in inspect.signature(bare_model(model).forward).parameters


@torch.no_grad()
def same_logits(head: LmHead, logits: Tensor) -> bool:
    """Whether the head gives the model's own logits of the last position, up to rounding; also far
    from 0, where what bends them shows.

    Args:
        head: of all positions.
        logits: [B, T, V_s'] what the model returned inside `capture(check=True)`.
    """
    if logits.dim() != 3 or logits.shape[1] < 2:
        return False
    index = torch.arange(len(logits), device=logits.device)
    near = replace(head, hidden=head.hidden[:, -1:])
    far = replace(head, hidden=_STRETCH * near.hidden)
    tolerance = 1e-3 if torch.float32 == logits.dtype == head.hidden.dtype else 3e-2
    for each, place in ((near, -2), (far, -1)):
        ours = LmHeadRows(each, each.weight.shape[0]).rows(index).float()
        theirs = logits[:, place].float()
        if not (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1e-3):
            return False
    return True
