"""Slow, obvious twins of the losses: float64, one chunk at a time, straight from the definitions.

They take whole logits and Python loops, share no code with the library, and are differentiable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def chunk_distribution(
    logits: Tensor, sample: int, start: int, end: int, merge: str, temperature: float, size: int
) -> Tensor:
    """[size] the normalized distribution of one side of one chunk."""
    rows = [
        torch.softmax(logits[sample, token - 1, :size].double() / temperature, -1)
        for token in range(start, end)
    ]
    if merge == "chain":
        return rows[0]
    if merge == "last":
        return rows[-1]
    mean = sum(torch.log(row) for row in rows) / len(rows)
    return torch.exp(mean) / torch.exp(mean).sum()


def pairs(student_logits, teacher_logits, chunks, merge, temperature, v_s, v_t):
    """Each chunk's two distributions."""
    for c in range(len(chunks)):
        sample = int(chunks.sample[c])
        p = chunk_distribution(
            student_logits, sample, int(chunks.student_start[c]), int(chunks.student_end[c]),
            merge, temperature, v_s,
        )  # fmt: skip
        q = chunk_distribution(
            teacher_logits.detach(), sample, int(chunks.teacher_start[c]),
            int(chunks.teacher_end[c]), merge, temperature, v_t,
        )  # fmt: skip
        yield p, q


def kl(a: Tensor, b: Tensor) -> Tensor:
    total = a.new_zeros(())
    for x, y in zip(a, b, strict=True):
        if float(x.detach()) > 0:
            total = total + x * (torch.log(x) - torch.log(y))
    return total


def divergence(q: Tensor, p: Tensor, direction: str, beta: float) -> Tensor:
    if direction == "forward":
        return kl(q, p)
    if direction == "reverse":
        return kl(p, q)
    m = beta * q + (1 - beta) * p
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def dense(indptr, indices, weights, shape) -> Tensor:
    w = torch.zeros(*shape, dtype=torch.float64)
    for row in range(shape[0]):
        for j in range(int(indptr[row]), int(indptr[row + 1])):
            w[row, int(indices[j])] += float(weights[j])
    return w


def p_kl(
    student_logits, teacher_logits, w, chunks, *, top_k=None, top_k_scope="chunk",
    top_k_by="teacher", tail_bucket=False, merge="chain", temperature=1.0, direction="forward",
    beta=0.5,
) -> Tensor:  # fmt: skip
    """Sum over chunks; `w` is a dense [V_s, V_t] float64."""
    v_s, v_t = w.shape
    supported = [t for t in range(v_t) if float(w[:, t].detach().sum()) > 0]
    both = list(pairs(student_logits, teacher_logits, chunks, merge, temperature, v_s, v_t))
    shared = supported
    if top_k is not None and top_k_scope == "microbatch":
        mass = sum((q for _, q in both), w.new_zeros(v_t))
        shared = sorted(supported, key=lambda t: -float(mass[t]))[:top_k]
    total = w.new_zeros(())
    for p, q in both:
        kept, projected = shared, p @ w
        if top_k is not None and top_k_scope == "chunk":
            likely = q if top_k_by == "teacher" else projected.detach()
            kept = sorted(supported, key=lambda t, x=likely: -float(x[t]))[:top_k]
        a, b = q[kept], projected[kept]
        if tail_bucket:
            a = torch.cat([a, (1 - a.sum())[None]])
            b = torch.cat([b, (p.sum() - b.sum())[None]])
        total = total + divergence(a / a.sum(), b / b.sum(), direction, beta)
    return total * temperature**2


def sorted_l1(p: Tensor, q: Tensor) -> Tensor:
    a = torch.sort(p, descending=True).values
    b = torch.sort(q, descending=True).values
    size = max(len(a), len(b))
    a = torch.cat([a, a.new_zeros(size - len(a))])
    b = torch.cat([b, b.new_zeros(size - len(b))])
    return (a - b).abs().sum()


def hybrid(
    student_logits, teacher_logits, chunks, common, v_s, v_t, *, common_weight=1.0, uld_weight=1.0,
    merge="chain", temperature=1.0, direction="forward", beta=0.5,
) -> Tensor:  # fmt: skip
    """GOLD and H-KL; `common` is a list of (student id, teacher id). Sum over chunks."""
    s_ids, t_ids = [s for s, _ in common], [t for _, t in common]
    s_rest = [s for s in range(v_s) if s not in s_ids]
    t_rest = [t for t in range(v_t) if t not in t_ids]
    total = torch.zeros((), dtype=torch.float64)
    for p, q in pairs(student_logits, teacher_logits, chunks, merge, temperature, v_s, v_t):
        partial = divergence(q[t_ids], p[s_ids], direction, beta)
        total = total + common_weight * partial + uld_weight * sorted_l1(p[s_rest], q[t_rest])
    return total * temperature**2


def same_vocab_kl(
    student_logits, teacher_logits, chunks, size, *, top_k=None, top_k_by="teacher",
    tail_bucket=False, temperature=1.0, direction="forward", beta=0.5,
) -> Tensor:  # fmt: skip
    total = torch.zeros((), dtype=torch.float64)
    for p, q in pairs(student_logits, teacher_logits, chunks, "chain", temperature, size, size):
        if top_k is not None:
            likely = q if top_k_by == "teacher" else p.detach()
            kept = sorted(range(size), key=lambda t, x=likely: -float(x[t]))[:top_k]
            rests = [(1 - x[kept].sum())[None] if tail_bucket else x[:0] for x in (p, q)]
            p, q = torch.cat([p[kept], rests[0]]), torch.cat([q[kept], rests[1]])
            p, q = p / p.sum(), q / q.sum()
        total = total + divergence(q, p, direction, beta)
    return total * temperature**2


