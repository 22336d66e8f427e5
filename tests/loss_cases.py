"""Small random batches for the loss tests: chunks of all kinds, padding, padded lm_heads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from real_texts import TOPICS
from tokenizer_zoo import byte_level_bpe
from tokenizers import Tokenizer
from torch import Tensor

from xtoken import Aligner, Alignment, ChunkKind, Projection
from xtoken.losses import LOSSES, CommonSet, LossInputs, LossOptions, LossOutput, PairParts
from xtoken.tensors.byte_prefixes import BytePrefixes
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.completions import Completions
from xtoken.tensors.piece_chains import PieceChains
from xtoken.tensors.projection import SparseProjection

EXACT, MISMATCH, STUDENT_ONLY, TEACHER_ONLY, SPECIAL = ChunkKind
INPUTS = ("student_ids", "teacher_ids", "normalizer", "chunk_weights")


def loss_of(name: str, student, teacher, chunks, pair: PairParts, **given) -> LossOutput:
    """A loss by name, its inputs and options by keyword."""
    inputs = {key: given.pop(key) for key in INPUTS if key in given}
    loss = LOSSES[name].function
    return loss(LossInputs(student, teacher, chunks, **inputs), pair, LossOptions(**given))


def p_kl(student, teacher, projection: SparseProjection, chunks, **given) -> LossOutput:
    """P-KL under a W, whatever else the pair holds."""
    return loss_of("p-kl", student, teacher, chunks, w_alone(projection), **given)


@functools.lru_cache(maxsize=1)
def w_alone(projection: SparseProjection) -> PairParts:
    return PairParts(projection.shape, projection=projection)


def common_set(student_ids, teacher_ids) -> CommonSet:
    return CommonSet(torch.tensor(student_ids), torch.tensor(teacher_ids))


def pair_of(
    projection: SparseProjection,
    byte_prefixes: BytePrefixes | None = None,
    piece_chains: PieceChains | None = None,
) -> PairParts:
    """W with the common sets, bytes and pieces that the laws over all losses use."""
    ids = [i for i in (1, 4, 6, 9) if i < min(projection.shape)]
    common = common_set(ids, ids)
    tables = byte_prefixes or BytePrefixes(*some_bytes(*projection.shape))
    return PairParts(
        projection.shape, projection=projection, strict_common=common, relaxed_common=common,
        byte_prefixes=tables, completions=completions(tables),
        piece_chains=piece_chains or PieceChains(*some_pieces(*projection.shape)),
    )  # fmt: skip


def some_pieces(v_s: int, v_t: int) -> tuple[list[list[int]], list[list[int]]]:
    """Pieces of two vocabularies, of one to three on each side."""
    one, other = (
        [[i % size] if i % 3 == 0 else [*range(i % 3), i * 5 % size] for i in range(count)]
        for count, size in ((v_s, v_t), (v_t, v_s))
    )
    return one, other


@functools.cache
def completions(tables: BytePrefixes) -> Completions:
    return Completions(tables)


def some_bytes(v_s: int, v_t: int) -> tuple[list[bytes], list[bytes]]:
    """Bytes of two vocabularies: the student's are letters; of the teacher's, half are two letters
    where the sizes differ, and the same where they do not."""
    student = [bytes([48 + i]) for i in range(v_s)]
    letters = v_t if v_s == v_t else v_t // 2
    pairs = [bytes([48 + i, 48 + i * 3 % 5]) for i in range(v_t - letters)]
    return student, [bytes([48 + i]) for i in range(letters)] + pairs


@dataclass
class Case:
    student_logits: Tensor
    teacher_logits: Tensor
    student_ids: Tensor
    teacher_ids: Tensor
    alignments: list
    chunks: ChunkBatch  # all of them
    usable: ChunkBatch
    student_mask: Tensor
    teacher_mask: Tensor
    pair: PairParts
    shared: PairParts  # one vocabulary of the smaller size
    v_s: int
    v_t: int

    @property
    def projection(self) -> SparseProjection:
        return self.pair.projection

    def loss(self, name: str, **given) -> LossOutput:
        """A loss of this batch; see `loss_of`, whose arguments may be given otherwise."""
        arguments = {
            "student": self.student_logits, "teacher": self.teacher_logits, "chunks": self.usable,
            "pair": self.pair, **given,
        }  # fmt: skip
        return loss_of(name, **arguments)


def random_alignment(rng: np.random.Generator, chunks: int) -> Alignment:
    """Bounds and kinds as the aligner gives them: 1:1, n:m, one-sided, mismatched, special."""
    student, teacher, kinds = [0], [0], []
    for _ in range(chunks):
        kind = rng.choice([EXACT, EXACT, EXACT, MISMATCH, STUDENT_ONLY, TEACHER_ONLY, SPECIAL])
        n = 0 if kind == TEACHER_ONLY else int(rng.integers(1, 4))
        m = 0 if kind == STUDENT_ONLY else int(rng.integers(1, 4))
        student.append(student[-1] + n)
        teacher.append(teacher[-1] + m)
        kinds.append(kind)
    return Alignment(
        np.array(student), np.array(teacher), np.array(kinds, np.uint8), np.zeros(4, np.int64)
    )


def random_csr(rng: np.random.Generator, v_s: int, v_t: int, empty: float = 0.15):
    """CSR with empty rows, one-entry rows and rows of pieces; some columns unreached."""
    ptr, ids, weights = [0], [], []
    reachable = rng.permutation(v_t)[: max(2, int(v_t * 0.8))]
    for token in range(v_s):
        if rng.random() >= empty and token != v_s // 2:
            row = rng.permutation(reachable)[: int(rng.integers(1, 4))]
            share = 0.1 ** np.arange(len(row))
            ids += row.tolist()
            weights += (share / share.sum()).tolist()
        ptr.append(len(ids))
    return np.array(ptr), np.array(ids, dtype=np.int64), np.array(weights), (v_s, v_t)


def make_case(
    seed: int = 0,
    *,
    batch: int = 2,
    chunks: int = 6,
    v_s: int = 13,
    v_t: int = 11,
    padded: int = 3,
    dtype: torch.dtype = torch.float64,
    left: bool = False,
    scale: float = 2.0,
) -> Case:
    """A batch whose lm_heads have `padded` columns beyond the tokenizers."""
    rng = np.random.default_rng(seed)
    alignments = [random_alignment(rng, chunks + 2 * b) for b in range(batch)]
    lengths = [[int(a.student_bounds[-1]), int(a.teacher_bounds[-1])] for a in alignments]
    t_s, t_t = (max(n[i] for n in lengths) + 2 for i in (0, 1))
    offsets = [[t_s - a, t_t - b] if left else [0, 0] for a, b in lengths]
    masks = [torch.zeros(batch, t, dtype=torch.bool) for t in (t_s, t_t)]
    for row, (size, offset) in enumerate(zip(lengths, offsets, strict=True)):
        for side in (0, 1):
            masks[side][row, offset[side] : offset[side] + size[side]] = True
    chunk_batch = ChunkBatch.from_alignments(
        alignments, [o[0] for o in offsets], [o[1] for o in offsets]
    )
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, t_s, v_s + padded), (batch, t_t, v_t + padded))
    logits = [
        scale * torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes
    ]
    logits = [rows.to(dtype) for rows in logits]
    ids = [
        torch.randint(0, v, (batch, t), generator=generator) for t, v in ((t_s, v_s), (t_t, v_t))
    ]
    return Case(
        logits[0].requires_grad_(), logits[1], ids[0], ids[1], alignments, chunk_batch,
        chunk_batch.usable(*masks), *masks,
        pair_of(SparseProjection.from_csr(*random_csr(rng, v_s, v_t))),
        PairParts((min(v_s, v_t),) * 2), v_s, v_t,
    )  # fmt: skip


def gradient(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, tensors, retain_graph=True))


@functools.cache
def real_pair() -> tuple[Tokenizer, Tokenizer, SparseProjection]:
    """Tokenizers of three digits and of one digit a token, trained on real text, and their W."""
    student, teacher = byte_level_bpe(900, digits=3), byte_level_bpe(700, digits=1)
    return student, teacher, SparseProjection.from_projection(real_matrix())


@functools.cache
def real_matrix() -> Projection:
    sides = byte_level_bpe(900, digits=3), byte_level_bpe(700, digits=1)
    return Projection.build(*sides, cache_dir=False)


@functools.cache
def real_aligner() -> Aligner:
    return Aligner(*real_pair()[:2], threads=1)


@functools.cache
def real_tables() -> tuple[BytePrefixes, PieceChains]:
    """What the tokens of `real_pair` begin with, and what their pieces can end as."""
    matrix = real_matrix()
    return BytePrefixes.from_projection(matrix), PieceChains.from_projection(matrix)


def real_case(
    seed: int = 0,
    *,
    batch: int = 2,
    chunks: int = 6,
    padded: int = 3,
    dtype: torch.dtype = torch.float64,
    scale: float = 2.0,
) -> Case:
    """`make_case` on real text: the alignments of two tokenizers, a BOS on the student's side."""
    student, teacher, projection = real_pair()
    aligner = real_aligner()
    text = TOPICS["integers"] + " In 1991, 20,126 of 3,401 " + TOPICS["numbers"]
    ids: list[list[list[int]]] = [[], []]
    for b in range(batch):
        start = (seed * 37 + b * 113) % 500
        part = text[start : start + 4 * chunks + 9 * b] + " in 1991: 201 of 3401."
        bos = student.token_to_id("<|begin_of_text|>")
        ids[0].append([bos, *student.encode(part, add_special_tokens=False).ids])
        ids[1].append(teacher.encode(part, add_special_tokens=False).ids)
    alignments = [aligner.align(s, t) for s, t in zip(*ids, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for rows, size in zip(ids, projection.shape, strict=True):
        length = max(len(row) for row in rows) + 2
        padded_ids, mask = torch.zeros(batch, length, dtype=torch.int64), []
        for b, row in enumerate(rows):
            padded_ids[b, : len(row)] = torch.tensor(row)
            mask.append(torch.arange(length) < len(row))
        shape = (batch, length, size + padded)
        logits = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        sides.append((logits.to(dtype), padded_ids, torch.stack(mask)))
    all_chunks = ChunkBatch.from_alignments(alignments)
    return Case(
        sides[0][0].requires_grad_(), sides[1][0], sides[0][1], sides[1][1], alignments,
        all_chunks, all_chunks.usable(sides[0][2], sides[1][2]), sides[0][2], sides[1][2],
        pair_of(projection, *real_tables()), PairParts((min(projection.shape),) * 2),
        *projection.shape,
    )  # fmt: skip


def same_model(seed: int = 3, case: Case | None = None) -> Case:
    """A student that is its teacher: one vocabulary, one segmentation, chunks of any size."""
    case = make_case(seed, v_s=12, v_t=12) if case is None else case
    chunks = case.usable
    same = ChunkBatch.from_ranges(
        chunks.sample, chunks.student_start, chunks.student_end, chunks.student_start,
        chunks.student_end, chunks.kind,
    )  # fmt: skip
    return replace(
        case,
        teacher_logits=case.student_logits.detach().clone(),
        teacher_ids=case.student_ids,
        usable=same,
        teacher_mask=case.student_mask,
        pair=pair_of(SparseProjection.identity(case.v_s)),
        shared=PairParts((case.v_s, case.v_s)),
        v_t=case.v_s,
    )


def relayout(case: Case, order: list[int], *, left: bool = False, extra: int = 0) -> Case:
    """The samples `order` of a right-padded case as a new batch, padded otherwise.

    What stands in padding is made new, so that nothing may depend on it.
    """
    out = {}
    for side in ("student", "teacher"):
        mask = getattr(case, f"{side}_mask")
        lengths = [int(mask[b].sum()) for b in order]
        size = max(lengths) + extra
        logits, ids = getattr(case, f"{side}_logits").detach(), getattr(case, f"{side}_ids")
        new_logits = torch.full((len(order), size, logits.shape[-1]), 17.0, dtype=logits.dtype)
        new_ids = torch.zeros(len(order), size, dtype=torch.int64)
        new_mask = torch.zeros(len(order), size, dtype=torch.bool)
        offsets = [size - n if left else 0 for n in lengths]
        for row, (b, n, at) in enumerate(zip(order, lengths, offsets, strict=True)):
            new_logits[row, at : at + n] = logits[b, :n]
            new_ids[row, at : at + n] = ids[b, :n]
            new_mask[row, at : at + n] = True
        out[side] = (new_logits, new_ids, new_mask, offsets)
    chunks = ChunkBatch.from_alignments(
        [case.alignments[b] for b in order], out["student"][3], out["teacher"][3]
    )
    return replace(
        case,
        student_logits=out["student"][0].requires_grad_(),
        teacher_logits=out["teacher"][0],
        student_ids=out["student"][1],
        teacher_ids=out["teacher"][1],
        alignments=[case.alignments[b] for b in order],
        chunks=chunks,
        usable=chunks.usable(out["student"][2], out["teacher"][2]),
        student_mask=out["student"][2],
        teacher_mask=out["teacher"][2],
    )


def every_loss() -> dict[str, Callable[..., LossOutput]]:
    """Each loss as a function of a case and of inputs and options common to all."""

    def loss(name: str, **fixed: object) -> Callable[..., LossOutput]:
        def call(case: Case, **given: object) -> LossOutput:
            return case.loss(name, **fixed, **given)

        return call

    def same_vocab(**fixed: object) -> Callable[..., LossOutput]:
        def call(case: Case, **given: object) -> LossOutput:
            return case.loss("same-vocab-kl", pair=case.shared, **fixed, **given)

        return call

    def with_ids(name: str) -> Callable[..., LossOutput]:
        def call(case: Case, **given: object) -> LossOutput:
            ids = {"student_ids": case.student_ids, "teacher_ids": case.teacher_ids}
            return case.loss(name, **ids, **given)

        return call

    return {
        "p_kl": loss("p-kl"),
        "p_kl chunk top-k": loss("p-kl", top_k=3, top_k_scope="chunk"),
        "p_kl microbatch top-k": loss("p-kl", top_k=5, top_k_scope="microbatch"),
        "p_kl student's top-k": loss("p-kl", top_k=3, top_k_by="student"),
        "h_kl": loss("h-kl"),
        "gold": loss("gold"),
        "uld": loss("uld"),
        "same_vocab_kl": same_vocab(),
        "same_vocab_kl student's top-k": same_vocab(
            top_k=3, top_k_by="student", direction="reverse"
        ),
        "alm": with_ids("alm"),
        "bpm": with_ids("bpm"),
        "escd": with_ids("escd"),
        "partition_kl": with_ids("partition-kl"),
        "strict_top_k": loss("strict-top-k", student_top_k=3),
        "strict_top_k all": loss("strict-top-k", student_top_k=None),
    }
