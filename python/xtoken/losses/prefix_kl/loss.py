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

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from xtoken.losses.engine.checks import check_finite
from xtoken.losses.engine.divergence import Direction
from xtoken.losses.engine.module import LossModule
from xtoken.losses.engine.row_blocks import reduce_chunks
from xtoken.losses.engine.student_input import Student
from xtoken.losses.output import LossOutput
from xtoken.losses.p_kl.loss import Scope, p_kl_blocks
from xtoken.losses.prefix_kl.block import PrefixKLBlocks, columns_of_all, with_later_rows
from xtoken.losses.prefix_kl.compared_prefixes import TrieSlots, first_pieces, prefix_items
from xtoken.losses.prefix_kl.targets import PrefixPart
from xtoken.losses.prefix_kl.teacher_entries import TeacherEntries
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.projection import SparseProjection
from xtoken.tensors.teacher_signal import Teacher, TeacherTopK, teacher_positions


@torch.compiler.disable  # type: ignore[untyped-decorator]
def prefix_kl(
    student_logits: Student,
    teacher: Teacher,
    projection: SparseProjection,
    student_trie: TrieSlots,
    chunks: ChunkBatch,
    *,
    student_ids: Tensor,
    teacher_ids: Tensor,
    teacher_trie: TrieSlots | None = None,
    max_depth: int | None = None,
    depth_weights: Sequence[float] = (1.0,),
    min_mass: float = 1e-3,
    end: bool = True,
    top_k: int | None = None,
    top_k_scope: Scope = "chunk",
    tail_bucket: bool = False,
    temperature: float = 1.0,
    direction: Direction = "forward",
    beta: float = 0.5,
    normalizer: float | Tensor | None = None,
    chunk_weights: Tensor | None = None,
    block_size: int | None = None,
) -> LossOutput:
    """P-KL on first pieces plus the divergences at every further piece; forward KL by default.

    Runs eagerly inside `torch.compile`: its shapes are those of the text, and it calls the core.

    Args:
        student_logits: [B, T_s, V_s'] float, raw; carries the gradient. Or an `LmHead` (fused) or
            `VocabShard`. Columns from V_s on are dropped.
        teacher: [B, T_t, V_t'] float raw logits, detached here; or a `TeacherTopK`, whose unknown
            mass at a prefix counts in END: a child that is not among the stored ids counts there
            on both sides, or on neither where no token ends.
        projection: W [V_s, V_t] with `decay = 0`, one entry a row at most: `first_pieces` makes it
            of any W. Its root is compared as in `p_kl`.
        student_trie: the student's tokens as teacher pieces; for chunks of one student token.
        chunks: the chunks to count, from `ChunkBatch.usable`.
        student_ids, teacher_ids: [B, T_s], [B, T_t] int64.
        teacher_trie: the teacher's tokens as student pieces; for chunks of several student tokens
            and one teacher token. None keeps these at the root.
        max_depth: longest prefix; None for no limit, 0 for the root alone.
        depth_weights: weight of depth 0, 1, ...; the last one holds for all deeper ones. The
            default is the plain sum.
        min_mass: a prefix at which no token ends is skipped where the teacher has less than this on
            its children together.
        end: False leaves out END and the depth at the chunk's own end, for ablations.
        top_k, top_k_scope, tail_bucket: of the root, as in `p_kl`.
        temperature: > 0, divides both sides' logits; the loss is multiplied by its square.
        direction, beta: see `divergence`.
        normalizer: what the sum over chunks is divided by, len(chunks) where None.
        chunk_weights: [C] float, a factor on each chunk's loss, not on metrics or normalizer.
        block_size: chunks worked on at a time; None chooses by cache size.

    Returns: loss in nats per chunk, >= 0 up to rounding, 0 with a graph without chunks. Metrics of
        `p_kl` of the root, and: `prefix_kl`, the divergence beyond the root, in nats per chunk;
        `prefixes`, compared prefixes per chunk; `prefix_teacher_mass`, the teacher's known mass per
        prefix, 1 for full logits (0 where no prefix was compared).

    Raises:
        ValueError: as `p_kl`; W with several entries in a row; W or a trie of another pair; ids
            outside a trie's vocabulary; options outside their range; a stored top-k at another
            temperature.
        TokenIdError: a token id inside a chunk is outside its vocabulary.
    """
    _check_options(max_depth, depth_weights, min_mass)
    _check_pair(projection, student_trie, teacher_trie)
    root, source, per_block = p_kl_blocks(
        student_logits,
        teacher,
        projection,
        chunks,
        student_ids=student_ids,
        teacher_ids=teacher_ids,
        top_k=top_k,
        top_k_scope=top_k_scope,
        tail_bucket=tail_bucket,
        merge="chain",
        temperature=temperature,
        direction=direction,
        beta=beta,
        full_metrics=False,
        block_size=block_size,
    )
    if isinstance(teacher, TeacherTopK) and teacher.temperature != temperature:
        raise ValueError(
            f"the stored top-k was taken at temperature {teacher.temperature}, the loss asks for "
            f"{temperature}; store it at {temperature}, or pass full logits"
        )
    entries = TeacherEntries.beside(root.teacher)
    at = chunks.sample * teacher_positions(teacher)[1] + chunks.teacher_start - 1
    parts: list[PrefixPart] = []
    for side, trie, ids in (
        ("teacher", student_trie, teacher_ids),
        ("student", teacher_trie, student_ids),
    ):
        if trie is not None and max_depth != 0:
            items = prefix_items(trie, chunks, ids, side, max_depth=max_depth, last_depth=end)
            parts.append(PrefixPart(trie, items, side == "student", entries, at, min_mass, end))
    columns = columns_of_all(root.columns, parts)
    if root.columns is not None:  # the root reads the same rows
        part = root.part if columns is None else root.part.among(columns)
        root = replace(root, columns=columns, part=part)
    loss = PrefixKLBlocks(
        student=with_later_rows(root.student, parts),
        columns=columns,
        params=root.params,
        root=root,
        parts=parts,
        depth_weights=tuple(float(weight) for weight in depth_weights),
    )
    result = reduce_chunks(
        loss,
        source,
        rows_per_block=per_block,
        normalizer=normalizer,
        weights=chunk_weights,
    )
    check_finite(result.loss, source, teacher, chunks, None)
    prefixes = result.metrics["prefixes"]
    # Summed over prefixes, so far divided by chunks.
    known = result.metrics["prefix_teacher_mass"] / torch.where(prefixes > 0, prefixes, 1.0)
    return replace(result, metrics={**result.metrics, "prefix_teacher_mass": known})


