"""The auxiliary loss of a mixture of experts, which a model adds where it makes its own loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from xtoken.errors import OptionError
from xtoken.teachers.model_head import bare_model

_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")


@dataclass(frozen=True, eq=False)
class RouterLoss:
    """What keeps the load of experts even.

    Attributes:
        value: scalar with a graph.
        weight: its factor in the model's own loss.
    """

    value: Tensor
    weight: float


def router_loss(model: nn.Module, output: Any) -> RouterLoss | None:
    """The routers' loss of a forward pass; None where the model's own loss has none.

    Args:
        model: of transformers; torch.compile and adapters of peft are looked through.
        output: of its forward pass.

    Raises:
        OptionError: it is asked for (`output_router_logits`), and the model does not return it, or
            nothing says its weight.
    """
    value = getattr(output, "aux_loss", None)
    base = cast(Any, bare_model(model))
    config = getattr(base, "config", None)
    if config is not None:
        config = config.get_text_config()
    if not isinstance(value, Tensor):
        if getattr(config, "output_router_logits", False) is True:
            raise OptionError(
                f"output_router_logits = True, but {type(base).__name__} returns no aux_loss to "
                "train its routers on; set it to False in the student's config"
            )
        return None
    places = [(place, name) for place in (base, config) for name in _WEIGHTS]
    known = [getattr(place, name) for place, name in places if hasattr(place, name)]
    if not known:
        raise OptionError(
            f"{type(base).__name__} returns an aux_loss of its routers, and neither "
            f"{' nor '.join(_WEIGHTS)} in its config says its weight; set one, or "
            "output_router_logits = False"
        )
    return RouterLoss(value, float(known[0])) if known[0] else None
