"""The teachers of a trainer: where each is, its pair, loss and weight, and the loss of them all."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import nn

from xtoken.data.examples import Example
from xtoken.data.stream import StreamedRow
from xtoken.distillation import (
    Counts,
    Distiller,
    DistillLossName,
    DistillOutput,
    MultiBatch,
    MultiDistiller,
)
from xtoken.distillation.batch import Batch
from xtoken.distillation.items import examples_together
from xtoken.distillation.options import check_teacher_weights
from xtoken.errors import ArgumentTypeError, OptionError, PairError
from xtoken.losses.engine.student_input import Student
from xtoken.losses.exact_kl.batch_targets import target_options
from xtoken.pair import Pair
from xtoken.teachers import LiveTeacher, TargetStore, TeacherSource, TopKStore
from xtoken.teachers.forward import check_ids
from xtoken.teachers.load_model import load_causal_lm
from xtoken.teachers.served import PrefetchedTeacher, ServedTeacher
from xtoken.teachers.store import is_store
from xtoken.training.routing import Routes
from xtoken.training.settings import DistillSettings
from xtoken.training.signals import FusedTeacher, asked_sequences, teacher_signal
from xtoken.training.teacher_pair import pair_of
from xtoken.vocab import TokenizerSource
from xtoken.vocab.head_size import least_columns

AnyBatch: TypeAlias = Batch | MultiBatch


@dataclass(frozen=True, eq=False)
class Teacher:
    """One teacher of a trainer.

    Attributes:
        source: a `LiveTeacher`, a filled `TopKStore` or its folder, a `ServedTeacher`, a causal
            language model, or a directory or hub name of one.
        tokenizer: of the teacher: an object, a directory or hub name; or the whole `Pair`. None
            takes what lies beside the source's weights, or the trainer's own pair.
        loss: a loss of the library; None for that of the settings.
        weight: of this teacher among several.
        name: by which a column of the data names it; None for the last part of its path or name.
    """

    source: TeacherSource | nn.Module | PathLike[str] | str
    tokenizer: Pair | TokenizerSource | None = None
    loss: DistillLossName | None = None
    weight: float = 1.0
    name: str | None = None


AnyTeacher: TypeAlias = Teacher | TeacherSource | nn.Module | PathLike[str] | str


class Teaching(nn.Module):
    """The losses of all teachers of a student as one, and where their predictions come from.

    A trainer calls it with what its student gives; `teach` says how.

    Attributes:
        distillers: one per teacher; their parameters are those of learnable projections.
        sources: one per teacher, None where the loss needs none.
        targets: one per teacher, of a loss that reads targets from stored predictions, else None.
        routes: which teachers a row is for.
        date: the day that chat templates print; None for today.
        fused_teacher: see `DistillSettings`.
    """

    def __init__(
        self,
        distillers: Sequence[Distiller],
        sources: Sequence[TeacherSource | None],
        joint: MultiDistiller | None = None,
        routes: Routes | None = None,
    ) -> None:
        super().__init__()
        self.routes = routes or Routes([""] * len(distillers), None)
        self.distillers = nn.ModuleList(distillers)
        self.sources = list(sources)
        self.joint = joint
        self.date: datetime.date | None = None
        self.fused_teacher: FusedTeacher = False
        self.targets = [
            _target_store(member, source)
            for member, source in zip(distillers, self.sources, strict=True)
        ]

    def without_sources(self) -> Teaching:
        """The same losses, of which no teacher can be asked."""
        same = copy.copy(self)
        same.sources = [None] * len(self.sources)
        return same

    @property
    def members(self) -> list[Distiller]:
        """The distillers by class."""
        return cast("list[Distiller]", list(self.distillers))

    @property
    def first(self) -> Distiller:
        """The distiller of the first teacher; weights are the same in all."""
        return self.members[0]

    @property
    def pairs(self) -> list[Pair]:
        """The pair of each teacher."""
        return [member.pair for member in self.members]

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss reads any teacher."""
        return any(member.needs_teacher for member in self.members)

    @property
    def max_tokens(self) -> int | None:
        """Longest example on any side."""
        return self.first.max_tokens if self.joint is None else self.joint.max_tokens

    def examples(self, item: Any) -> list[tuple[Example, ...]]:
        """What a text or conversation is for each teacher, cut where it suits all of them.

        Raises:
            DataError, ArgumentTypeError: the item cannot be used.
        """
        asked = self.routes.of(item)
        item = item.document if isinstance(item, StreamedRow) else item
        made = examples_together([item], self.pairs, self.max_tokens, date=self.date)
        return self.routes.apply(made, asked)

    def fill_targets(
        self, examples: Sequence[tuple[Example, ...]], update: Callable[[int, str], None]
    ) -> int:
        """Make and keep the targets of examples with each teacher; how many were not kept yet."""
        made = 0
        for index, store in enumerate(self.targets):
            if store is not None:
                own = [each[index] for each in examples]
                made += store.fill(own, progress=lambda done, _: update(done, "targets"))
        return made

    def parts(self, batch: AnyBatch) -> tuple[Batch, ...]:
        """The batch of each teacher."""
        return batch.batches if isinstance(batch, MultiBatch) else (batch,)

    def counts(self, batch: AnyBatch) -> tuple[Counts, ...]:
        """The tokens and chunks of a batch, for each teacher."""
        return tuple(
            member.counts(part)
            for member, part in zip(self.members, self.parts(batch), strict=True)
        )

    def signals(self, batch: AnyBatch) -> list[Any]:
        """The predictions of each teacher on its side of the batch."""
        found: list[Any] = []
        for member, source, part in zip(self.members, self.sources, self.parts(batch), strict=True):
            needed = source is not None and member.needs_teacher
            if needed and isinstance(source, LiveTeacher):
                check_ids(source.model, part.teacher, "teacher", member.pair.sizes[1])
            found.append(
                teacher_signal(source, part, self.fused_teacher)
                if needed and source is not None
                else None
            )
        return found

    @property
    def announces(self) -> bool:
        """Whether a teacher can be asked for what later micro-batches need."""
        return any(isinstance(source, PrefetchedTeacher) for source in self.sources)

    def announce(self, batches: Sequence[AnyBatch]) -> None:
        """Have served teachers asked in the background for what `signals` of batches needs.

        What is answered is kept until the call after the next one.
        """
        for index, source in enumerate(self.sources):
            if isinstance(source, PrefetchedTeacher):
                parts = [self.parts(batch)[index] for batch in batches]
                source.announce([ids for part in parts for ids in asked_sequences(part)])

    def forward(
        self,
        student: Student,
        signals: Sequence[Any],
        batch: AnyBatch,
        totals: Sequence[Counts],
        kd_scale: float | None,
    ) -> DistillOutput:
        """The loss of one micro-batch; see `Distiller`."""
        if self.joint is None:
            (part,) = self.parts(batch)
            output = self.first(student, signals[0], part, totals=totals[0], kd_scale=kd_scale)
        else:
            output = self.joint(student, signals, batch, totals=totals, kd_scale=kd_scale)
        return cast(DistillOutput, output)

    def metrics(
        self, output: DistillOutput, batch: AnyBatch, totals: Sequence[Counts]
    ) -> dict[str, float]:
        """Detached metrics of a micro-batch as its share in those of the step: they add up."""
        found: dict[str, float] = {}
        counts = self.counts(batch)
        found["chunks"] = float(sum(count.chunks for count in counts))
        shares = [
            count.chunks / (total.chunks or 1.0)
            for count, total in zip(counts, totals, strict=True)
        ]
        for name, value in output.metrics.items():
            if name in ("kd_scale", "kd_scale_clipped"):
                continue
            of_one = name.startswith("teacher") and "/" in name
            index = int(name.removeprefix("teacher").split("/")[0]) if of_one else 0
            found[name] = float(value) * shares[index]
        exact = sum(part.coverage.exact_student_tokens for part in self.parts(batch))
        tokens = sum(part.coverage.student_tokens for part in self.parts(batch))
        # The share of the student's tokens in EXACT chunks: sums here, divided once per window.
        found["_exact_tokens"], found["_aligned_tokens"] = float(exact), float(tokens)
        return found