def _check_options(max_depth: int | None, depth_weights: Sequence[float], min_mass: float) -> None:
    if max_depth is not None and max_depth < 0:
        raise ValueError(f"max_depth = {max_depth} must be at least 0, or None for no limit")
    if len(depth_weights) == 0 or not all(0 <= weight < float("inf") for weight in depth_weights):
        raise ValueError(
            f"depth_weights = {tuple(depth_weights)}, expected one finite weight of at least 0 for "
            "depth 0, 1, ...; the last holds for all deeper ones"
        )
    if not 0 <= min_mass < 1:
        raise ValueError(f"min_mass = {min_mass}, expected a probability below 1")


def _check_pair(
    projection: SparseProjection, student_trie: TrieSlots, teacher_trie: TrieSlots | None
) -> None:
    sizes = projection.shape
    tries = [("student", student_trie, sizes), ("teacher", teacher_trie, sizes[::-1])]
    for name, trie, expected in tries:
        if trie is not None and (trie.token_count, trie.piece_count) != expected:
            raise ValueError(
                f"the {name} trie has {trie.token_count} tokens and {trie.piece_count} pieces, "
                f"expected {expected[0]} and {expected[1]}; build W and both tries from the same "
                "two tokenizers"
            )
    if bool((projection.indptr.diff() > 1).any()):
        raise ValueError(
            "W has several entries in a row, but the root of prefix KL is P-KL with decay = 0; "
            "pass first_pieces(projection, student_trie)"
        )


class PrefixKL(LossModule):
    """`prefix_kl` with W, the tries and its options held."""

    def __init__(
        self, projection: SparseProjection, tries: Any, *, mirror: bool = True, **options: Any
    ) -> None:
        """
        Args:
            projection: W of the pair, with any decay; its first pieces are used.
            tries: an `xtoken.trie.PairTries`.
            mirror: whether chunks of several student tokens and one teacher token are compared
                beyond the root.
        """
        super().__init__(prefix_kl, options)
        self.student_trie = TrieSlots(tries.student)
        self.teacher_trie = TrieSlots(tries.teacher) if mirror else None
        self.projection = first_pieces(projection, self.student_trie)

    def held(self) -> dict[str, Any]:
        return {
            "projection": self.projection,
            "student_trie": self.student_trie,
            "teacher_trie": self.teacher_trie,
        }
