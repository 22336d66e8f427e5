"""All losses by name: what the Distiller, the trainer and the command line choose from."""

from __future__ import annotations

from xtoken.errors import OptionError
from xtoken.losses.alm import SPEC as ALM
from xtoken.losses.bpm.loss import SPEC as BPM
from xtoken.losses.engine.loss_spec import LossFunction as LossFunction
from xtoken.losses.engine.loss_spec import LossSpec as LossSpec
from xtoken.losses.escd.loss import SPEC as ESCD
from xtoken.losses.exact_kl.loss import SPEC as EXACT_KL
from xtoken.losses.hybrid.gold import SPEC as GOLD
from xtoken.losses.hybrid.h_kl import SPEC as H_KL
from xtoken.losses.hybrid.uld import SPEC as ULD
from xtoken.losses.p_kl.loss import SPEC as P_KL
from xtoken.losses.partition_kl.loss import SPEC as PARTITION_KL
from xtoken.losses.prefix_kl.loss import SPEC as PREFIX_KL
from xtoken.losses.same_vocab_kl import SPEC as SAME_VOCAB_KL
from xtoken.losses.strict_top_k import SPEC as STRICT_TOP_K
from xtoken.tensors.pair_parts import LossName as LossName

LOSSES: dict[LossName, LossSpec] = {
    spec.name: spec
    for spec in (
        *(PREFIX_KL, P_KL, EXACT_KL, H_KL, GOLD, ULD, ALM, BPM, ESCD, STRICT_TOP_K),
        *(PARTITION_KL, SAME_VOCAB_KL),
    )
}


def find_loss(name: str) -> LossSpec:
    """The loss of a name.

    Raises:
        OptionError: there is none.

    >>> sorted(find_loss("p-kl").parts)
    ['projection']
    """
    for known, spec in LOSSES.items():
        if known == name:
            return spec
    raise OptionError(f"loss = {name!r}, expected one of {', '.join(LOSSES)}")
