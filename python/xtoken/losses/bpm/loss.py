"""BPM: the teacher's next-token distribution as one over student tokens, by byte prefixes."""

from __future__ import annotations

from dataclasses import replace

from xtoken.errors import OptionError
from xtoken.losses.bpm.block import BPMBlocks
from xtoken.losses.bpm.places import BytePlaces, byte_places
from xtoken.losses.engine.loss_spec import LossSpec
from xtoken.losses.engine.merge import ChunkRows
from xtoken.losses.engine.run import LossCall, run_loss
from xtoken.losses.inputs import DEFAULT_OPTIONS, LossInputs, LossOptions
from xtoken.losses.output import LossOutput
from xtoken.tensors.pair_parts import PairParts


def bpm(inputs: LossInputs, pair: PairParts, options: LossOptions = DEFAULT_OPTIONS) -> LossOutput:
    """Mean over chunks of the divergence between BPM's target and the student, summed over the
    chunk's student positions; forward KL by default.

    The target of a position at a teacher boundary: each teacher token's probability goes to the
    longest student token that its bytes begin with, what has none to a complement. After bytes `c`
    of a teacher token, the same for what follows `c` in the teacher tokens that begin with `c`,
    their mass scaled to 1. A student token of the text that runs past the end of the teacher's
    takes from the shorter one the product of the teacher's probabilities along the text, the last
    factor being that of all teacher tokens that begin with the part that is reached. The student's
    complement is its probability of all tokens that are compared one by one in none of these ways.

    Longest prefix is not how a tokenizer cuts, so the true token can have no target; and a token
    that no teacher token begins with (`201` under digits) has none unless the text spells it.

    Args:
        inputs: with both sides' ids. A `TeacherTopK` leaves what is not stored in the complement;
            inside a teacher token the stored ones that begin so are scaled to 1.
        pair: with `byte_prefixes`.
        options: `mask_spaces` leaves out positions whose token is spaces and tabs alone; on by
            default, as exact supervision of indentation took the authors' code from 49 % to 9 %
            passed. Reverse KL is refused: it is infinite wherever a token has no target.

    Returns: loss in nats per chunk, >= 0 up to rounding; 0 for a student equal to its teacher
        unless the text has two tokens where one would do, whose mass a longer one takes. Metrics,
        per chunk: `kl`, `complement` (the teacher's mass there), `positions` and `spaces` (how many
        are compared; are spaces and tabs).

    Raises:
        XTokenError: as `p_kl`; reverse KL; a token outside its vocabulary.

    Source: Wang et al. 2026, arXiv 2607.22334, with its definition inside a chunk. Two details of
        the released code are left out: it caps what follows a position inside a teacher token at
        the chunk's end, and lets longer tokens run on past it.
    """
    return run_loss(SPEC, _blocks, inputs, pair, options)


SPEC = LossSpec.of("bpm", bpm, "mask_spaces", needs_ids=True, prepare=byte_places)


def _blocks(call: LossCall) -> tuple[BPMBlocks, int]:
    options, pair = call.options, call.pair
    assert pair.byte_prefixes is not None
    if options.direction == "reverse":
        raise OptionError(
            "direction = 'reverse' is infinite under bpm wherever a student token has no target; "
            "pass 'forward' or 'jsd'"
        )
    places = call.prepared(SPEC, BytePlaces)
    where = ChunkRows(places.teacher_index, None, len(places.teacher_index))
    loss = BPMBlocks(
        student=call.student_chunks(None),
        teacher=replace(call.teacher_rows("chain"), where=where),
        places=places,
        tables=pair.byte_prefixes,
        fold=pair.student_stop_fold,
        mask_spaces=options.mask_spaces,
        temperature=call.temperature,
        direction=options.direction,
        beta=options.beta,
    )
    return loss, max(pair.sizes)
