"""Several teachers of one student, each with its own pair and loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from xtoken._checks import expect
from xtoken.distillation.batch import Batch
from xtoken.distillation.distiller import Distiller
from xtoken.distillation.items import Item, examples_together
from xtoken.distillation.options import check_weights
from xtoken.distillation.output import Counts, DistillOutput, checked_counts
from xtoken.errors import ArgumentTypeError, OptionError, PairError, ShapeError
from xtoken.losses.engine.student_input import Student
from xtoken.losses.multi_teacher import Confidence, check_confidence, multi_teacher, weight_numbers
from xtoken.pair import Pair
from xtoken.tensors.teacher_signal import Teacher

Weights = Sequence[float] | Confidence


@dataclass(frozen=True, eq=False)
class MultiBatch:
    """One padded batch of the student and of each teacher: the same text for all.

    Attributes:
        batches: one per teacher; all have the same student side.

    Raises:
        ShapeError: they hold other student tokens, or padding.
    """

    batches: tuple[Batch, ...]

    def __post_init__(self) -> None:
        first = self.batches[0].student_ids
        for index, batch in enumerate(self.batches[1:], 1):
            own = batch.student_ids
            same = own is first or own.shape == first.shape
            # On a card the values would be waited for.
            if not same or (own is not first and own.is_cpu and not torch.equal(own, first)):
                raise ShapeError(
                    f"batches[{index}] holds other student tokens or padding than batches[0]; make "
                    "all of one text, by collate of xtoken.distiller([...])"
                )

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
        OptionError: no teacher, weights that are negative or not one per teacher, distillers that
            pad otherwise than the first.
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
        for index, distiller in enumerate(distillers):
            if distiller.spec is None:
                raise OptionError(
                    f"distillers[{index}] has loss 'ce', which reads no teacher; leave it out, and "
                    "pass ce_weight"
                )
        check_weights("several teachers", kd_weight, ce_weight)
        for distiller in distillers[1:]:
            mine, other = distillers[0].pair.fingerprints, distiller.pair.fingerprints
            if mine.student != other.student:
                raise PairError(
                    f"the pairs have students {mine.student[:12]} and {other.student[:12]}; "
                    "several teachers need one student tokenizer"
                )
            first, own = (
                f"on the {each.padding_side} to multiples of {each.pad_to_multiple_of}"
                for each in (distillers[0].collator, distiller.collator)
            )
            if first != own:
                raise OptionError(
                    f"one distiller pads {first}, another {own}, but the student has one batch; "
                    "make all with one padding_side and pad_to_multiple_of"
                )
        if weights is None:
            weights = [1.0] * len(distillers)
        if isinstance(weights, str):
            check_confidence(weights)
        else:
            weights = weight_numbers(weights, len(distillers))
            if len(weights) != len(distillers) or not all(0 <= w < float("inf") for w in weights):
                raise OptionError(
                    f"weights = {weights}, expected {len(distillers)} numbers of at least 0, one "
                    "per teacher, or 'ce', 'entropy', 'max_prob'"
                )
        self.distillers = nn.ModuleList(distillers)
        self.weights: Weights = weights
        self.kd_weight = kd_weight
        self.ce_weight = ce_weight

    def _members(self) -> list[Distiller]:
        return [member for member in self.distillers if isinstance(member, Distiller)]

    @property
    def max_tokens(self) -> int | None:
        """The smallest limit of the teachers."""
        limits = (member.max_tokens for member in self._members())
        return min((limit for limit in limits if limit is not None), default=None)

    def collate(self, items: Sequence[Item]) -> MultiBatch:
        """One batch of texts or conversations for all: each is cut where it suits every teacher."""
        members = self._members()
        together = examples_together(items, [each.pair for each in members], self.max_tokens)
        return MultiBatch(
            tuple(
                member.collator([examples[index] for examples in together])
                for index, member in enumerate(members)
            )
        )

    def counts(self, batch: MultiBatch) -> tuple[Counts, ...]:
        """The counts of each teacher's batch."""
        _check_batch(batch, len(self.distillers))
        read = self.kd_weight != 0
        return tuple(Counts(part.tokens, len(part.chunks) if read else 0) for part in batch.batches)

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
        _check_batch(batch, len(members))
        for member, teacher, part in zip(members, teachers, batch.batches, strict=True):
            member.check(teacher, part, needed=self.kd_weight != 0)
        if totals is None:
            totals = self.counts(batch)
        expect(totals, (tuple, list), "totals", "pass one Counts per teacher, as counts gives")
        if len(totals) != len(members):
            raise ArgumentTypeError(
                f"{len(totals)} totals for {len(members)} teachers; add up distiller.counts(batch)"
            )
        totals = [checked_counts(each, f"totals[{i}]") for i, each in enumerate(totals)]
        ce = None
        if self.ce_weight != 0 or self.kd_weight == "balanced":
            first = batch.batches[0]
            ce = members[0].cross_entropy(student, teachers[0], first, totals[0].tokens)
        if self.kd_weight == 0:
            return DistillOutput.of(
                None, ce, batch.tokens, kd_weight=self.kd_weight, ce_weight=self.ce_weight
            )
        terms = []
        for member, teacher, part, count in zip(
            members, teachers, batch.batches, totals, strict=True
        ):
            terms.append(member.term(student, teacher, part, count.chunks))
        return DistillOutput.of(
            multi_teacher(terms, weights=self.weights), ce, batch.tokens,
            kd_weight=self.kd_weight, ce_weight=self.ce_weight, kd_scale=kd_scale,
        )  # fmt: skip


def _check_batch(batch: MultiBatch, teachers: int) -> None:
    if not isinstance(batch, MultiBatch) or len(batch.batches) != teachers:
        found = type(batch).__name__
        if isinstance(batch, MultiBatch):
            found += f" of {len(batch.batches)} teachers"
        raise ArgumentTypeError(
            f"batch is a {found}, expected a MultiBatch of {teachers}; pass this distiller's "
            "collate(texts)"
        )


def several(
    teachers: Sequence[Pair | Distiller],
    weights: Weights | None = None,
    *,
    kd_weight: float | Literal["balanced"] = 1.0,
    ce_weight: float = 0.0,
) -> MultiDistiller:
    """A distiller of several teachers; see `MultiDistiller`. A bare pair gets `prefix-kl`."""
    if isinstance(teachers, Pair | Distiller):
        raise ArgumentTypeError(
            f"teachers is a {type(teachers).__name__}; pass a list, or call pair.distiller(loss)"
        )
    members = [item if isinstance(item, Distiller) else Distiller(item) for item in teachers]
    return MultiDistiller(members, weights, kd_weight=kd_weight, ce_weight=ce_weight)