def partition_kl(
    student_logits, teacher_logits, student_ids, teacher_ids, chunks, common, student_pieces,
    teacher_pieces, *, mismatch_weight=1.0, temperature=1.0, direction="forward", beta=0.5,
) -> Tensor:  # fmt: skip
    """Sum over chunks; `common` is a list of (student id, teacher id), the pieces are lists of the
    other side's ids for each token."""
    total = torch.zeros((), dtype=torch.float64)
    v_s, v_t = len(student_pieces), len(teacher_pieces)
    for c in range(len(chunks)):
        b, sides = int(chunks.sample[c]), []
        for logits, ids, start, end, size in (
            (student_logits, student_ids, chunks.student_start, chunks.student_end, v_s),
            (teacher_logits.detach(), teacher_ids, chunks.teacher_start, chunks.teacher_end, v_t),
        ):
            tokens, rows = [], []
            for t in range(int(start[c]), int(end[c])):
                tokens.append(int(ids[b, t]))
                rows.append(torch.softmax(logits[b, t - 1, :size].double() / temperature, -1))
            before = torch.ones((), dtype=torch.float64)
            for row, token in zip(rows[:-1], tokens, strict=False):
                before = before * row[token]
            sides.append((tokens, before * rows[-1]))
        (own, p), (other, q) = sides
        events = []
        if len(own) == len(other) == 1:
            events = list(common)
        elif len(own) == 1:
            events = _same_but_last(student_pieces, other, teacher_pieces)
        elif len(other) == 1:
            found = _same_but_last(teacher_pieces, own, student_pieces)
            events = [(last, token) for token, last in found]
        kept = [(s, t) for s, t in events if s != own[-1] and t != other[-1]]
        kept.append((own[-1], other[-1]))
        student = torch.stack([p[s] for s, _ in kept])
        teacher = torch.stack([q[t] for _, t in kept])
        student = torch.cat([student, (1 - student.sum())[None]])
        teacher = torch.cat([teacher, (1 - teacher.sum())[None]])
        weight = 1.0 if len(own) == len(other) == 1 else mismatch_weight
        total = total + weight * divergence(teacher, student, direction, beta)
    return total * temperature**2


def _same_but_last(pieces, chain, spelled) -> list[tuple[int, int]]:
    """(token, its last piece) of tokens with these pieces but for the last; of several with the
    same pieces the first. What no token has as a piece is the first that is `spelled` alike."""
    used = sorted({piece for each in pieces for piece in each})

    def piece_of(token: int) -> int:
        alike = [piece for piece in used if spelled[token] and spelled[piece] == spelled[token]]
        return alike[0] if alike and token not in used else token

    before = [piece_of(token) for token in chain[:-1]]
    found = {}
    for token, each in enumerate(pieces):
        if len(each) == len(chain) and list(each[:-1]) == before:
            found.setdefault(each[-1], token)
    return [(token, last) for last, token in found.items()]


def strict_top_k(
    student_logits, teacher_logits, chunks, common, v_s, v_t, *, student_top_k=16, temperature=1.0
) -> Tensor:  # fmt: skip
    """Sum over chunks; `common` is a list of (student id, teacher id)."""
    total = torch.zeros((), dtype=torch.float64)
    both = pairs(student_logits, teacher_logits, chunks, "chain", temperature, v_s, v_t)
    for c, (p, q) in enumerate(both):
        sizes = [
            int(getattr(chunks, f"{side}_end")[c] - getattr(chunks, f"{side}_start")[c])
            for side in ("student", "teacher")
        ]
        if sizes != [1, 1]:
            continue
        best = sorted(common, key=lambda pair, p=p: -float(p[pair[0]].detach()))[:student_top_k]
        own, other = p[[s for s, _ in best]], q[[t for _, t in best]]
        total = total + kl(own / own.sum(), other / other.sum())
    return total * temperature**2


def cross_entropy(student_logits, ids, mask, size) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for b in range(ids.shape[0]):
        for t in range(1, ids.shape[1]):
            if bool(mask[b, t]):
                row = student_logits[b, t - 1, :size].double()
                total = total - torch.log(torch.softmax(row, -1)[int(ids[b, t])])
    return total


def alm(
    student_logits, teacher_logits, student_ids, teacher_ids, chunks, v_s, v_t, *,
    temperature=100.0, direction="forward", beta=0.5,
) -> Tensor:  # fmt: skip
    total = torch.zeros((), dtype=torch.float64)
    for c in range(len(chunks)):
        b = int(chunks.sample[c])
        sides = []
        for logits, ids, start, end, size in (
            (student_logits, student_ids, chunks.student_start, chunks.student_end, v_s),
            (teacher_logits.detach(), teacher_ids, chunks.teacher_start, chunks.teacher_end, v_t),
        ):
            prob = torch.ones((), dtype=torch.float64)
            for t in range(int(start[c]), int(end[c])):
                row = torch.softmax(logits[b, t - 1, :size].double(), -1)
                prob = prob * row[int(ids[b, t])]
            power = prob ** (1.0 / temperature)
            sides.append(torch.stack([power, 1 - power]))
        total = total + divergence(sides[1], sides[0], direction, beta)
    return total


def entropy(q: Tensor) -> float:
    return -sum(float(x) * math.log(float(x)) for x in q if float(x) > 0)