def _target_store(member: Distiller, source: TeacherSource | None) -> TargetStore | None:
    if not isinstance(source, TopKStore) or member.spec is None:
        return None
    if "targets" not in member.spec.parts or member.parts.targets is None:
        return None
    return TargetStore(source, member.parts.targets, target_options(member.options))


def teach(
    teachers: Sequence[AnyTeacher],
    student: Pair | TokenizerSource,
    settings: DistillSettings,
    device: torch.device,
    *,
    own_cross_entropy: bool = True,
) -> Teaching:
    """Find the pair and the predictions of each teacher.

    Args:
        teachers: one or several; none for the loss `ce`.
        student: the student's tokenizer, or the `Pair` of those teachers that name none.
        settings: the losses.
        device: where models are loaded.
        own_cross_entropy: whether the distillers compute the student's cross-entropy too; else the
            Trainer's own loss stands beside theirs.

    Raises:
        OptionError: a loss without its teacher, a teacher without a tokenizer, a weight that would
            not be read.
        PairError: a pair of another student.
        ModelSourceError, MissingFileError: a teacher cannot be loaded.
    """
    given = [each if isinstance(each, Teacher) else Teacher(each) for each in teachers]
    if not given:
        pair = student if isinstance(student, Pair) else Pair(student, student)
        if settings.loss != "ce":
            raise OptionError(
                f"loss = {settings.loss!r} needs a teacher, and none was given; pass teachers=[...]"
                " or loss='ce'"
            )
        settings.check_read(["ce"])
        for name in ("teacher_weighting", "teacher_column"):
            if (value := getattr(settings, name)) is not None:
                raise OptionError(
                    f"{name} = {value!r} is of teachers, and none was given; pass teachers=[...], "
                    "or leave it out"
                )
        return Teaching([_distiller(pair, "ce", settings, own_cross_entropy)], [None])
    pairs = [pair_of(each.source, each.tokenizer, student) for each in given]
    losses = [_loss(each, pair, settings) for each, pair in zip(given, pairs, strict=True)]
    if len(given) > 1 and "ce" in losses:
        raise OptionError("loss = 'ce' has no teacher; leave the teachers out, or name a loss")
    settings.check_read(losses)
    check_teacher_weights([each.weight for each in given], settings.teacher_weighting)
    routes = Routes(
        [_name(each, index) for index, each in enumerate(given)], settings.teacher_column
    )
    distillers = [
        _distiller(pair, loss, settings, own_cross_entropy)
        for pair, loss in zip(pairs, losses, strict=True)
    ]
    sources = [
        _source(each, pair, settings, device) if distiller.needs_teacher else None
        for each, pair, distiller in zip(given, pairs, distillers, strict=True)
    ]
    joint = None
    if len(given) > 1:
        weights = settings.teacher_weighting or [each.weight for each in given]
        joint = MultiDistiller(distillers, weights, **_weights(settings, "", own_cross_entropy))
    made = Teaching(distillers, sources, joint, routes)
    made.fused_teacher = settings.fused_teacher
    return made


