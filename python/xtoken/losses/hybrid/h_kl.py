"""H-KL: partial KL on the common set that W relaxes, sorted L1 on the rest."""

from __future__ import annotations

from xtoken.losses.engine.loss_spec import LossSpec
from xtoken.losses.engine.run import run_loss
from xtoken.losses.hybrid.hybrid import hybrid_blocks
from xtoken.losses.inputs import DEFAULT_OPTIONS, LossInputs, LossOptions
from xtoken.losses.output import LossOutput
from xtoken.tensors.pair_parts import PairParts


def h_kl(inputs: LossInputs, pair: PairParts, options: LossOptions = DEFAULT_OPTIONS) -> LossOutput:
    """Mean over chunks of `common_weight` * partial KL + `uld_weight` * sorted L1.

    Args:
        inputs: the unstored tokens of a `TeacherTopK` are taken to have no probability; its
            reverse KL is refused, as it is infinite.
        pair: with `relaxed_common`: the pairs (s, argmax_t W[s, t]) of
            weight >= 0.6, made one-to-one, the highest weight first.

    Returns: as `gold`.

    Raises:
        XTokenError: as `p_kl`.

    Source: X-Token, arXiv 2605.21699. It differs from GOLD by its common set alone, which takes in
        pairs such as `Hundreds` and `Hund` that strict equality throws away.
    """
    return run_loss(
        SPEC, lambda call: hybrid_blocks(call, pair.relaxed_common), inputs, pair, options
    )


SPEC = LossSpec.of("h-kl", h_kl, "merge", "common_weight", "uld_weight", "full_metrics")
