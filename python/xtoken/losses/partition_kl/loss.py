"""Partition KL: shared tokens, or the other ends of a chunk, and one column for all the rest."""

from __future__ import annotations

from dataclasses import replace

from xtoken.errors import OptionError
from xtoken.losses.engine.loss_spec import LossSpec
from xtoken.losses.engine.merge import ChunkRows
from xtoken.losses.engine.run import LossCall, run_loss
from xtoken.losses.inputs import DEFAULT_OPTIONS, LossInputs, LossOptions
from xtoken.losses.output import LossOutput
from xtoken.losses.partition_kl.block import PartitionKLBlocks
from xtoken.losses.partition_kl.places import ChainPlaces, chain_places
from xtoken.tensors.pair_parts import PairParts
from xtoken.tensors.rows import upcast
from xtoken.tensors.teacher_signal import TeacherTopK


def partition_kl(
    inputs: LossInputs, pair: PairParts, options: LossOptions = DEFAULT_OPTIONS
) -> LossOutput:
    """Mean over chunks of a divergence over the events that both sides can name, and the rest.

    A chunk of one token on both sides: the shared tokens. One of `n > 1` teacher tokens and one
    student token: the student tokens whose teacher pieces are the chunk's but for the last. The
    mirror for several student tokens. Several on both sides: none. The chunk's own tokens are
    always among them, as one event; a last column holds all other mass. An event's probability is
    that of the chunk's tokens before the last, times that of the other end there: full softmaxes,
    nothing is renormalized, and the student's factors before the last have their gradient too.

    Args:
        inputs: with both sides' ids; a `TeacherTopK` needs `token_log_probs`, and events that are
            not stored are in the rest of both sides.
        pair: with `strict_common` and `piece_chains`.
        options: `direction` and `beta` of all chunks; `mismatch_weight` is a factor on those that
            are not one token on both sides. Reverse KL is infinite where each teacher token is
            shared and the student has others.

    Returns: loss in nats per chunk; 0 for a student equal to its teacher, and otherwise >= 0 up to
        rounding, but where the student has no token outside the events: the teacher's rest is left
        out there, and with a mass of m in the events forward KL is m log m at least.
        Metrics: `kl`, `teacher_rest` and `student_rest` (the mass in the last column), `single`
        (the share of chunks of one token on both sides).

    Raises:
        XTokenError: as `p_kl`; a token outside its vocabulary; a top-k without `token_log_probs`.

    Source: "v6", NeMo-RL's pull request 4177, as its code computes it; Yang et al. 2026, arXiv
        2610.28895, has the same events. The recipe of v6 takes the JSD at `beta` 0.5 for shared
        tokens, the forward KL with weight 2 for the others, and the teacher's best columns alone;
        here one direction holds for all.
    """
    return run_loss(SPEC, _blocks, inputs, pair, options)


SPEC = LossSpec.of(
    "partition-kl", partition_kl, "mismatch_weight", needs_ids=True, prepare=chain_places
)


def _blocks(call: LossCall) -> tuple[PartitionKLBlocks, int]:
    pair, options, teacher = call.pair, call.options, call.teacher
    assert pair.strict_common is not None
    assert pair.piece_chains is not None
    places = call.prepared(SPEC, ChainPlaces)
    known = None
    if isinstance(teacher, TeacherTopK):
        if teacher.token_log_probs is None:
            raise OptionError(
                "the stored top-k lacks token_log_probs, the teacher's log-probability of each "
                "next token; make it with TeacherTopK.from_logits(logits, k, ids=teacher_ids)"
            )
        known = upcast(teacher.token_log_probs.flatten()[places.teacher_index])
    where = ChunkRows(places.teacher_index, None, len(places.teacher_index))
    loss = PartitionKLBlocks(
        student=call.student_chunks(None),
        teacher=replace(call.teacher_rows("chain"), where=where),
        places=places,
        chains=pair.piece_chains,
        common=pair.strict_common,
        fold=pair.student_stop_fold,
        token_log_probs=known,
        mismatch_weight=options.mismatch_weight,
        temperature=call.temperature,
        direction=options.direction,
        beta=options.beta,
    )
    return loss, max(pair.sizes)
