"""KL between exact targets and the student's softmax summed over their groups."""

from __future__ import annotations

import math

from torch import Tensor

from xtoken.errors import OptionError, ShapeError
from xtoken.losses.engine.divergence import Direction
from xtoken.losses.engine.row_blocks import reduce_chunks
from xtoken.losses.engine.student_input import Student, student_rows
from xtoken.losses.exact_kl.block import ExactKLBlocks
from xtoken.losses.exact_kl.target_batch import TargetBatch
from xtoken.losses.output import LossOutput
from xtoken.tensors.rows import block_rows


def exact_kl(
    student: Student,
    targets: TargetBatch,
    *,
    student_vocab_size: int | None = None,
    direction: Direction = "forward",
    beta: float = 0.5,
    depth_weights: tuple[float, ...] | None = None,
    normalizer: float | Tensor | None = None,
    chunk_weights: Tensor | None = None,
    block_size: int | None = None,
) -> LossOutput:
    """Mean divergence over chunks, each the sum over its student positions; forward KL by default.

    The teacher's predictions are in the targets: no product with W and no teacher row is read here.

    Args:
        student: [B, T_s, V_s'] float logits, raw; they carry the gradient. Or an `LmHead` or a
            `VocabShard`.
        targets: of this batch, on the student's device.
        student_vocab_size: V_s where the lm_head is padded.
        direction: "forward" is KL(teacher || student), "reverse" KL(student || teacher), infinite
            where a target has no tail, "jsd" the generalized Jensen-Shannon divergence.
        beta: the teacher's share of the mean in "jsd", inside (0, 1).
        depth_weights: None weighs each depth along the text by the chain rule, so that a position's
            loss is one KL. Otherwise the weight of the conditional KL at depth 0, 1, ...; the last
            holds for all deeper ones; (1.0,) is the plain sum. Forward only.
        normalizer: what the sum over chunks is divided by; their number where None.
        chunk_weights: [C] float, a factor on the loss of each chunk that has a target.
        block_size: rows worked on at a time; None chooses by cache size.

    Returns: loss in nats per chunk, >= 0 up to rounding. Metrics: `kl` per chunk, `target_tail` the
        targets' mass outside all groups, `groups` their number, `deeper_kl` the part below depth 0,
        all per chunk.

    Raises:
        OptionError: an option out of range.
        ShapeError: targets of a larger batch or vocabulary.
    """
    if direction not in ("forward", "reverse", "jsd"):
        raise OptionError(f"direction = {direction!r}, expected forward, reverse or jsd")
    if direction == "jsd" and not 0 < beta < 1:
        raise OptionError(f"beta = {beta!r} must be inside (0, 1)")
    if depth_weights is not None:
        good = len(depth_weights) > 0 and all(0 <= w < math.inf for w in depth_weights)
        if not good or direction != "forward":
            raise OptionError(
                f"depth_weights = {depth_weights!r} with direction = {direction!r}, expected "
                "finite weights of at least 0 and direction='forward', or None"
            )
    source = student_rows(student, student_vocab_size)
    batch, length = source.positions
    device = source.tensors()[0].device
    if targets.rows.device != device:
        raise ShapeError(
            f"targets are on {targets.rows.device}, the student on {device}; "
            f"pass targets.to({str(device)!r})"
        )
    if len(targets.rows) and int(targets.rows.max()) >= batch * length:
        raise ShapeError(
            f"a target reads row {int(targets.rows.max())}, the student has {batch * length}; "
            "pass the targets of this batch, laid out with its padded length"
        )
    if len(targets.tokens) and int(targets.tokens.max()) >= source.vocab_size:
        raise ShapeError(
            f"a target holds token {int(targets.tokens.max())}, the student has "
            f"{source.vocab_size}; pass the targets of this student's tokenizer"
        )
    loss = ExactKLBlocks(
        targets=targets, direction=direction, beta=beta, depth_weights=depth_weights
    )
    return reduce_chunks(
        loss,
        source,
        rows_per_block=block_size or block_rows(source.vocab_size, device),
        normalizer=normalizer,
        weights=chunk_weights,
    )
