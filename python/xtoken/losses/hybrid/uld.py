"""ULD: sorted L1 over the whole vocabularies, no token corresponding to any (arXiv 2402.12030)."""

from __future__ import annotations

from xtoken.losses.engine.loss_spec import LossSpec
from xtoken.losses.engine.run import run_loss
from xtoken.losses.hybrid.hybrid import hybrid_blocks
from xtoken.losses.inputs import DEFAULT_OPTIONS, LossInputs, LossOptions
from xtoken.losses.output import LossOutput
from xtoken.tensors.pair_parts import PairParts


def uld(inputs: LossInputs, pair: PairParts, options: LossOptions = DEFAULT_OPTIONS) -> LossOutput:
    """Mean over chunks of the L1 distance between the two distributions, each sorted.

    Args:
        inputs: the unstored tokens of a `TeacherTopK` are taken to have no probability.
        pair: its sizes alone.

    Returns: loss in [0, 2] times temperature^2 per chunk; metric `uld`.

    Raises:
        XTokenError: as `p_kl`.

    Source: Boizard et al. 2024, arXiv 2402.12030, at the chunks of an alignment instead of at equal
        positions.
    """
    result = run_loss(SPEC, lambda call: hybrid_blocks(call, None), inputs, pair, options)
    return LossOutput(result.loss, result.num_chunks, {"uld": result.metrics["uld"]})


SPEC = LossSpec.of("uld", uld, "merge", without=frozenset({"direction", "beta"}))
