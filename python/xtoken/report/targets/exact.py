"""What exact KL compares: groups of student tokens at each of a chunk's student positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

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
    """For each student token that the target names a table for each depth along the text."""
    loss, _ = exact_kl_blocks(case.call)
    targets = loss.targets
    for at in range(len(case.chunks)):
        begin, end = int(targets.chunk_ptr[at]), int(targets.chunk_ptr[at + 1])
        if begin == end:
            yield LossView(case.name, (), note="no target: nothing is known of this place")
            continue
        rows, block = case.rows(loss, at)
        part = BlockTargets.of(loss, rows.dtype, block)
        log_student = part.log_student(rows)
        groups = int(targets.group_ptr[end] - targets.group_ptr[begin])
        tables: list[Comparison] = []
        done = 0
        for place in range(begin, end):
            first, last = int(targets.group_ptr[place]), int(targets.group_ptr[place + 1])
            own_slots = [*range(done, done + last - first), groups + place - begin]
            done += last - first
            probs = torch.cat([targets.probs[first:last].double(), targets.tails[place, None]])
            if targets.open[place]:  # the rest is the student's own, up to the most it may be
                rest = probs[-1] if case.has_student else torch.zeros(()).double()
                rest = torch.minimum(rest, log_student[own_slots[-1]].exp().double())
                probs = torch.cat([probs[:-1] * (1 - rest), rest[None]])
            position = _Position(
                case,
                targets,
                place,
                probs,
                log_student[own_slots].double() if case.has_student else None,
                part.weights[own_slots].double(),
            )
            tables += position.tables()
        yield LossView(case.name, tuple(tables), case.value(loss, rows, block))


@dataclass(frozen=True, eq=False)
class _Position:
    """The target of one student token.

    Attributes:
        place: among the positions of `targets`.
        probs: [G + 1] float64, the target's mass of each group, and of all other tokens.
        log_student: [G + 1] log of the student's; None where there is no student.
        weights: [G + 1] c of `losses/exact_kl/block.py`.
    """

    case: Case
    targets: TargetBatch
    place: int
    probs: Tensor
    log_student: Tensor | None
    weights: Tensor

    def tables(self) -> Iterator[Comparison]:
        """What parts from the text at each depth, and all that goes on with it as one: the KL of
        each, by its weight, sums to the loss."""
        first, last = (int(self.targets.group_ptr[self.place + side]) for side in (0, 1))
        members = [
            self.targets.tokens[
                int(self.targets.token_ptr[group]) : int(self.targets.token_ptr[group + 1])
            ].tolist()
            for group in range(first, last)
        ]
        # All other tokens part from the text at once.
        depths = torch.cat([self.targets.depths[first:last], torch.zeros(1, dtype=torch.int64)])
        for depth in sorted(set(depths.tolist())):
            here, below = (depths == depth).nonzero().flatten(), depths > depth
            if self.probs[depths >= depth].sum() > 0:  # else it adds nothing
                yield self._table(depth, here.tolist(), below, members)

    def _table(
        self, depth: int, here: list[int], below: Tensor, members: list[list[int]]
    ) -> Comparison:
        goes_on = bool(below.any())
        probs, log_student = self.probs[here], self.log_student
        students = None if log_student is None else log_student[here]
        if goes_on:
            probs = torch.cat([probs, self.probs[below].sum()[None]])
            if students is not None and log_student is not None:
                students = torch.cat([students, log_student[below].logsumexp(0)[None]])
        # Of all that shares so many tokens with the text.
        mass = float(probs.sum())
        if students is not None:
            students = students - students.logsumexp(0)
        # A row predicts the token after it.
        own = self.case.student_ids[int(self.targets.rows[self.place]) + 1]
        deeper = [members[at] for at in below.nonzero().flatten().tolist()]
        named = [members[at] if at < len(members) else [] for at in here]
        if goes_on:
            named.append([token for tokens in deeper for token in tokens])

        def label(entry: int) -> str:
            if entry == len(here):
                return "go on as the text does"
            if here[entry] == len(members):
                return "all other tokens"
            return _group_name(self.case.structure, named[entry], own)

        entries = Entries.of_logs(
            torch.log(probs / mass),
            students,
            label,
            "groups",
            own=[entry for entry, tokens in enumerate(named) if own in tokens],
            always=[len(here)] if goes_on else [],
        )
        weight = float(self.weights[here[0]]) * mass
        told = "" if abs(weight - 1) < 1e-6 else f"; counts {weight:.2g} times"
        if entries.adds is not None:
            entries = replace(entries, adds=weight * entries.adds)
        return replace(entries, sizes=[len(tokens) or None for tokens in named]).table(
            self._title(depth, own) + told
        )

    def _title(self, depth: int, own: int) -> str:
        title = f"student tokens at {self.case.structure.student(own)}"
        if depth:
            return f"{title} that share {depth} teacher token{'s' * (depth > 1)} with the text"
        if self.targets.open[self.place]:
            title += f"; all other tokens: at most {float(self.targets.tails[self.place]):.0%}"
        return title


def _group_name(structure: PairStructure, tokens: list[int], own: int) -> str:
    """The tokens of a group, the text's own or the shortest first."""
    vocab = structure.projection.vocabularies()[0]
    ranked = sorted(tokens, key=lambda t: (t != own, len(vocab.token_bytes(t)), t))
    shown = " ".join(structure.student(token) for token in ranked[:3])
    return shown if len(tokens) <= 3 else f"{shown} …"