def _name(teacher: Teacher, index: int) -> str:
    if teacher.name is not None:
        return teacher.name
    source = teacher.source
    if isinstance(source, TopKStore):
        source = source.directory
    if not isinstance(source, str | PathLike):
        model = source.model if isinstance(source, LiveTeacher) else source
        source = getattr(model, "name_or_path", "")
    return Path(str(source)).name or f"teacher{index}"


def _weights(settings: DistillSettings, loss: str, own: bool) -> dict[str, Any]:
    if own:
        return {"kd_weight": settings.kd_weight, "ce_weight": settings.ce_weight}
    # The Trainer's own loss takes the place of cross-entropy, and is added to the pure loss.
    return {"kd_weight": 1.0, "ce_weight": 1.0 if loss == "ce" else 0.0}


def _distiller(
    pair: Pair, loss: DistillLossName, settings: DistillSettings, own: bool
) -> Distiller:
    options = settings.distiller_options(loss)
    return Distiller(pair, loss, **_weights(settings, loss, own), **options)


def _loss(teacher: Teacher, pair: Pair, settings: DistillSettings) -> DistillLossName:
    loss = teacher.loss or settings.loss
    return cast(DistillLossName, pair.audit().recommendation) if loss == "auto" else loss


def _source(
    teacher: Teacher, pair: Pair, settings: DistillSettings, device: torch.device
) -> TeacherSource:
    source = teacher.source
    if isinstance(source, str | PathLike) and is_store(source):
        source = TopKStore.open(Path(source))
    if isinstance(source, TopKStore):
        source.require_tokenizer(pair.teacher_vocab.fingerprint)
        return source
    if isinstance(source, nn.Module | LiveTeacher):
        model = source.model if isinstance(source, LiveTeacher) else source
        # What DeepSpeed's third stage makes of a parameter.
        if any(hasattr(each, "ds_shape") and each.numel() == 0 for each in model.parameters()):
            raise OptionError(
                f"the weights of the teacher {type(model).__name__} were cut over processes by "
                "DeepSpeed's stage 3 when it was loaded; pass its directory or name, which is "
                "loaded whole, or its stored predictions"
            )
    if isinstance(source, nn.Module):
        return LiveTeacher(source.to(device))
    if isinstance(source, str | PathLike):
        dtype = settings.teacher_dtype
        wanted = dtype if dtype == "auto" else getattr(torch, dtype)
        model = load_causal_lm(str(source), side="teacher", dtype=wanted)
        columns = cast(Any, model).get_output_embeddings().weight.shape[0]
        # Some have a few columns less than tokens (Gemma-3); the losses leave those tokens out.
        if columns < least_columns(pair.sizes[1]):
            raise PairError(
                f"the teacher {source} has {columns} columns, its tokenizer {pair.sizes[1]} "
                "tokens; pass the tokenizer of this teacher"
            )
        return LiveTeacher(model.to(device))
    if isinstance(source, ServedTeacher):
        source = PrefetchedTeacher(source)
    if isinstance(source, PrefetchedTeacher):
        _check_served(source.source, pair)
    if not hasattr(source, "signal"):
        raise ArgumentTypeError(
            f"a teacher is a {type(source).__name__}; pass a model, its directory or hub name, a "
            "LiveTeacher, a TopKStore, a ServedTeacher, or a Teacher of one"
        )
    return source


def _check_served(served: ServedTeacher, pair: Pair) -> None:
    known, own = served.vocab_fingerprint, pair.teacher_vocab.fingerprint
    if known and known != own:
        raise PairError(
            f"the served teacher was made with the tokenizer {known[:12]}, its pair has the "
            f"teacher {own[:12]}; pass the same tokenizer to both"
        )
