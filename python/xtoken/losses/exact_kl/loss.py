"""KL between exact targets and the student's softmax summed over their groups."""

from __future__ import annotations

from xtoken.errors import OptionError, ShapeError
from xtoken.losses.engine.loss_spec import LossSpec
from xtoken.losses.engine.run import LossCall, run_loss
from xtoken.losses.exact_kl.batch_targets import DEFAULT_TOP_K, batch_targets
from xtoken.losses.exact_kl.block import ExactKLBlocks
from xtoken.losses.exact_kl.depth_weights import depth_arrays
from xtoken.losses.inputs import DEFAULT_OPTIONS, LossInputs, LossOptions
from xtoken.losses.output import LossOutput
from xtoken.tensors.pair_parts import PairParts
from xtoken.tensors.target_batch import TargetBatch
from xtoken.tensors.teacher_signal import TeacherTopK


def exact_kl(
    inputs: LossInputs, pair: PairParts, options: LossOptions = DEFAULT_OPTIONS
) -> LossOutput:
    """Mean divergence over chunks, each the sum over its student positions; forward KL by default.

    What the teacher says of the student's next token is in the targets (`xtoken.targets`): no
    product with W and no teacher row is read in the step. Targets that were made before are passed
    as `inputs.targets`; otherwise they are made here, on the CPU, from the teacher's signal.

    Args:
        inputs: with `student_ids` and `teacher_ids`.
        pair: with its target builder.
        options: `cells`, `consistent`, `carry_levels`, `min_prob`, `max_depth` and `sure` say
            which targets, where they are made here: of the `top_k` likeliest columns of full
            logits, 512 where None, and of all of a stored top-k. `depth_weights` are the weights
            of the conditional KL at each depth along the text, the default being the plain sum.
            `chain_rule` weighs each depth by its parent's mass instead, so that a position's loss
            is one KL; directions but the forward one are by it alone. In the reverse KL a tail has
            at least one rounding of float32, 1.2e-7: of a teacher that is sure no more is known,
            and without a tail the loss was infinite. Where the groups have all tokens there is no
            tail, and they sum to 1.

    Returns: loss in nats per chunk, >= 0 up to rounding; chunks that are not exact, where `admit`
        lets them in, count and add nothing, as no target is exact there. Metrics, per chunk: `kl`,
        `target_tail` (the targets' mass outside all groups), `groups` (their number), `deeper_kl`
        (what those below depth 0 add to the KL by the chain rule, however the loss weighs them).

    Raises:
        XTokenError: as `p_kl`; a temperature; weights of depths under the chain rule or in another
            direction.
    """
    return run_loss(SPEC, exact_kl_blocks, inputs, pair, options)


SPEC = LossSpec.of(
    "exact-kl",
    exact_kl,
    "cells",
    "consistent",
    "carry_levels",
    "min_prob",
    "max_depth",
    "sure",
    "chain_rule",
    "depth_weights",
    "top_k",
    needs_ids=True,
    without=frozenset({"temperature"}),
)


def prepare_targets(targets: TargetBatch, options: LossOptions) -> None:
    """Make, while a batch is collated, what the loss of its targets would make on the host."""
    if targets.host is not None and not _by_chain_rule(options):
        depth_arrays(targets.host, options.depth_weights, ExactKLBlocks.least_mass)


def _by_chain_rule(options: LossOptions) -> bool:
    return options.direction != "forward" if options.chain_rule is None else options.chain_rule


def exact_kl_blocks(call: LossCall) -> tuple[ExactKLBlocks, int]:
    """The loss by blocks, and its widest row."""
    options = call.options
    chain_rule = _by_chain_rule(options)
    if chain_rule and options.depth_weights != DEFAULT_OPTIONS.depth_weights:
        raise OptionError(
            f"depth_weights = {options.depth_weights!r}, but the chain rule has weights of its "
            "own; pass chain_rule=False and direction='forward'"
        )
    if not chain_rule and options.direction != "forward":
        raise OptionError(
            f"chain_rule = False with direction = {options.direction!r}; "
            "depths are weighed in direction 'forward' alone"
        )
    targets = call.inputs.targets
    if targets is None:
        assert call.pair.targets is not None
        _check_tail(call)
        targets = batch_targets(call.pair.targets, call.inputs, options, call.pair.sizes[1])
    builder, size = call.pair.targets, call.pair.sizes[0]
    if builder is not None and builder.sizes[0] > size:  # the head lacks the last tokens
        targets = targets.limited(size)
    _check_targets(targets, call)
    loss = ExactKLBlocks(
        targets=targets.without_empty_tails(call.pair.sizes[0]),
        direction=options.direction,
        beta=options.beta,
        depth_weights=None if chain_rule else options.depth_weights,
    )
    return loss, call.pair.sizes[0]


def _check_tail(call: LossCall) -> None:
    """Refuse a reverse KL to targets that leave tokens out and have no tail for them."""
    options, size = call.options, call.pair.sizes[1]
    if options.direction != "reverse" or options.consistent is False or options.min_prob > 0:
        return
    kept = options.top_k or DEFAULT_TOP_K
    if not isinstance(call.teacher, TeacherTopK) and kept >= size:
        raise OptionError(
            f"direction = 'reverse' with min_prob = 0 and top_k = {kept} of {size} columns is "
            "infinite: no target has a tail, and the student has mass on what consistent leaves "
            "out; pass 'forward' or 'jsd', a min_prob above 0, or consistent=False"
        )


def _check_targets(targets: TargetBatch, call: LossCall) -> None:
    batch, length = call.source.positions
    if targets.rows.device != call.device:
        raise ShapeError(
            f"targets are on {targets.rows.device}, the student on {call.device}; "
            f"pass targets.to({str(call.device)!r})"
        )
    if len(targets) != len(call.chunks):
        raise ShapeError(
            f"targets are of {len(targets)} chunks, expected {len(call.chunks)}; "
            "lay them out with the chunks of this batch"
        )
    assert targets.host is not None
    if targets.host.most_row >= batch * length:
        raise ShapeError(
            f"a target reads row {targets.host.most_row}, the student has {batch * length}; "
            "lay the targets out with this batch's padded length"
        )
    size = call.pair.sizes[0]
    if not targets.host.fits(size):
        raise ShapeError(
            f"a target holds token {targets.host.most_token()}, the student has {size}; "
            "pass the targets of this student's tokenizer"
        )
