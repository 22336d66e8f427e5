"""GOLD: partial KL on the strict common set, sorted L1 on the rest (the baseline of X-Token)."""

from __future__ import annotations

from xtoken.losses.engine.loss_spec import LossSpec
from xtoken.losses.engine.run import run_loss
from xtoken.losses.hybrid.hybrid import hybrid_blocks
from xtoken.losses.inputs import DEFAULT_OPTIONS, LossInputs, LossOptions
from xtoken.losses.output import LossOutput
from xtoken.tensors.pair_parts import PairParts


def gold(inputs: LossInputs, pair: PairParts, options: LossOptions = DEFAULT_OPTIONS) -> LossOutput:
    """Mean over chunks of `common_weight` * partial KL + `uld_weight` * sorted L1.

    Args:
        inputs: the unstored tokens of a `TeacherTopK` are taken to have no probability; its
            reverse KL is refused, as it is infinite.
        pair: with `strict_common`: the tokens of equal bytes.

    Returns: loss in nats per chunk. The KL runs over part of two full softmaxes, so it can be below
        0; it is 0 for a student equal to its teacher. Metrics: `kl`, `uld`, `teacher_mass` and
        `student_mass` on the common set, and, with `full_metrics`, `top1_agreement` within it.

    Raises:
        XTokenError: as `p_kl`.

    Source: baseline as defined in X-Token, arXiv 2605.21699; the partial KL's gradient pushes every
        uncommon token down (its Proposition 1).
    """
    return run_loss(
        SPEC, lambda call: hybrid_blocks(call, pair.strict_common), inputs, pair, options
    )


SPEC = LossSpec.of("gold", gold, "merge", "common_weight", "uld_weight", "full_metrics")
