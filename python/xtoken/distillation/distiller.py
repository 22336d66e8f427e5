"""The loss of a pair as a module: texts in, one scalar with a graph out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn

from xtoken._checks import check_flag, expect, token_limit
from xtoken.align.ids import as_rows
from xtoken.data.examples import Example, fit_example
from xtoken.data.low_coverage import CoverageWatch
from xtoken.distillation.batch import Batch
from xtoken.distillation.collate import DistillCollator, pad_id
from xtoken.distillation.items import Item, examples_of, examples_together
from xtoken.distillation.options import (
    DEFAULT_THRESHOLD,
    LOSS_FIELDS,
    LOSS_NAMES,
    DistillerOptions,
    DistillLossName,
    KdWeight,
    check_threshold,
    check_threshold_read,
    check_weights,
    not_an_option,
    options_read,
    trains_projection,
)
from xtoken.distillation.output import Counts, DistillOutput, checked_counts
from xtoken.errors import (
    ArgumentTypeError,
    OptionError,
    PairError,
    ShapeError,
    TokenIdError,
)
from xtoken.losses.cross_entropy import cross_entropy
from xtoken.losses.engine.shared_gradient import SharedLogits
from xtoken.losses.engine.student_input import Student
from xtoken.losses.exact_kl.loss import prepare_targets
from xtoken.losses.inputs import LossInputs, LossOptions
from xtoken.losses.multi_teacher import TeacherTerm
from xtoken.losses.output import balance
from xtoken.losses.prefix_kl.compared_prefixes import prepare_prefixes
from xtoken.losses.registry import LossSpec, find_loss
from xtoken.pair import Pair
from xtoken.tensors.host import ordinary
from xtoken.tensors.lm_head import LmHead
from xtoken.tensors.pair_parts import LossName, PairParts, Part
from xtoken.tensors.target_batch import TargetBatch
from xtoken.tensors.teacher_signal import Teacher, TeacherTopK
from xtoken.tensors.teacher_spread import TeacherSpread
from xtoken.trie import PieceTrie
from xtoken.vocab.display import special_name
from xtoken.vocab.head_size import least_columns


class Distiller(nn.Module):
    """A loss of a pair with all that it reads: W, tries, common sets, options.

    Args:
        pair: the two tokenizers.
        loss: a loss of the library by name; `ce` for cross-entropy alone, `auto` for what the
            pair's audit recommends.
        kd_weight: weight of the distillation loss, or `balanced`: `sg(ce / kd)`, X-Token's Eq. 7.
        ce_weight: weight of the cross-entropy of the student's own tokens; 0 leaves it out.
        learnable_projection: whether W's weights are parameters of this module.
        threshold: of the relaxed common set (`h-kl`).
        max_tokens: longest example on either side, cut at a chunk boundary; None for no limit.
        padding_side, pad_to_multiple_of: of `collate`.
        options: those of the loss, see `LossOptions`.

    Raises:
        OptionError: an unknown loss or option, a value outside its range, or an option that the
            loss does not read.
        ArgumentTypeError: `pair` is not a `Pair`.

    Example:
        >>> import torch, xtoken
        >>> student = xtoken.Vocab.from_tokens([b"2", b"0", b"1", b"201"], ranked=True)
        >>> teacher = xtoken.Vocab.from_tokens([b"1", b"0", b"2"], ranked=True)
        >>> pair = xtoken.Pair(student, teacher, cache_dir=False)
        >>> distiller = pair.distiller("p-kl")
        >>> batch = distiller.batch([[0, 3]], [[2, 2, 1, 0]])
        >>> student_logits = torch.zeros(1, 2, 4, requires_grad=True)
        >>> output = distiller(student_logits, torch.zeros(1, 4, 3), batch)
        >>> output.loss.backward()
        >>> len(batch.chunks)
        1
    """

    def __init__(
        self,
        pair: Pair,
        loss: DistillLossName = "prefix-kl",
        **options: Unpack[DistillerOptions],
    ) -> None:
        super().__init__()
        if not isinstance(pair, Pair):
            raise ArgumentTypeError(
                f"pair is a {type(pair).__name__}; pass xtoken.Pair(student_tokenizer, "
                "teacher_tokenizer)"
            )
        if not isinstance(loss, str) or loss not in LOSS_NAMES:
            raise OptionError(f"loss = {loss!r}, expected one of {', '.join(LOSS_NAMES)}")
        known = DistillerOptions.__annotations__
        unknown = next((name for name in options if name not in known), None)
        if unknown is not None:
            raise OptionError(f"a distiller has no option {unknown!r}; it knows {', '.join(known)}")
        if loss == "auto":
            loss = pair.audit().recommendation
        mine = pair.fingerprints
        if loss == "same-vocab-kl" and mine.student != mine.teacher:
            raise PairError(
                f"loss = 'same-vocab-kl' needs one tokenizer on both sides, but the student's is "
                f"{mine.student[:12]}, the teacher's {mine.teacher[:12]}; use 'p-kl' or 'prefix-kl'"
            )
        self.pair = pair
        self.loss_name: DistillLossName = loss
        self.kd_weight: KdWeight = options.get("kd_weight", 1.0)
        self.ce_weight = options.get("ce_weight", 1.0 if loss == "ce" else 0.0)
        check_weights(loss, self.kd_weight, self.ce_weight)
        self.ce_weight = float(self.ce_weight)
        if not isinstance(self.kd_weight, str):
            self.kd_weight = float(self.kd_weight)
        self.max_tokens = token_limit(options.get("max_tokens"))
        check_flag("learnable_projection", options.get("learnable_projection", False))
        self.options = LossOptions(
            **cast(Any, {name: value for name, value in options.items() if name in LOSS_FIELDS})
        )
        self._coverage = CoverageWatch(pair.sides)
        self._threshold = options.get("threshold", DEFAULT_THRESHOLD)
        check_threshold(self._threshold)
        check_threshold_read(self._threshold, [loss])
        # By the widths of heads that are narrower than a tokenizer.
        self._limited: dict[tuple[int, ...], PairParts] = {}
        self.spec: LossSpec | None = None if loss == "ce" else find_loss(loss)
        read = options_read([loss])
        for name in self.options.changed():
            if name not in read:
                raise not_an_option(name, getattr(self.options, name), [loss])
        if options.get("learnable_projection", False) and not trains_projection(loss):
            raise OptionError(
                f"learnable_projection = True, but {loss} trains no weight of W; name p-kl, or "
                "leave it out"
            )
        if self.spec is not None:
            self.parts = PairParts.from_projection(
                pair.projection,
                needs=self._needs,
                learnable=options.get("learnable_projection", False),
                threshold=self._threshold,
            )
        self.collator = DistillCollator(
            pad_id(pair.student.source),
            pad_id(pair.teacher.source),
            padding_side=options.get("padding_side", "right"),
            pad_to_multiple_of=options.get("pad_to_multiple_of", 1),
            pair=pair.fingerprints,
        )

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss reads the teacher at all."""
        return self.spec is not None and self.kd_weight != 0

    def collate(self, items: Sequence[Item]) -> Batch:
        """One padded batch of texts, conversations or examples, with the chunks that count.

        Texts get the special tokens that each tokenizer adds and count whole; of conversations, by
        each tokenizer's own chat template, what the assistant says counts. A conversation is a
        `Conversation`, a list of messages, or a row with a column of them; see `document_of`.

        Raises:
            DataError: an item cannot be used; the message says why.
            ArgumentTypeError: an item is none of these.
        """
        batch = self.prepared(self.collator(self.examples(items)))
        self._watch(batch)
        return batch

    def examples(self, items: Sequence[Item]) -> list[Example]:
        """The examples that `collate` pads: tokenized, aligned and cut at `max_tokens`.

        Raises: as `collate`.
        """
        return [each[0] for each in examples_together(items, [self.pair], self.max_tokens)]

    def batch(
        self, student_ids: Sequence[Sequence[int]], teacher_ids: Sequence[Sequence[int]]
    ) -> Batch:
        """One padded batch of ids that are tokenized already; all tokens count in the loss.

        Args:
            student_ids, teacher_ids: as many sequences each, of the same texts; cut at
                `max_tokens` as texts are.

        Raises:
            DataError: nothing to learn is left of a sequence that was cut.
        """
        student, teacher = as_rows("student", student_ids), as_rows("teacher", teacher_ids)
        alignments = self.pair.aligner.align_batch(student, teacher)
        whole = (Example.whole(*row) for row in zip(student, teacher, alignments, strict=True))
        fitting = (fit_example(each, self.pair.aligner, self.max_tokens) for each in whole)
        examples = [each for made in fitting for (each,) in examples_of(made, self.max_tokens)]
        return self.prepared(self.collator(examples))

    @ordinary()
    def prepared(self, batch: Batch) -> Batch:
        """The batch with what the loss would otherwise ask a GPU for; for a batch on the CPU that
        `collate` did not make."""
        if batch.targets is not None and self.spec is not None and "targets" in self.spec.parts:
            prepare_targets(batch.targets, self.options)
        prepare = None if self.spec is None else self.spec.prepare_for(self.options)
        if prepare is not None and self.needs_teacher:
            ids = batch.student_ids, batch.teacher_ids
            batch = replace(batch, prepared=prepare(self.parts, batch.chunks, *ids))
        student, teacher = self._tries
        if student is None or not self.needs_teacher or self.options.max_depth == 0:
            return batch
        prefixes = prepare_prefixes(
            student,
            teacher if self.options.mirror else None,
            batch.chunks,
            batch.student_ids,
            batch.teacher_ids,
            max_depth=self.options.max_depth,
            last_depth=self.options.end,
        )
        return replace(batch, prefixes=prefixes)

    @property
    def _needs(self) -> LossName | frozenset[Part]:
        """The loss's name, or its parts where the options ask for more than it does."""
        assert self.spec is not None
        parts = self.spec.parts_for(self.options)
        return self.spec.name if parts == self.spec.parts else parts

    @property
    def _tries(self) -> tuple[PieceTrie | None, PieceTrie | None]:
        """The tries of the student's and of the teacher's tokens that the loss reads, if any."""
        if self.spec is None:
            return None, None
        student, teacher = self.parts.student_trie, self.parts.teacher_trie
        return None if student is None else student.trie, None if teacher is None else teacher.trie

    def counts(self, batch: Batch) -> Counts:
        """The tokens and chunks of a batch; their sum over a step's batches is `totals`."""
        expect(batch, Batch, "batch", "pass distiller.collate(texts)")
        return Counts(batch.tokens, len(batch.chunks) if self.needs_teacher else 0)

    def forward(
        self,
        student: Student,
        teacher: Teacher | None,
        batch: Batch,
        *,
        totals: Counts | None = None,
        kd_scale: float | None = None,
    ) -> DistillOutput:
        """The loss of one batch.

        Args:
            student: [B, T_s, V_s'] raw logits, an `LmHead` (hidden states and head: the logits are
                never made) or a `VocabShard`.
            teacher: [B, T_t, V_t'] raw logits, a `TeacherTopK`, or an `LmHead`, whose logits are
                never whole; None where no teacher is needed.
            batch: what both models were run on, from `collate`.
            totals: what to divide by, where this batch is one of several of a step; its own counts
                if None. They may be below 1, as means over processes are; 0 counts as 1.
            kd_scale: in place of `kd_weight`, as a step of several batches has one balance.

        Raises:
            PairError: the batch or the teacher's predictions are of another pair.
            ShapeError, TokenIdError, ArgumentTypeError: the parts are not of one batch.
            OptionError: totals that are no numbers of at least 0.
            NonFiniteError: a logit is NaN or infinite.
        """
        self.check(teacher, batch)
        totals = self.counts(batch) if totals is None else checked_counts(totals)
        ce = None
        with_kd = self.needs_teacher and teacher is not None
        if with_kd and self.ce_weight != 0 and isinstance(student, Tensor):
            if student.requires_grad and torch.is_grad_enabled() and _is_plain(student):
                student = SharedLogits.of(student)  # both losses write one gradient
        if self.ce_weight != 0 or self.kd_weight == "balanced":
            ce = self.cross_entropy(student, teacher, batch, totals.tokens)
        kd = None
        if self.needs_teacher and teacher is not None:
            term = self.term(student, teacher, batch, totals.chunks)
            kd = find_loss(term.loss).function(term.inputs, term.pair, term.options)
        return DistillOutput.of(
            kd, ce, batch.tokens,
            kd_weight=self.kd_weight, ce_weight=self.ce_weight, kd_scale=kd_scale,
        )  # fmt: skip

    def cross_entropy(
        self, student: Student, teacher: Teacher | None, batch: Batch, tokens: float
    ) -> Tensor:
        """The student's cross-entropy over the batch, a scalar divided by `tokens`."""
        return cross_entropy(
            student,
            batch.student_ids,
            batch.student_loss_mask,
            tokens or 1.0,  # the mean of a step may be below 1; only where none is there is no sum
            vocab_size=self.student_columns(student, teacher, batch),
            positions=batch.counted,
            compiled=self.options.compiled,
        ).loss

    def student_columns(self, student: Student, teacher: Teacher | None, batch: Batch) -> int:
        """The columns of the student's head that are tokens; fewer where it is narrower."""
        parts = self._parts_for(student, teacher, batch)
        return self.pair.sizes[0] if parts is None else parts.sizes[0]

    def term(self, student: Student, teacher: Teacher, batch: Batch, chunks: float) -> TeacherTerm:
        """What the loss of this teacher is computed from, divided by `chunks`."""
        self._watch(batch)
        parts = self._parts_for(student, teacher, batch)
        assert self.spec is not None
        assert parts is not None
        prefixes = batch.prefixes
        usable = parts is self.parts and prefixes is not None and prefixes.belong_to(batch.chunks)
        prepared = batch.prepared if parts is self.parts else None
        if prepared is not None and prepared.chunks is not batch.chunks.host:
            prepared = None
        inputs = LossInputs(
            student,
            teacher,
            batch.chunks,
            student_ids=batch.student_ids,
            teacher_ids=batch.teacher_ids,
            normalizer=chunks or 1.0,
            prefixes=prefixes if usable else None,
            prepared=prepared,
            targets=self._targets_of(batch),
        )
        return TeacherTerm(self.spec.name, inputs, parts, self.options)

    def _targets_of(self, batch: Batch) -> TargetBatch | None:
        """What was made before, where it is of these chunks and of this loss."""
        made = batch.targets
        wanted = self.spec is not None and "targets" in self.spec.parts
        return made if wanted and made is not None and made.belong_to(batch.chunks) else None

    def _watch(self, batch: Batch) -> None:
        """Warn where chunks teach little of what was collated, whoever collated it."""
        if self.needs_teacher:
            tokens = batch.tokens if batch.asked_tokens is None else batch.asked_tokens
            self._coverage.see(tokens, batch.taught, batch.coverage, stacklevel=3)

    def balance(self, ce: float, kd: float) -> float:
        """The weight of the distillation loss that balances these two values; see `balance`."""
        return float(balance(*(torch.tensor(value, device="cpu") for value in (kd, ce))))

    def _parts_for(
        self, student: Student, teacher: Teacher | None, batch: Batch
    ) -> PairParts | None:
        """The parts of the pair, cut to the heads where a head is narrower than its tokenizer."""
        if self.spec is None:
            return None
        sizes = self.parts.sizes
        widths = (_columns(student), _columns(teacher))
        heads = tuple(
            size if width is None else min(size, width)
            for size, width in zip(sizes, widths, strict=True)
        )
        if heads == sizes:
            return self.parts
        if heads not in self._limited:
            self._limited[heads] = self._limited_parts(heads[0], heads[1])
        inputs = (batch.student, batch.teacher)
        for side, head, size, given in zip(
            ("student", "teacher"), heads, sizes, inputs, strict=True
        ):
            rows, mask = given["input_ids"], given.get("attention_mask")
            if mask is not None:
                rows = rows.masked_fill(mask == 0, 0)  # padding may be any token
            if int(rows.max()) >= head:
                raise TokenIdError(
                    f"the batch holds {side} token {int(rows.max())}, but the {side}'s head has "
                    f"{head} columns; call model.resize_token_embeddings({size}), or leave out the "
                    "texts with that token"
                )
        with torch.inference_mode(False):  # as made: training may come after
            return self._limited[heads].to(batch.device)

    def _limited_parts(self, rows: int, columns: int) -> PairParts:
        sizes = self.parts.sizes
        for side, head, size in zip(("student", "teacher"), (rows, columns), sizes, strict=True):
            if head < least_columns(size):
                raise ShapeError(
                    f"the {side}'s head has {head} columns, its tokenizer {size} tokens; this is "
                    "another model's tokenizer, or call model.resize_token_embeddings"
                )
            if head < size:
                vocab = self.pair.sides[side == "teacher"].vocab
                warnings.warn(
                    f"the {side}'s head has {head} columns, its tokenizer {size} tokens: the last "
                    f"{size - head} ({special_name(vocab, head)}, ...) count as unused",
                    stacklevel=5,
                )
        assert self.spec is not None
        parts = PairParts.from_projection(
            self.pair.projection.limited(rows, columns),
            needs=self._needs,
            threshold=self._threshold,
        )
        if self.parts.projection is not None:
            # Its weights may have been learned or loaded since, and are learned on.
            with torch.inference_mode(False):
                parts.projection = self.parts.projection.limited(rows, columns)
        return parts

    def check(self, teacher: Teacher | None, batch: Batch, *, needed: bool | None = None) -> None:
        """Refuse a batch or a teacher's signal of another pair or class.

        `needed` says whether the teacher is read; None is as `needs_teacher`.

        Raises:
            ArgumentTypeError, PairError: the message names the call that was meant.
        """
        if not isinstance(batch, Batch):
            raise ArgumentTypeError(
                f"batch is a {type(batch).__name__}; pass distiller.collate(texts)"
            )
        self.pair.fingerprints.check(
            batch.pair, "batch", "make the batch with this distiller's collate"
        )
        batch.check_unchanged()
        if teacher is None and (self.needs_teacher if needed is None else needed):
            raise ArgumentTypeError(
                f"the loss {self.loss_name!r} needs the teacher's logits or a TeacherTopK; run the "
                "teacher on batch.teacher"
            )
        if teacher is not None and not isinstance(
            teacher, Tensor | TeacherTopK | TeacherSpread | LmHead
        ):
            raise ArgumentTypeError(
                f"teacher is a {type(teacher).__name__}; pass its logits (output.logits), a "
                "TeacherTopK or an LmHead"
            )

    def extra_repr(self) -> str:
        return f"{self.loss_name!r}, kd_weight={self.kd_weight}, ce_weight={self.ce_weight}"


def _columns(signal: Student | Teacher | None) -> int | None:
    """The columns of a head; None where they are spread over processes or only some are stored."""
    if isinstance(signal, LmHead):
        return signal.weight.shape[0]
    if isinstance(signal, TeacherSpread):
        return signal.width
    if isinstance(signal, SharedLogits):
        signal = signal.logits
    return signal.shape[-1] if isinstance(signal, Tensor) else None


def _is_plain(student: Tensor) -> bool:
    """Whether it is no DTensor, and nothing is traced."""
    return not hasattr(student, "device_mesh") and not torch.compiler.is_compiling()
