"""A slow, obvious twin of prefix KL: float64, one chunk and one depth at a time, no trie at all.

It goes through all tokens with their sequences of pieces, shares no code with the library, and is
differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reference_losses import divergence, p_kl


def first_piece_matrix(pieces: list[list[int]], v_t: int) -> Tensor:
    """Dense W with decay 0."""
    w = torch.zeros(len(pieces), v_t, dtype=torch.float64)
    for token, sequence in enumerate(pieces):
        if sequence:
            w[token, sequence[0]] = 1.0
    return w


def piece_of(token: int, pieces: list[list[int]], spelled: list[list[int]]) -> int:
    """The token with the same bytes that `pieces` are made of, if this one is none of them: those
    that the other side spells alike."""
    used = sorted({piece for sequence in pieces for piece in sequence})
    same = [piece for piece in used if spelled[token] and spelled[piece] == spelled[token]]
    return same[0] if same and token not in used else token


def compare(
    below: Tensor, following: Tensor, pieces: list[list[int]], prefix: list[int], *,
    teacher_below: bool, stored: set[int] | None, min_mass: float, end: bool, direction: str,
    beta: float,
) -> Tensor | None:  # fmt: skip
    """The divergence at one prefix; None where there is nothing to compare.

    Args:
        below: the distribution of the model whose tokens are spelled.
        following: the other model's distribution over the next piece.
        stored: what the teacher's stored top-k knows (pieces, or tokens with `teacher_below`).
    """
    d = len(prefix)
    tokens = [t for t, sequence in enumerate(pieces) if sequence and sequence[:d] == prefix]
    ends = [t for t in tokens if len(pieces[t]) == d]
    children = sorted({pieces[t][d] for t in tokens if len(pieces[t]) > d})
    if len(children) + bool(ends) < 2:
        return None
    under = {v: [t for t in tokens if pieces[t][d : d + 1] == [v]] for v in children}
    kept = children
    if stored is not None:
        kept = [v for v in children if (stored & set(under[v]) if teacher_below else v in stored)]
        if teacher_below and ends and not stored & set(ends):
            return None
    has_end = bool(ends) and end
    # Slots that the stored top-k says nothing of are one with END, or out.
    one = [sum((below[t] for t in under[v]), below.new_zeros(())) for v in kept]
    two = [following[v] for v in kept]
    if has_end:
        others = [t for t in tokens if not any(t in under[v] for v in kept)]
        one.append(sum((below[t] for t in others), below.new_zeros(())))
        two.append(sum(following[v] for v in range(len(following)) if v not in kept))
    elif not one or (not teacher_below and float(sum(two).detach()) < min_mass):
        return None
    if float(sum(two).detach()) == 0 or float(sum(one).detach()) == 0:
        return None
    p, q = torch.stack(one), torch.stack(two)
    p, q = p / p.sum(), q / q.sum()
    if teacher_below:
        p, q = q, p
    return divergence(q, p, direction, beta)


def prefix_kl(
    student_logits, teacher_logits, student_pieces, teacher_pieces, chunks, student_ids,
    teacher_ids, *, mirror=True, max_depth=None, depth_weights=(1.0,), min_mass=1e-3, end=True,
    temperature=1.0, direction="forward", beta=0.5, stored_k=None,
) -> Tensor:  # fmt: skip
    """Sum over chunks. `stored_k`: the teacher's top-k alone is known at each position."""
    v_s, v_t = len(student_pieces), len(teacher_pieces)
    w = first_piece_matrix(student_pieces, v_t)
    root = p_kl(
        student_logits, teacher_logits, w, chunks, temperature=temperature, direction=direction,
        beta=beta, top_k=None,
    )  # fmt: skip
    if stored_k is not None:
        root = stored_root(student_logits, teacher_logits, w, chunks, stored_k, direction, beta)
    total = root * depth_weights[0]
    p_rows = torch.softmax(student_logits[..., :v_s].double() / temperature, -1)
    q_rows = torch.softmax(teacher_logits[..., :v_t].detach().double() / temperature, -1)
    for c in range(len(chunks)):
        b = int(chunks.sample[c])
        s0, s1 = int(chunks.student_start[c]), int(chunks.student_end[c])
        t0, t1 = int(chunks.teacher_start[c]), int(chunks.teacher_end[c])
        if s1 - s0 == 1:
            path, at, mirrored = teacher_ids[b, t0:t1].tolist(), t0, False
            path = [piece_of(piece, student_pieces, teacher_pieces) for piece in path]
        elif t1 - t0 == 1 and mirror:
            path, at, mirrored = student_ids[b, s0:s1].tolist(), s0, True
            path = [piece_of(piece, teacher_pieces, student_pieces) for piece in path]
        else:
            continue
        for d in range(1, len(path) + (1 if end else 0)):
            if max_depth is not None and d > max_depth:
                break
            teacher_row = q_rows[b, t0 - 1] if mirrored else q_rows[b, at - 1 + d]
            stored = None
            if stored_k is not None:
                stored = set(torch.topk(teacher_row, stored_k).indices.tolist())
                known = torch.zeros_like(teacher_row)
                known[list(stored)] = teacher_row[list(stored)]
                # Unknown pieces are all in END; unknown tokens are nowhere.
                teacher_row = known if mirrored else teacher_row
            term = compare(
                teacher_row if mirrored else p_rows[b, s0 - 1],
                p_rows[b, at - 1 + d] if mirrored else teacher_row,
                teacher_pieces if mirrored else student_pieces,
                path[:d],
                teacher_below=mirrored, stored=stored, min_mass=min_mass, end=end,
                direction=direction, beta=beta,
            )  # fmt: skip
            if term is not None:
                weight = depth_weights[min(d, len(depth_weights) - 1)]
                total = total + weight * term * temperature**2
    return total


def stored_root(student_logits, teacher_logits, w, chunks, k, direction, beta) -> Tensor:
    """P-KL on the supported ones among each chunk's k best teacher columns."""
    v_s, v_t = w.shape
    total = w.new_zeros(())
    for c in range(len(chunks)):
        b = int(chunks.sample[c])
        q = torch.softmax(
            teacher_logits[b, int(chunks.teacher_start[c]) - 1, :v_t].detach().double(), -1
        )
        row = student_logits[b, int(chunks.student_start[c]) - 1, :v_s]
        p = torch.softmax(row.double(), -1) @ w
        kept = [t for t in torch.topk(q, k).indices.tolist() if float(w[:, t].sum()) > 0]
        if kept:
            total = total + divergence(
                q[kept] / q[kept].sum(), p[kept] / p[kept].sum(), direction, beta
            )
    return total
