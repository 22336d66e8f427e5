"""Slow twins of the losses that read bytes: BPM and ESCD, in float64, by loops over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from reference_losses import divergence

COMPLEMENT = -1


def longest_prefix(text: bytes, tokens: list[bytes]) -> int:
    """The id of the longest token that a text begins with; `COMPLEMENT` for none."""
    fitting = [i for i, token in enumerate(tokens) if token and text.startswith(token)]
    return max(fitting, key=lambda i: len(tokens[i]), default=COMPLEMENT)


def row(logits: Tensor, sample: int, position: int, size: int, temperature: float) -> Tensor:
    return torch.softmax(logits[sample, position, :size].double() / temperature, -1)


def bpm_target(
    rows: list[Tensor], texts: list[bytes], at: int, text: bytes, student: list[bytes],
    teacher: list[bytes], specials: dict[int, int],
) -> tuple[dict[int, float], set[int]]:  # fmt: skip
    """What a position at byte `at` of a chunk should be: masses by student token, and the tokens
    that are compared one by one.

    Args:
        rows: the teacher's distribution at each of its tokens of the chunk.
        texts: the bytes of those tokens.
        text: the chunk's.
    """
    part, before = 0, at
    while part < len(texts) and texts[part] and before >= len(texts[part]):
        before -= len(texts[part])
        part += 1
    so_far = texts[part][:before]
    masses: dict[int, float] = {}
    names = set()
    total = 0.0
    for v, bytes_of in enumerate(teacher):
        if before and not bytes_of.startswith(so_far):
            continue
        if not bytes_of:
            token = specials.get(v, COMPLEMENT)
        else:
            token = longest_prefix(bytes_of[before:], student)
        names.add(token)
        total += float(rows[part][v])
        masses[token] = masses.get(token, 0.0) + float(rows[part][v])
    masses = {token: mass / total for token, mass in masses.items()}

    def chain(end: int) -> float:
        """The probability that the teacher goes on with text[at:end], along the text."""
        product, j, left = 1.0 / total, part, before + end - at
        while left > len(texts[j]):
            same = [v for v, b in enumerate(teacher) if b == texts[j]]
            product *= float(rows[j][same].sum())
            left -= len(texts[j])
            j += 1
        reached = [v for v, b in enumerate(teacher) if b and b.startswith(texts[j][:left])]
        return product * float(rows[j][reached].sum())

    head = longest_prefix(texts[part][before:], student) if texts[part] else COMPLEMENT
    for end in range(at + len(texts[part]) - before + 1, len(text) + 1):
        if text[at:end] in student:
            token, mass = student.index(text[at:end]), chain(end)
            masses[head] = masses.get(head, 0.0) - mass
            masses[token] = masses.get(token, 0.0) + mass
            names.add(token)
            head = token
    return masses, names - {COMPLEMENT}


def compare(
    masses: dict[int, float], names: set[int], p: Tensor, direction: str, beta: float
) -> Tensor:
    """Single tokens and the complement; without a token outside, the masses are scaled to 1."""
    kept = sorted(names)
    outside = [u for u in range(len(p)) if u not in names]
    q = [masses.get(u, 0.0) for u in kept]
    student = [p[u] for u in kept]
    if outside:
        q.append(masses.get(COMPLEMENT, 0.0))
        student.append(p[outside].sum())
    target = torch.tensor(q, dtype=torch.float64)
    return divergence(target / target.sum(), torch.stack(student), direction, beta)


def bpm(
    student_logits, teacher_logits, student_ids, teacher_ids, chunks, student, teacher, *,
    specials=None, mask_spaces=True, temperature=1.0, direction="forward", beta=0.5,
) -> Tensor:  # fmt: skip
    """Sum over chunks; `student` and `teacher` are lists of bytes, `specials` of teacher ids."""
    specials = specials or {}
    total = torch.zeros((), dtype=torch.float64)
    for c in range(len(chunks)):
        b = int(chunks.sample[c])
        own = range(int(chunks.student_start[c]), int(chunks.student_end[c]))
        other = range(int(chunks.teacher_start[c]), int(chunks.teacher_end[c]))
        rows = [row(teacher_logits, b, t - 1, len(teacher), temperature) for t in other]
        texts = [teacher[int(teacher_ids[b, t])] for t in other]
        text = b"".join(texts)
        same = text == b"".join(student[int(student_ids[b, s])] for s in own)
        at = 0
        for s in own:
            token = student[int(student_ids[b, s])]
            if s == own[0] or (same and text):
                found = bpm_target(
                    rows if same else rows[:1], texts if same else texts[:1], at,
                    text if same else texts[0], student, teacher, specials,
                )  # fmt: skip
                if not (mask_spaces and token and not token.strip(b" \t")):
                    p = row(student_logits, b, s - 1, len(student), temperature)
                    total = total + compare(*found, p, direction, beta)
            at += len(token)
    return total * temperature**2


def events(student: list[bytes], teacher: list[bytes]) -> dict[bytes, list[int]]:
    """The teacher's tokens without a student token of the same bytes, by the shortest of them that
    their bytes begin with."""
    alone = [v for v, b in enumerate(teacher) if b and b not in student]
    found: dict[bytes, list[int]] = {}
    for v in alone:
        shortest = min((teacher[w] for w in alone if teacher[v].startswith(teacher[w])), key=len)
        found.setdefault(shortest, []).append(v)
    return found


def escd(
    student_logits, teacher_logits, student_ids, teacher_ids, chunks, student, teacher, *,
    specials=None, temperature=1.0,
) -> Tensor:  # fmt: skip
    """Sum over chunks, in any order."""
    specials = specials or {}
    total = torch.zeros((), dtype=torch.float64)
    bounds = [
        (int(chunks.sample[c]), int(chunks.student_start[c]), int(chunks.student_end[c]))
        for c in range(len(chunks))
    ]
    for c, (b, start, end) in enumerate(bounds):
        q = row(teacher_logits, b, int(chunks.teacher_start[c]) - 1, len(teacher), temperature)
        p = row(student_logits, b, start - 1, len(student), temperature)
        first = teacher[int(teacher_ids[b, chunks.teacher_start[c]])]
        masses, names = bpm_target([q], [first], 0, first, student, teacher, specials)
        total = total + compare(masses, names, p, "forward", 0.5)
        # What follows the root's token is of this chunk, or of the next if that counts.
        after = start + 1
        if after == end and not any(x == b and s == after for x, s, _ in bounds):
            continue
        action = student[int(student_ids[b, start])]
        child = row(student_logits, b, after - 1, len(student), temperature)
        for event, members in events(student, teacher).items():
            if not action or not event.startswith(action) or event == action:
                continue
            rest = event[len(action) :]
            completing = [u for u, text in enumerate(student) if text.startswith(rest)]
            if completing:
                total = total - q[members].sum() * torch.log(child[completing].sum())
    return total * temperature**2
