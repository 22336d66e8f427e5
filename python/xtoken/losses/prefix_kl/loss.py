"""Prefix KL: which token, not only which first piece.

P-KL compares first pieces: `2`, `20` and `201` share one, so it never says which numeral. The
teacher says it at its later positions. For a chunk of one student token and teacher pieces
x_0..x_{n-1}, at each prefix u = x_<d (d = 1..n), the student's distribution p at the chunk's
predictor implies what comes next below u in the trie of student tokens as teacher pieces: child v
with the mass of the tokens that start with u, v, or END with that of the tokens equal to u. The
teacher says the same at its own position d: child v with its probability, END with all the rest.
The loss is P-KL with decay 0 (the root, d = 0) plus the divergences at all d. The conditionals
multiply to p(s), so the sum is the chain rule of KL(P_T || p) along the path, with
P_T(s) = prod_d q_d(x_d) * q_n(END) the teacher's own distribution over student tokens.

Chunks of several student tokens and one of the teacher mirror the construction, with the teacher's
tokens as student pieces; chunks of several on both sides keep the root. Ours, beyond X-Token
(arXiv 2605.21699).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from xtoken.errors import OptionError, ShapeError
from xtoken.losses.engine.boundaries import left_out
from xtoken.losses.engine.loss_spec import LossSpec
from xtoken.losses.engine.run import LossCall, run_loss
from xtoken.losses.inputs import DEFAULT_OPTIONS, LossInputs, LossOptions
from xtoken.losses.output import LossOutput
from xtoken.losses.p_kl.loss import p_kl_blocks
from xtoken.losses.prefix_kl.block import PrefixKLBlocks, columns_of_all, with_later_rows
from xtoken.losses.prefix_kl.compared_prefixes import PreparedPrefixes, prepare_prefixes
from xtoken.losses.prefix_kl.native import may_be_native
from xtoken.losses.prefix_kl.targets import PrefixPart
from xtoken.losses.prefix_kl.teacher_entries import TeacherEntries
from xtoken.tensors.pair_parts import PairParts
from xtoken.tensors.teacher_signal import TeacherTopK, teacher_positions


def prefix_kl(
    inputs: LossInputs, pair: PairParts, options: LossOptions = DEFAULT_OPTIONS
) -> LossOutput:
    """P-KL on first pieces plus the divergences at every further piece; forward KL by default.

    Args:
        inputs: with both sides' ids. The unknown mass of a `TeacherTopK` at a prefix counts in END:
            a child that is not among the stored ids counts there on both sides, or on neither where
            no token ends.
        pair: with `first_pieces`, which is compared as in `p_kl`, and `student_trie`, for chunks of
            one student token; and, unless `options.mirror` is off, `teacher_trie`, for chunks of
            several student tokens and one teacher token.
        options: `top_k`, `top_k_scope` and `tail_bucket` are those of the root, as in `p_kl`.

    Returns: loss in nats per chunk, >= 0 up to rounding, 0 with a graph without chunks. Metrics of
        `p_kl` of the root, and: `prefix_kl`, the divergence beyond the root, in nats per chunk;
        `prefixes`, compared prefixes per chunk; `prefix_teacher_mass`, the teacher's known mass per
        prefix, 1 for full logits (0 where no prefix was compared).

    Raises:
        XTokenError: as `p_kl`; a token id inside a chunk that is outside its vocabulary; a stored
            top-k at another temperature.
    """
    result = run_loss(SPEC, prefix_kl_blocks, inputs, pair, options)
    prefixes = result.metrics["prefixes"]
    # Summed over prefixes, so far divided by chunks.
    known = result.metrics["prefix_teacher_mass"] / torch.where(prefixes > 0, prefixes, 1.0)
    return replace(result, metrics={**result.metrics, "prefix_teacher_mass": known})


SPEC = LossSpec.of(
    "prefix-kl", prefix_kl, "top_k", "top_k_scope", "tail_bucket", "max_depth", "depth_weights",
    "min_mass", "end", "mirror", "full_metrics", needs_ids=True, prepare=left_out, on_cells=True,
)  # fmt: skip


def prefix_kl_blocks(call: LossCall) -> tuple[PrefixKLBlocks, int]:
    """The loss by blocks, and its widest row."""
    pair, options, chunks, teacher = call.pair, call.options, call.chunks, call.teacher
    first = pair.first_cells if options.cells else pair.first_pieces
    assert first is not None
    assert pair.student_trie is not None
    root, widest = p_kl_blocks(call, first, SPEC)
    if isinstance(teacher, TeacherTopK):
        teacher.require_temperature(call.temperature, "the loss asks for")
    # Below the root all columns count, and by themselves.
    known = (
        root.teacher if root.teacher.left_out is None else replace(root.teacher, log_totals=None)
    )
    entries = TeacherEntries.from_rows(known)
    at = chunks.sample * teacher_positions(teacher)[1] + chunks.teacher_start - 1
    parts: list[PrefixPart] = []
    if options.max_depth != 0:
        found = _prefixes(call)
        for trie, items in (
            (pair.student_trie, found.teacher),
            (pair.teacher_trie, found.student),
        ):
            if trie is not None and items is not None:
                mirrored = items is found.student
                parts.append(
                    PrefixPart(trie, items, mirrored, entries, at, options.min_mass, options.end)
                )
    loss = PrefixKLBlocks(
        student=with_later_rows(call, root.student, parts),
        columns=None,
        params=root.params,
        root=root,
        parts=parts,
        depth_weights=tuple(float(weight) for weight in options.depth_weights),
    )
    compiled = options.backend is not None
    if compiled or not may_be_native(call):
        return _narrow(loss, whatever_the_batch=compiled), widest
    loss.make_narrow = _narrow
    return loss, widest


def _narrow(loss: PrefixKLBlocks, *, whatever_the_batch: bool = False) -> PrefixKLBlocks:
    """The loss over the student columns that torch reads."""
    parts = [replace(part, _ready=None) for part in loss.parts if isinstance(part, PrefixPart)]
    root = loss.root.in_torch()
    columns = columns_of_all(root.columns, parts, whatever_the_batch=whatever_the_batch)
    if root.columns is not None:  # the root reads the same rows
        part = root.part if columns is None else root.part.reindexed(columns)
        root = replace(root, columns=columns, part=part)
    return replace(
        loss, columns=columns, params=root.params, root=root, parts=parts, make_narrow=None
    )


def _prefixes(call: LossCall) -> PreparedPrefixes:
    """What was prepared with the batch, or, on the CPU without waiting, made now."""
    options, pair = call.options, call.pair
    found = call.inputs.prefixes
    if found is None:
        assert pair.student_trie is not None
        mirror = pair.teacher_trie if options.mirror else None
        return prepare_prefixes(
            pair.student_trie.trie, None if mirror is None else mirror.trie, call.chunks,
            *call.ids(), max_depth=options.max_depth, last_depth=options.end,
        )  # fmt: skip
    if (found.max_depth, found.last_depth) != (options.max_depth, options.end):
        raise OptionError(
            f"the prefixes were prepared with max_depth = {found.max_depth} and end = "
            f"{found.last_depth}, the loss asks for {options.max_depth} and {options.end}; "
            "prepare them with the loss's options"
        )
    if options.mirror and found.student is None:
        raise OptionError(
            "the prefixes were prepared with mirror = False, the loss asks for True; prepare them "
            "with the loss's options"
        )
    if not found.belong_to(call.chunks):
        raise ShapeError(
            f"the prefixes were prepared for other chunks ({len(found.teacher.deepest)}) than the "
            f"{len(call.chunks)} of the batch; pass both from the same batch"
        )
    return found if options.mirror else replace(found, student=None)
