"""What exact KL compares: groups of student tokens at each of a chunk's student positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from xtoken.losses.exact_kl.block import BlockTargets
from xtoken.losses.exact_kl.loss import exact_kl_blocks
from xtoken.report.comparisons import Comparison, LossView
from xtoken.report.structure import PairStructure
from xtoken.report.targets.case import Case
from xtoken.report.targets.entries import Entries
from xtoken.tensors.target_batch import TargetBatch


def exact_kl_views(case: Case) -> Iterator[LossView]:
    """A table for each student token that the target names."""
    loss, _ = exact_kl_blocks(case.call)
    targets = loss.targets
    for at in range(len(case.chunks)):
        begin, end = int(targets.chunk_ptr[at]), int(targets.chunk_ptr[at + 1])
        if begin == end:
            yield LossView(case.name, (), note="no target: nothing is known of this place")
            continue
        rows, block = case.rows(loss, at)
        log_student = BlockTargets.of(loss, rows.dtype, block).log_student(rows)
        groups = int(targets.group_ptr[end] - targets.group_ptr[begin])
        tables, done = [], 0
        for place in range(begin, end):
            first, last = int(targets.group_ptr[place]), int(targets.group_ptr[place + 1])
            own_slots = [*range(done, done + last - first), groups + place - begin]
            done += last - first
            probs = torch.cat([targets.probs[first:last].double(), targets.tails[place, None]])
            is_open = bool(targets.open[place])
            if is_open:  # the rest is the student's own, up to the most that it may be
                rest = probs[-1] if case.has_student else torch.zeros(()).double()
                rest = torch.minimum(rest, log_student[own_slots[-1]].exp().double())
                probs = torch.cat([probs[:-1] * (1 - rest), rest[None]])
            students = log_student[own_slots] if case.has_student else None
            # A row predicts the token after it.
            token = case.student_ids[int(targets.rows[place]) + 1]
            tables.append(_groups(case, targets, (first, last), probs, students, token))
            if is_open:
                most = f"all other tokens: at most {float(targets.tails[place]):.0%}"
                title = f"{tables[-1].title}; {most}"
                tables[-1] = replace(tables[-1], title=title)
        yield LossView(case.name, tuple(tables), case.value(loss, rows, block))


def _groups(
    case: Case,
    targets: TargetBatch,
    groups: tuple[int, int],
    probs: Tensor,
    log_student: Tensor | None,
    own: int,
) -> Comparison:
    members = [
        targets.tokens[int(targets.token_ptr[group]) : int(targets.token_ptr[group + 1])].tolist()
        for group in range(*groups)
    ]

    def label(place: int) -> str:
        if place == len(members):
            return "all other tokens"
        return _group_name(case.structure, members[place], own)

    entries = Entries.of_logs(
        torch.log(probs),
        log_student,
        label,
        "groups",
        own=[place for place, tokens in enumerate(members) if own in tokens],
    )
    entries = replace(entries, sizes=[len(tokens) for tokens in members])
    return entries.table(f"student tokens at {case.structure.student(own)}")


def _group_name(structure: PairStructure, tokens: list[int], own: int) -> str:
    """The tokens of a group, the text's own or the shortest first."""
    vocab = structure.projection.vocabularies()[0]
    ranked = sorted(tokens, key=lambda t: (t != own, len(vocab.token_bytes(t)), t))
    shown = " ".join(structure.student(token) for token in ranked[:3])
    return shown if len(tokens) <= 3 else f"{shown} …"
