"""What the teacher itself says of the held-out text and its numerals: what a student can reach."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from xtoken import Vocab
from xtoken.data import Example
from xtoken.teachers import LiveTeacher
from xtoken.training.evaluate import NUMERAL

MOST_DIGITS = 3  # of a student token


@torch.no_grad()
def score_teacher(
    teacher: LiveTeacher, examples: Sequence[Example], student_vocab: Vocab, teacher_vocab: Vocab
) -> dict[str, float]:
    """Scores of a teacher that spells a numeral digit by digit.

    A numeral has the probability of its digits one after the other and, where it is shorter than
    the student's longest, of no further digit.

    Returns: `bits_per_byte`; means over the student tokens that are numerals of two or three
        digits, in nats: `numeral_nll`, which is the sum of `first_digit` (that a numeral comes at
        all is in it) and `rest`; and their number.
    """
    digits = torch.tensor(
        [i for i in range(len(teacher_vocab)) if _bytes(teacher_vocab, i).isdigit()]
    )
    sums = dict.fromkeys(("nats", "bytes", "first", "rest", "numerals"), 0.0)
    for example in examples:
        ids = torch.from_numpy(example.teacher_ids)[None]
        log_probs = teacher.logits(ids, torch.ones_like(ids))[0].double().log_softmax(-1)
        nats = -log_probs[:-1].gather(1, ids[0, 1:, None])[:, 0]  # of tokens 1, 2, ...
        lengths = torch.tensor([len(_bytes(teacher_vocab, i)) for i in ids[0, 1:].tolist()])
        sums["nats"] += float(nats[lengths > 0].sum())
        sums["bytes"] += float(lengths.sum())
        further = log_probs[:, digits].exp().sum(1)
        alignment = example.alignment
        starts, ends = alignment.student_bounds[:-1], alignment.student_bounds[1:]
        for chunk in (ends - starts == 1).nonzero()[0]:
            numeral = _bytes(student_vocab, int(example.student_ids[starts[chunk]]))
            first, end = (int(alignment.teacher_bounds[chunk + i]) for i in (0, 1))
            if not NUMERAL.fullmatch(numeral) or end - first != len(numeral) or first == 0:
                continue
            rest = float(nats[first : end - 1].sum())
            if len(numeral) < MOST_DIGITS:
                rest -= math.log1p(-float(further[end - 1]))
            sums["first"] += float(nats[first - 1])
            sums["rest"] += rest
            sums["numerals"] += 1
    count = sums["numerals"]
    return {
        "bits_per_byte": sums["nats"] / math.log(2) / sums["bytes"],
        "numeral_nll": (sums["first"] + sums["rest"]) / count,
        "first_digit": sums["first"] / count,
        "rest": sums["rest"] / count,
        "numerals": count,
    }


def _bytes(vocab: Vocab, token: int) -> bytes:
    return b"" if vocab.is_special(token) else vocab.token_bytes(token)
