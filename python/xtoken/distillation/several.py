"""Several teachers of one student, each with its own pair and loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from xtoken.data.examples import Example, cut_together
from xtoken.distillation.batch import Batch
from xtoken.distillation.distiller import Counts, Distiller, DistillOutput, Item
from xtoken.errors import ArgumentTypeError, OptionError, PairError
from xtoken.losses.cross_entropy import cross_entropy
from xtoken.losses.engine.student_input import Student
from xtoken.losses.inputs import LossInputs
from xtoken.losses.multi_teacher import Confidence, TeacherTerm, multi_teacher
from xtoken.losses.output import combine
from xtoken.pair import Pair
from xtoken.tensors.teacher_signal import Teacher

Weights = Sequence[float] | Confidence


@dataclass(frozen=True, eq=False)
class MultiBatch:
    """One padded batch of the student and of each teacher: the same text for all.

    Attributes:
        batches: one per teacher; all have the same student side.
    """

    batches: tuple[Batch, ...]

    @property
    def student(self) -> dict[str, Tensor]:
        """What the student's model takes: `model(**batch.student)`."""
        return self.batches[0].student

    @property
    def teachers(self) -> tuple[dict[str, Tensor], ...]:
        """What each teacher's model takes."""
        return tuple(batch.teacher for batch in self.batches)

    @property
    def tokens(self) -> int:
        """Number of student tokens in the loss mask."""
        return self.batches[0].tokens

    def __len__(self) -> int:
        return len(self.batches[0])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> MultiBatch:
        """The same batch on another device."""
        return MultiBatch(
            tuple(batch.to(device, non_blocking=non_blocking) for batch in self.batches)
        )

    def pin_memory(self) -> MultiBatch:
        """The same batch in page-locked memory."""
        return MultiBatch(tuple(batch.pin_memory() for batch in self.batches))


class MultiDistiller(nn.Module):
    """The weighted sum of the losses of several teachers, and one cross-entropy.

    Args:
        distillers: one per teacher, all of one student; their own `kd_weight` and `ce_weight` are
            not read.
        weights: one per teacher, or by what each teacher is confident of, per sample: `ce`,
            `entropy` or `max_prob`.
        kd_weight, ce_weight: of the weighted sum and of the cross-entropy, as in `Distiller`.

    Raises:
        OptionError: no teacher, weights that are negative or not one per teacher.
        PairError: the students differ.
    """

    def __init__(
        self,
        distillers: Sequence[Distiller],
        weights: Weights | None = None,
        *,
        kd_weight: float | Literal["balanced"] = 1.0,
        ce_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if not distillers:
            raise OptionError("0 teachers, expected at least 1; pass pairs or distillers")
        for distiller in distillers[1:]:
            mine, other = distillers[0].pair.fingerprints, distiller.pair.fingerprints
            if mine.student != other.student:
                raise PairError(
                    f"the pairs have students {mine.student[:12]} and {other.student[:12]}; "
                    "several teachers need one student tokenizer"
                )
        if weights is None:
            weights = [1.0] * len(distillers)
        if not isinstance(weights, str) and (
            len(weights) != len(distillers) or not all(0 <= w < float("inf") for w in weights)
        ):
            raise OptionError(
                f"weights = {list(weights)}, expected {len(distillers)} numbers of at least 0, one "
                "per teacher, or 'ce', 'entropy', 'max_prob'"
            )
        self.distillers = nn.ModuleList(distillers)
        self.weights: Weights = weights
        self.kd_weight = kd_weight
        self.ce_weight = ce_weight

    def _members(self) -> list[Distiller]:
        return [member for member in self.distillers if isinstance(member, Distiller)]

    def collate(self, items: Sequence[Item]) -> MultiBatch:
        """One batch of texts or conversations for all: each is cut where it suits every teacher."""
        members = self._members()
        rows: list[list[Example]] = [member.examples(items) for member in members]
        if len({len(row) for row in rows}) != 1:
            raise ArgumentTypeError(
                "a template makes several examples of one conversation for one teacher and not for "
                "another; pass conversations of one answer each"
            )
        together = [
            cut_together(examples, [member.pair.aligner for member in members])
            for examples in zip(*rows, strict=True)
        ]
        return MultiBatch(
            tuple(
                member.collator([examples[index] for examples in together])
                for index, member in enumerate(members)
            )
        )

    def counts(self, batch: MultiBatch) -> tuple[Counts, ...]:
        """The counts of each teacher's batch."""
        return tuple(
            member.counts(part) for member, part in zip(self._members(), batch.batches, strict=True)
        )

    def forward(
        self,
        student: Student,
        teachers: Sequence[Teacher],
        batch: MultiBatch,
        *,
        totals: Sequence[Counts] | None = None,
        kd_scale: float | None = None,
    ) -> DistillOutput:
        """The loss of one batch; `teachers` are the signals in the order of the distillers."""
        members = self._members()
        if len(teachers) != len(members):
            raise ArgumentTypeError(
                f"{len(teachers)} teacher signals for {len(members)} teachers; pass one each"
            )
        totals = totals or self.counts(batch)
        ce = None
        if self.ce_weight != 0 or self.kd_weight == "balanced":
            first = batch.batches[0]
            ce = cross_entropy(
                student,
                first.student_ids,
                first.student_loss_mask,
                max(totals[0].tokens, 1.0),
                vocab_size=members[0].pair.sizes[0],
            ).loss
        terms = []
        for member, teacher, part, count in zip(
            members, teachers, batch.batches, totals, strict=True
        ):
            member.check(teacher, part)
            inputs = LossInputs(
                student,
                teacher,
                part.chunks,
                student_ids=part.student_ids,
                teacher_ids=part.teacher_ids,
                normalizer=max(count.chunks, 1.0),
            )
            assert member.spec is not None
            terms.append(TeacherTerm(member.spec.name, inputs, member.parts, member.options))
        output = multi_teacher(terms, weights=self.weights)
        weight = kd_scale
        if weight is None and self.kd_weight != "balanced":
            weight = self.kd_weight
        loss, scale_metric = combine(output.loss, ce, kd_weight=weight, ce_weight=self.ce_weight)
        return DistillOutput(
            loss,
            output.loss,
            ce,
            scale_metric["kd_scale"],
            output.num_chunks,
            batch.tokens,
            {**output.metrics, **scale_metric},
        )


def several(
    teachers: Sequence[Pair | Distiller],
    weights: Weights | None = None,
    *,
    kd_weight: float | Literal["balanced"] = 1.0,
    ce_weight: float = 0.0,
) -> MultiDistiller:
    """A distiller of several teachers; see `MultiDistiller`. A bare pair gets `prefix-kl`."""
    members = [item if isinstance(item, Distiller) else Distiller(item) for item in teachers]
    return MultiDistiller(members, weights, kd_weight=kd_weight, ce_weight=ce_weight)
